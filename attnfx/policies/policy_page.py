"""The reference of policies as a page of the docs: prose, and tables made from the schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnfx.policies.conditions import NAMES
from attnfx.policies.policy_file import problems_of
from attnfx.policies.policy_schema import schema
from attnfx.policies.presets import presets

_PAGE = """\
# Policies

A policy says which variant serves which attention of a model. What it does not speak of stays exact. This page is written by
`attnfx policy schema --markdown`; the variants are in [variants.md](variants.md).

The same policy in Python, TOML, YAML and JSON:

```python
import attnfx
from attnfx import Policy, Rule
from attnfx.variants import BlockTopK, SlidingWindow

policy = Policy(
    [
        Rule(layers="0-1"),
        Rule("model.layers.*", SlidingWindow(window=1024, sinks=4), kind="causal", when="kv_len >= 8192"),
        Rule(kind="self", phase="prefill", variant=[BlockTopK(top=128), SlidingWindow(window=4096), "keep"]),
    ],
    default="keep",
)
```

```toml
default = "keep"

[[rules]]
layers = "0-1"
variant = "keep"

[[rules]]
modules = "model.layers.*"
kind = "causal"
when = "kv_len >= 8192"
variant = { name = "SlidingWindow", window = 1024, sinks = 4 }

[[rules]]
kind = "self"
phase = "prefill"
variant = [{ name = "BlockTopK", top = 128 }, { name = "SlidingWindow", window = 4096 }, "keep"]
```

```yaml
default: keep
rules:
- layers: 0-1
  variant: keep
- modules: model.layers.*
  kind: causal
  when: kv_len >= 8192
  variant: {name: SlidingWindow, window: 1024, sinks: 4}
- kind: self
  phase: prefill
  variant:
  - {name: BlockTopK, top: 128}
  - {name: SlidingWindow, window: 4096}
  - keep
```

```json
{
  "default": "keep",
  "rules": [
    {"layers": "0-1", "variant": "keep"},
    {"modules": "model.layers.*", "kind": "causal", "when": "kv_len >= 8192",
     "variant": {"name": "SlidingWindow", "window": 1024, "sinks": 4}},
    {"kind": "self", "phase": "prefill",
     "variant": [{"name": "BlockTopK", "top": 128}, {"name": "SlidingWindow", "window": 4096}, "keep"]}
  ]
}
```

`Policy.load(path)` reads a file by its suffix, `policy.save(path)` writes one, and `policy.dumps("yaml")` is the text. In
`attnfx.compile(model, policy=...)`, `options={"policy": ...}` and `--policy` stands a policy, a list of rules, the path of a
file (which has a suffix), or the name of a preset.

## Rules

Rules are tried in order, and the first one all of whose selectors hold is the rule of an attention; then no other is tried. A rule
in a file has at least one selector.

@RULES@

The `default` is what runs where no rule holds; without one, that is exact.

*Layers.* The layer is the first number among the parts of a module path: 3 in `model.layers.3.self_attn`, 1 in
`layers.1.blocks.0.attn`. A path without a number has no layer, and a rule with `layers` does not hold for it.

*Kinds.* An attention is often of several kinds: causal and self, for instance. "self" and "cross" are read from the graph: whether
keys are made of the tensor that queries are made of, with layers of weights between but no other attention. Where that is
not seen (queries and keys come into the graph from outside), an attention is neither.

*Regular expressions* have characters, `.`, `\\d \\w \\s`, classes, groups, `|`, and `* + ? {2,3}`; no lookaround and no
back references. They are matched by sets of states, so that none takes long.

*Conditions* compare whole numbers and these sizes; `and`, `or`, `not` join, and `+ - * // %` compute. A length that changes is
guarded: a graph is compiled once for each side of the condition, not for each length.

@SIZES@

*An order, or a wish.* Where a variant cannot serve an attention, a rule that names modules is an error that says why: it was an
order. A rule for `*` is a wish, and what its variant objects to is left exact, with the reason in the report. A list of variants
that ends with "keep" never is an error.

*Heads.* `heads = "0-3,8"` is short for the variant `PerHead`, and has its bounds: heads that share a key head are served alike.

*Rules that match nothing* are a warning after each compile, with the modules that there are; but for rules of another phase, and
for rules of kinds, patterns or devices that only keep.

*Rules that cannot fire*, since earlier rules take all that they match, are a warning as well, with the places of those rules;
and so are rules that match only what stays as the model computes it, with the reason.

## Policies over policies

`base | override` tries the rules of `override` first, then those of `base`; the default is that of `override` if it has one:

```python
policy = Policy.preset("streaming") | Policy([Rule("lm_head.*", "keep"), Rule(layers="0-3")])
```

## Presets

Where to begin; `attnfx policy presets streaming > policy.toml` makes a file of one.

@PRESETS@

## Variants and their parameters

Parameters without a default have to be given.

@VARIANTS@

## Files

TOML 1.0, YAML without tags, anchors and aliases, or JSON without duplicate keys; UTF-8, 256 KiB, 12 levels and 20000 values
at most. Loading a policy executes nothing and reads no other file; the file that a variant's `path` names is read when the variant
is used. What is wrong is told with file, line, rule and key, what was found, what is allowed and the nearest spelling:

```text
@ERROR@
```

`attnfx policy check FILE...` lists everything that is wrong, with exit code 1 (`--json` for machines), `attnfx policy diff A B`
tells which rules of two files or presets differ, and `attnfx policy schema > policy.schema.json` is a JSON schema, with which
editors complete and check while you type: under `"$schema"` in JSON, as a first line `#:schema policy.schema.json` in TOML
(Taplo), and `# yaml-language-server: $schema=policy.schema.json` in YAML.
"""

#: What is in policy.toml for the error that the page shows.
MISTAKE = 'default = "keep"\n\n[[rules]]\nmodules = "model.layers.*"\nvariant = { name = "SlidingWindow", windw = 1024 }\n'


def markdown() -> str:
    """The page."""
    known = schema()
    rule = known["$defs"]["rule"]["properties"]
    rows = [(f"`{name}`", says["description"], _allowed(says)) for name, says in rule.items()]
    named = {name: one for name, one in known["$defs"].items() if name not in ("rule", "choice", "one")}
    tables = {
        "RULES": _table(("key", "says", "allowed"), rows),
        "SIZES": _table(("size", "is"), [(f"`{name}`", what) for name, what in NAMES.items()]),
        "PRESETS": _table(("preset", "does"), [(f"`{name}`", one.summary) for name, one in presets().items()]),
        "VARIANTS": _table(
            ("variant", "parameters"), [(f"[{name}](variants.md#{name.lower()})", _parameters(one)) for name, one in named.items()]
        ),
        "ERROR": "\n".join(map(str, problems_of(MISTAKE.encode(), "policy.toml"))),
    }
    page = _PAGE
    for name, table in tables.items():
        page = page.replace(f"@{name}@", table)
    return page


def _parameters(variant: dict[str, Any]) -> str:
    given = {name: says for name, says in variant["properties"].items() if name != "name"}
    return ", ".join(f"`{name}`: {_kind(says)}{_default(says)}" for name, says in given.items())


def _default(says: dict[str, Any]) -> str:
    default = says.get("default")
    return "" if "default" not in says else " = none" if default is None else f" = {default!r}".lower()


def _kind(says: dict[str, Any]) -> str:
    """The type of a parameter, in words."""
    if "anyOf" in says:
        return " or ".join(dict.fromkeys(_kind(one) for one in says["anyOf"] if one != {"type": "null"}))
    if says.get("type") == "array":
        return f"[{_kind(says['items'])}]"
    if says.get("type") == "object":
        return "table of heads and variants"
    return str(says.get("type", "see there"))


def _allowed(says: dict[str, Any]) -> str:
    words = [word for one in says.get("anyOf", ()) for word in one.get("enum", ())]
    if words:
        return "one or a list of " + ", ".join(f"`{word}`" for word in words)
    if "$ref" in says:
        return '"keep", a name, a table, or a list'
    return "text or a number" if "anyOf" in says else "text"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
