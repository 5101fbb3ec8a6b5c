"""Rules: what each selector selects, preferences and heads, defaults, policies over policies, presets; and what decides by them."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest
import sympy
from test_site import CAUSAL, site

from attnfx import variants
from attnfx.decide import decide
from attnfx.errors import Objection, PolicyError
from attnfx.options import Options
from attnfx.policies.globs import Glob
from attnfx.policies.presets import presets
from attnfx.policies.rule import Subject
from attnfx.policy import Policy, Rule
from attnfx.site import Origin
from attnfx.variants import AShape, NeighborhoodAttention, PerHead, SlidingWindow

AT = "model.layers.3.self_attn"
WINDOW = SlidingWindow(window=2)
SQUARE = {"queries": sympy.Integer(7)}


@pytest.mark.parametrize(
    ("selectors", "matches"),
    [
        ({"layers": "0-3,8"}, True),
        ({"layers": 3}, True),
        ({"layers": "2-"}, True),
        ({"layers": "4-"}, False),
        ({"layers": "0-2, 4"}, False),
        ({"layers": "3", "modules": "encoder.*"}, False),
        ({"kind": "causal"}, True),
        ({"kind": ["cross", "self"]}, True),
        ({"kind": "linear"}, False),
        ({"pattern": "softmax"}, True),
        ({"pattern": ("flex_attention", "linear")}, False),
        ({"device": "cpu"}, True),
        ({"device": "cuda"}, False),
        ({"modules": "re:model\\.layers\\.[0-9]+\\.self_attn"}, True),
        ({"modules": "re:layers"}, False),
    ],
)
def test_selectors(selectors: dict[str, Any], matches: bool) -> None:
    subject = Subject(AT, frozenset({"self", "causal"}), "softmax", "cpu")
    assert Rule(**selectors).matches(subject) is matches


def test_layers_are_the_first_number_of_a_path() -> None:
    rule = Rule(layers="1")
    assert [rule.matches(path) for path in ("h.1.attn", "layers.1.blocks.0.attn", "layers.0.blocks.1.attn", "attn", "h1.attn")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_phases_may_be_several() -> None:
    rule = Rule(phase=["prefill", "decode"])  # type: ignore[arg-type]
    assert [rule.serves(AT, phase, {}) for phase in ("training", "prefill", "decode")] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"layers": "a"}, "The layers are 'a': \"a\" is neither a number nor a range"),
        ({"layers": True}, "they must be text or one number"),
        ({"layers": "1-2-3"}, "is neither"),
        ({"kind": "selfe"}, 'Did you mean "self"'),
        ({"kind": []}, "The kind is an empty list"),
        ({"pattern": 3}, "The pattern is 3; known are"),
        ({"variant": [WINDOW, [WINDOW]]}, "holds another list"),
        ({"variant": ["keep", WINDOW]}, "before its end"),
        ({"variant": [WINDOW, "kepp"]}, "must be an instance"),
        ({"variant": WINDOW, "heads": "3-"}, "has no end"),
        ({"variant": WINDOW, "heads": "0,0"}, "names head 0 twice"),
        ({"variant": PerHead((("0", WINDOW),)), "heads": "1"}, "a variant other than"),
        ({"variant": variants.NeuralBias("x"), "heads": "1"}, "a variant other than"),
        ({"heads": "1"}, "all heads are kept"),
        ({"modules": "re:a**"}, 'the "\\*" at character 3 repeats nothing'),
        ({"modules": "re:^a"}, "the whole path has to match"),
        ({"modules": "re:a(?=b)"}, 'begins with "\\(\\?"'),
        ({"modules": "re:(a)\\1"}, "is not supported"),
        ({"modules": "re:a{3,2}"}, "must rise"),
        ({"modules": "re:[z-a]"}, "is not a class"),
        ({"modules": "re:a)"}, 'closes no "\\("'),
    ],
)
def test_what_rules_refuse(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Rule(**given)


def test_regular_expressions_mean_what_pythons_mean() -> None:
    draw = random.Random(0)

    def expression(depth: int) -> str:
        atoms = ["a", "b", ".", "[ab]", "[^a]", "\\w", "\\."]
        kind = draw.randrange(4) if depth else 0
        if kind == 0:
            return draw.choice(atoms)
        if kind == 1:
            return expression(depth - 1) + expression(depth - 1)
        if kind == 2:
            return f"({expression(depth - 1)}|{expression(depth - 1)})"
        return f"(?:{expression(depth - 1)}){draw.choice(['*', '+', '?', '{2}', '{1,2}', '{2,}', '{0}'])}"

    matched = 0
    for _ in range(300):
        text = expression(4)
        glob = Glob(f"re:{text}")
        for path in ("".join(draw.choice("ab.") for _ in range(draw.randrange(7))) for _ in range(8)):
            want = re.fullmatch(text, path) is not None
            assert glob.matches(path) is want, (text, path)
            matched += want
    assert matched > 200


@pytest.mark.parametrize("pattern", ["re:(a+)+b", "re:" + "(a|a)*" * 60 + "b", "re:" + ".*" * 200 + "b", "*a" * 300 + "b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    begin = time.process_time()
    assert not Glob(pattern).matches("a" * 300)
    assert time.process_time() - begin < 1


def test_the_first_variant_without_an_objection_runs() -> None:
    cross = site(origin=Origin(AT))
    chosen = decide(cross, Policy([Rule("model.*", (WINDOW, variants.AffineScaled(0.5)))]))
    assert chosen.variant == variants.AffineScaled(0.5)
    assert chosen.reason.startswith("SlidingWindow objects: ")
    kept = decide(cross, Policy([Rule("model.*", (WINDOW, AShape(), None))]))
    assert kept.exact
    assert kept.reason.startswith("SlidingWindow objects: ")
    assert "AShape objects: " in kept.reason
    with pytest.raises(Objection, match="SlidingWindow, AShape cannot serve"):
        decide(cross, Policy([Rule("model.*", (WINDOW, AShape()))]))
    assert decide(cross, Policy([Rule(layers="3", variant=(WINDOW, AShape()))])).exact, "a rule for any module is a wish"


def test_heads_have_the_variant_and_others_stay_exact() -> None:
    at = site(keep=CAUSAL, origin=Origin(AT), key_heads=sympy.Integer(4), **SQUARE)
    chosen = decide(at, Policy([Rule(heads="1, 3", variant=WINDOW)]))
    assert chosen.variant == PerHead((("1,3", WINDOW),))
    with pytest.raises(Objection, match="name head 9; the site has 4 heads"):
        decide(at, Policy([Rule("model.*", heads="9", variant=WINDOW)]))


def test_kinds_of_sites_decide() -> None:
    causal = site(keep=CAUSAL, origin=Origin(AT, relation="self"), **SQUARE)
    cross, one = site(origin=Origin(AT, relation="cross"), **SQUARE), site(queries=sympy.Integer(1))
    for at, kinds in ((causal, {"causal", "self"}), (cross, {"cross"}), (one, {"decode"})):
        found = {
            kind
            for kind in ("self", "cross", "causal", "decode", "linear")
            if not decide(at, Policy([Rule(kind=kind, variant=WINDOW)])).reason.startswith("plain")
        }
        assert found == kinds


def test_a_default_stands_behind_all_rules() -> None:
    policy = Policy([Rule("a", None)], default=WINDOW)
    assert [rule and rule.variant for rule in (policy.choose("a"), policy.choose("b"))] == [None, WINDOW]
    assert policy.unmatched(["a"]) == []
    assert policy.changes_results
    assert not Policy([Rule("a")], default="keep").changes_results
    with pytest.raises(PolicyError, match="is for every attention"):
        Policy(default=Rule("a"))


def test_a_policy_over_another() -> None:
    base, override = Policy([Rule("a", WINDOW)], default=AShape()), Policy([Rule("*b", None)])
    assert (base | override).rules == (*override.rules, *base.rules)
    assert (base | override).default == base.default
    assert (base | Policy(default="keep")).choose("x") == Rule("*", None)
    assert not any((one.policy | Policy.preset("exact")).choose("x").variant for one in presets().values())  # type: ignore[union-attr]


def test_rules_that_could_not_match_are_no_mistakes() -> None:
    here = [Subject("h.0", frozenset({"self"}), "softmax", "cpu", "decode")]
    policy = Policy(
        [Rule("h.1", None), Rule(layers="7"), Rule(kind="cross", variant=WINDOW), Rule(kind="cross"), Rule("x", phase="training")]
    )
    assert policy.unmatched(here) == list(policy.rules[:3])


def test_presets_by_name() -> None:
    assert set(presets()) == {"exact", "streaming", "long-prefill", "vision-neighborhood"}
    assert Options.parse(None, {"policy": "streaming"}).policy == Policy.preset("streaming")
    with pytest.raises(PolicyError, match=r'no preset "steaming"; known are .* Did you mean "streaming"'):
        Policy.coerce("steaming")


def test_what_presets_choose() -> None:
    def chosen(preset: str, **changes: Any) -> object:
        return decide(site(**changes), Policy.preset(preset)).variant

    known, few = Origin("layers.5.attn", relation="self"), Origin("layers.0.attn", relation="self")
    long = {"queries": sympy.Integer(9000), "keys": sympy.Integer(9000), "keep": CAUSAL}
    assert chosen("streaming", origin=known, **long) == SlidingWindow(2048, 4)
    assert chosen("streaming", origin=Origin("x", relation="cross"), queries=sympy.Integer(1)) is None
    assert isinstance(chosen("long-prefill", origin=known, **long), variants.BlockTopK)
    assert chosen("long-prefill", origin=few, **long) is None
    image = {"queries": sympy.Integer(197), "keys": sympy.Integer(197), "origin": known}
    assert chosen("vision-neighborhood", **image) == NeighborhoodAttention((14, 14), 7, extra=1, extra_first=True)
    assert chosen("vision-neighborhood", **image, keep=CAUSAL) is None
    assert chosen("exact", origin=known, **long) is None
