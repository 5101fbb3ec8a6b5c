"""Policies: which rule speaks for which module, what files hold, and what a mistake in either is told."""

import dataclasses
import pickle
from pathlib import Path

import pytest
from test_site import site

from attnfx.errors import PolicyError
from attnfx.policies.policy_warnings import policy_warnings
from attnfx.policies.rule import Subject
from attnfx.policy import Policy, Rule
from attnfx.report import Missed, Report, SiteReport
from attnfx.site import Origin
from attnfx.variants import SlidingWindow

WINDOW = SlidingWindow(window=1024, sinks=4)


@pytest.mark.parametrize(
    ("glob", "matches", "differs"),
    [
        ("*", ["", "a", "model.layers.0.self_attn"], []),
        ("model.layers.*", ["model.layers.0.self_attn", "model.layers."], ["model.layers", "encoder.model.layers.0"]),
        (
            "model.layers.[0-3].self_attn",
            ["model.layers.0.self_attn", "model.layers.3.self_attn"],
            ["model.layers.4.self_attn"],
        ),
        ("h.[0-31].attn", ["h.0.attn", "h.9.attn", "h.31.attn"], ["h.32.attn", "h.310.attn", "h.03.attn"]),
        ("h.[0,4,8-11]", ["h.0", "h.4", "h.10"], ["h.1", "h.12", "h.,"]),
        ("h.1[0-5]", ["h.10", "h.15"], ["h.16", "h.1"]),
        ("h.?", ["h.1"], ["h.12", "h."]),
        ("[!ab]x", ["cx", "!x"], ["ax", "bx"]),
        ("[12]", ["1", "2"], ["12"]),
        ("a.b", ["a.b"], ["axb", "a.b\n"]),
        ("[]^]", ["]", "^"], ["x"]),
    ],
)
def test_glob(glob: str, matches: list[str], differs: list[str]) -> None:
    rule = Rule(glob)
    assert [path for path in matches if not rule.matches(path)] == []
    assert [path for path in differs if rule.matches(path)] == []


@pytest.mark.parametrize(
    ("glob", "complaint"),
    [
        ("model.layers.[0-3", 'the "[" at character 14 is never closed'),
        ("model.layers.0-3]", 'the "]" at character 17 closes no "["'),
        ("h.[]", 'the "[" at character 3 is never closed'),
        ("h.[3-0]", 'the range "3-0" runs backwards'),
        ("h.[z-a]", '"[z-a]" is not a class of characters'),
        ("h.[0-99999999]", "more than 10000 numbers"),
        ("h.[a[b]", '"[a[b]" is not a class'),
        ("h.[!]", '"[!]" is not a class of characters'),
        ("", "The module glob is ''"),
        (7, "The module glob is 7"),
    ],
)
def test_malformed_glob_is_refused_with_its_place(glob: str, complaint: str) -> None:
    with pytest.raises(PolicyError) as error:
        Rule(glob, WINDOW)
    assert complaint in str(error.value)
    assert isinstance(error.value, ValueError)


def test_first_match_wins_and_no_match_is_none() -> None:
    keep, window = Rule("model.layers.0.*", "keep"), Rule("model.layers.*", WINDOW)  # type: ignore[arg-type]
    policy = Policy([keep, window])
    assert policy.choose("model.layers.0.self_attn") is keep
    assert keep.variant is None
    assert policy.choose("model.layers.1.self_attn") is window
    assert policy.choose("encoder.0") is None


def test_unmatched_rules_are_found() -> None:
    policy = Policy([Rule("model.*"), Rule("modle.*", WINDOW)])
    assert policy.unmatched(iter(["model.layers.0"])) == [policy.rules[1]]
    assert policy.unmatched([]) == list(policy.rules)


def test_rules_that_earlier_ones_shadow_are_found() -> None:
    here = [Subject(f"model.layers.{n}", frozenset({"self"}), "softmax", "cpu", "prefill") for n in range(4)]

    def shadowed(*rules: Rule) -> list[tuple[int, tuple[int, ...]]]:
        return Policy(rules).shadowed(here)

    some, rest = Rule("model.layers.[0-1]", "keep"), Rule("model.layers.[2-3]", WINDOW)  # type: ignore[arg-type]
    assert shadowed(Rule("model.*", WINDOW), some, rest) == [(1, (0,)), (2, (0,))]
    assert shadowed(some, rest, Rule("*.layers.*", WINDOW)) == [(2, (0, 1))]
    assert shadowed(some, Rule("model.*", WINDOW), Rule("vision.*", WINDOW)) == []
    assert shadowed(Rule("model.*", WINDOW, when="kv_len >= 9"), some) == []
    assert shadowed(Rule("model.*", WINDOW, phase="decode"), some) == []
    assert shadowed(Rule("model.*", WINDOW, phase="prefill"), Rule("model.*", None, phase="decode"), some) == [(2, (0,))]
    assert shadowed(some, rest, Rule("*", WINDOW)) == []
    assert shadowed(Rule("*", WINDOW), Rule("*", None, kind="causal"), Rule("*", WINDOW)) == [(2, (0,))]
    assert Policy([Rule(kind="self", variant=WINDOW), rest]).shadowed([Subject("model.layers.2")]) == []


def test_warnings_say_which_rule_comes_before_and_what_stays() -> None:
    sites = tuple(
        SiteReport(str(n), f"layers.{n}", "softmax", site(origin=Origin(f"layers.{n}")), "flash", None, "", True) for n in range(2)
    )
    report = Report(sites, (Missed("layers.2", "its dropout differs from call to call", "bmm"),))
    policy = Policy([Rule("layers.*", "keep"), Rule("layers.1", WINDOW), Rule("*.2", WINDOW), Rule("layer.*", WINDOW)])  # type: ignore[arg-type]
    stays, lost, behind = policy_warnings(policy, report)
    assert stays.endswith("matches only what stays as the model computes it, layers.2: its dropout differs from call to call")
    assert lost.startswith('The policy\'s rule "layer.*"')
    assert lost.endswith("matches no attention of this graph; it has: layers.0, layers.1.")
    assert behind.startswith('The policy\'s rule 2, "layers.1" -> SlidingWindow(')
    assert behind.endswith('serve no attention of this graph: rule 1, "layers.*", comes before it and matches all that it matches.')


def test_policies_are_values() -> None:
    policy = Policy([Rule("a", WINDOW)])
    assert policy == Policy((Rule("a", SlidingWindow(1024, 4)),))
    assert hash(policy) == hash(Policy([Rule("a", WINDOW)]))
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.rules = ()  # type: ignore[misc]


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    policy = Policy([Rule('quoted "path" \\ ü \x7f'), Rule("model.layers.[0-3].*", WINDOW), Rule("*", SlidingWindow(7))])
    policy.save(path)
    assert Policy.load(path) == policy
    assert Policy.load(str(path)) == policy
    assert [file.name for file in tmp_path.iterdir()] == ["policy.toml"], "no temporary file stays behind"


def test_empty_policy_round_trip(tmp_path: Path) -> None:
    Policy().save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == Policy()


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("rules = []")
    monkeypatch.setattr("os.replace", _fail)
    with pytest.raises(OSError, match="disk"):
        Policy([Rule("*")]).save(path)
    assert path.read_text() == "rules = []"
    assert len(list(tmp_path.iterdir())) == 1


def _fail(*_: object) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rules = [", "is not TOML"),
        ("rule = []", 'the key "rule" is unknown; allowed are "rules", "default", "$schema". Did you mean "rules"?'),
        ("rules = 3", '"rules" is 3; it must be tables, each under its own [[rules]].'),
        ('[[rules]]\nvariant = "keep"', 'rule 1: the key "modules" is missing'),
        ('[[rules]]\nmodules = "*"', 'rule 1: the key "variant" is missing'),
        ('[[rules]]\nmodules = "*"\nvariants = "keep"', 'rule 1: the key "variants" is unknown'),
        ('[[rules]]\nmodules = 3\nvariant = "keep"', "rule 1, modules: The module glob is 3"),
        ('[[rules]]\nmodules = "h.[0"\nvariant = "keep"', 'rule 1, modules: The module glob "h.[0" is malformed'),
        ('[[rules]]\nmodules = "*"\nvariant = 3', 'rule 1: "variant" is 3; it must be "keep" or a table'),
        (
            '[[rules]]\nmodules = "a"\nvariant = "keep"\n[[rules]]\nmodules = "*"\nvariant = "SlidingWindo"',
            'rule 2, variant.name: There is no variant "SlidingWindo"; known are',
        ),
        ('[[rules]]\nmodules = "*"\nvariant = "slidingwindow"', 'Did you mean "SlidingWindow"?'),
        (
            '[[rules]]\nmodules = "*"\nvariant = { name = "SlidingWindow", windows = 3 }',
            'SlidingWindow has no parameter "windows"; it has "window", "sinks". Did you mean "window"?',
        ),
        ('[[rules]]\nmodules = "*"\nvariant = "SlidingWindow"', 'SlidingWindow needs the parameter "window"'),
        (
            '[[rules]]\nmodules = "*"\nvariant = { name = "SlidingWindow", window = 0 }',
            "rule 1, variant.window: SlidingWindow.window is 0; it must be a whole number of at least 1.",
        ),
    ],
)
def test_mistakes_in_a_file_are_told_with_file_rule_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        Policy.load("nowhere.toml")


def test_coerce(tmp_path: Path) -> None:
    rule = Rule("*", WINDOW)
    policy = Policy([rule])
    policy.save(tmp_path / "policy.toml")
    for given in (policy, [rule], (rule,), rule, tmp_path / "policy.toml", str(tmp_path / "policy.toml")):
        assert Policy.coerce(given) == policy
    assert Policy.coerce(None) == Policy()


@pytest.mark.parametrize("given", [3, [WINDOW], [("*", WINDOW)], {"*": WINDOW}])
def test_coerce_refuses_anything_else(given: object) -> None:
    with pytest.raises(PolicyError, match=r"attnfx\.Rule"):
        Policy.coerce(given)


def test_rule_refuses_what_is_no_variant() -> None:
    with pytest.raises(PolicyError, match="must be an instance of a class"):
        Rule("*", SlidingWindow)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="'SlidingWindow'"):
        Rule("*", "SlidingWindow")  # type: ignore[arg-type]
