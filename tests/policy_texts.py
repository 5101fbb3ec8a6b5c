"""Policy files for the tests: malformed ones, and one policy in each format."""

from __future__ import annotations

from attnfx.policy import Policy, Rule
from attnfx.variants import AShape, SlidingWindow

RULE = '[[rules]]\nmodules = "*"\n'
CANARY = "canary"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

#: suffix, content, and what the one error says.
MALFORMED: list[tuple[str, str | bytes, str]] = [
    (".toml", "rules = [", "is not TOML"),
    (".toml", "rules = 3", '"rules" is 3; it must be tables'),
    (".toml", RULE + "variant = 3", 'line 3, rule 1: "variant" is 3'),
    (".toml", RULE + "variant = [[]]", "variant.0: "),
    (".toml", RULE + 'variant = ["keep", "AShape"]', '"keep" before its end'),
    (".toml", RULE + "variant = []", "is empty"),
    (".toml", RULE + 'varaint = "keep"', 'line 3, rule 1: the key "varaint" is unknown; allowed are .* Did you mean "variant"'),
    (".toml", RULE + 'variant = "SlidingWindo"', 'There is no variant "SlidingWindo"; known are .* Did you mean "SlidingWindow"'),
    (".toml", RULE + 'variant = { name = "AShape", n_init = "4" }', "variant.n_init: AShape.n_init is '4'; it must be a"),
    (".toml", RULE + 'variant = { name = "LinearAttention", decay = 3 }', "LinearAttention cannot have the parameters"),
    (".toml", '[[rules]]\nmodules = "h.[3-0]"\nvariant = "keep"', 'line 2, rule 1, modules: .* the range "3-0" runs backwards'),
    (".toml", '[[rules]]\nmodules = "h.[0"\nvariant = "keep"', 'the "\\[" at character 3 is never closed'),
    (".toml", '[[rules]]\nmodules = "re:(a"\nvariant = "keep"', 'the "\\(" at character 1 is never closed'),
    (".toml", '[[rules]]\nmodules = "re:' + "(" * 9 + "a{9,99}" + "){9,99}" * 9 + '"\nvariant = "keep"', "multiply to more than"),
    (".toml", '[[rules]]\nlayers = "9-2"\nvariant = "keep"', 'layers: .* the range "9-2" runs backwards'),
    (".toml", '[[rules]]\nlayers = -3\nvariant = "keep"', "layers: The layers are -3"),
    (".toml", RULE + 'heads = "0-"\nvariant = "AShape"', 'line 3, rule 1, heads: .* the range "0-" has no end'),
    (".toml", RULE + 'heads = "0-3"\nvariant = "keep"', "rule 1: The heads .* all heads are kept"),
    (".toml", RULE + 'kind = ["self", "corss"]\nvariant = "keep"', 'Did you mean "cross"'),
    (".toml", RULE + 'device = "gpu"\nvariant = "keep"', "The device is 'gpu'; known are \"cpu\", \"cuda\""),
    (".toml", RULE + 'when = "__import__(\'os\').mkdir(\'canary\') == 0"\nvariant = "keep"', "where a whole number"),
    (".toml", 'default = "keeep"', 'line 1, default: .* Did you mean "keep"'),
    (".toml", '[[rules]]\nvariant = "keep"', '"modules" is missing, and so is any other'),
    (".toml", "a." * 100_000 + "a = 1", "nested more than 12 deep"),
    (".toml", "rules = " + "[" * 100_000, "nested more than 12 deep"),
    (".toml", "a = " + "9" * 100_000, "a number has 100000 digits"),
    (".toml", 'a = """' + '\\"""' * 50_000, "is not TOML"),
    (".toml", b'[[rules]]\nmodules = "\xff"', r"line 2: .* byte 21 \(0xff\) is not UTF-8"),
    (".toml", b"\x00" * 300_000, "larger than 256 KiB"),
    (".toml", "[[rules]]\n" * 26_000, "the key \"modules\" is missing|more than 20000"),
    (".yaml", "rules: [", "is not YAML"),
    (".yaml", f"rules: !!python/object/apply:os.mkdir [{CANARY}]", "the tag .*python/object/apply:os.mkdir"),
    (".yaml", "rules: !include other.yaml", 'the tag "!include"; tags are not allowed'),
    (".yaml", BOMB, 'line 1: .* the anchor "&a"; anchors are not allowed'),
    (".yaml", "rules: *a", 'the alias "\\*a"|undefined alias'),
    (".yaml", "rules: " + "[" * 100_000, "nested more than 12 deep"),
    (".yaml", "- " * 100_000, "nested more than 12 deep"),
    (".yaml", "rules: []\nrules: []", 'line 2: .* the key "rules" is there twice'),
    (".yaml", "rules:\n- modules: 2026-11-23\n  variant: keep", "line 2: .* is read as a timestamp by YAML; write it in quotes"),
    (".yaml", "rules: []\n---\nrules: []", "is not YAML"),
    (".yaml", "- 1\n" * 60_000, "more than 20000 values"),
    (".yaml", "? [a]\n: b", "keys are text"),
    (".yaml", "", 'the file holds None; it must hold a table with the key "rules"'),
    (".json", '{"rules": [}', "line 1: .* is not JSON"),
    (".json", "[" * 100_000, "nested more than 12 deep"),
    (".json", '{"rules": [],\n "rules": []}', 'line 2: .* the key "rules" is there twice'),
    (".json", '{"default": NaN}', "is not JSON: 'N' begins no value"),
    (".json", '{"default": ' + "1" * 5_000 + "}", "a number has 5000 digits"),
    (".json", '{"default": "\\ud800"}', "half of a surrogate pair"),
    (".json", "[1,2]", r"the file holds \[1, 2\]; it must hold a table"),
    (".txt", "rules = []", 'has the suffix ".txt"; known are ".toml"'),
]  # fmt: skip


TEXTS = {
    "toml": """\
default = "AShape"

[[rules]]
modules = 're:model\\.layers\\.\\d\\..*'
layers = 3
kind = ["self", "causal"]
when = "kv_len >= 8192"
variant = [
  { name = "SlidingWindow", window = 7 },
  "keep",
]

[[rules]]
heads = "0-3,8"
pattern = "softmax"
device = "cuda"
phase = "prefill"
  [rules.variant]
  name = "AShape"
  n_init = 5
""",
    "yaml": """\
default: AShape
rules:
- modules: re:model\\.layers\\.\\d\\..*
  layers: 3
  kind: [self, causal]
  when: kv_len >= 8192
  variant:
  - name: SlidingWindow
    window: 7
  - keep
- {heads: "0-3,8", pattern: softmax, device: cuda, phase: prefill, variant: {name: AShape, n_init: 5}}
""",
    "json": """\
{
  "$schema": "policy.schema.json",
  "default": "AShape",
  "rules": [
    {"modules": "re:model\\\\.layers\\\\.\\\\d\\\\..*", "layers": 3, "kind": ["self", "causal"], "when": "kv_len >= 8192",
     "variant": [{"name": "SlidingWindow", "window": 7}, "keep"]},
    {"heads": "0-3,8", "pattern": "softmax", "device": "cuda", "phase": "prefill", "variant": {"name": "AShape", "n_init": 5}}
  ]
}
""",
}
WANT = Policy(
    [
        Rule("re:model\\.layers\\.\\d\\..*", [SlidingWindow(7), None], layers="3", kind=("self", "causal"), when="kv_len >= 8192"),  # type: ignore[arg-type]
        Rule(heads="0-3,8", pattern="softmax", device="cuda", phase="prefill", variant=AShape(n_init=5)),
    ],
    default=AShape(),
)
