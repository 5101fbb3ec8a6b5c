"""The generated source is what was reviewed; with ATTNFX_REFRESH_GOLDEN=1 these tests write it anew, to be read again."""

import math
import os
import re
from pathlib import Path

import pytest
import sympy
import torch
from lowering_sites import (
    HEADS,
    KEYS,
    SCALED,
    B,
    H,
    I,
    J,
    alibi,
    causal,
    examples,
    load,
    side,
    site,
    softcap,
    t5,
    window,
)  # fmt: skip
from sink_cases import examples as sink_examples

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Max, Min, PythonMod
from attnfx.expr import Int
from attnfx.lowering import codegen, handed
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite

GOLDEN = Path(__file__).parent / "golden"
S0, S1 = sympy.symbols("s0 s1", integer=True, positive=True)
REVIEWED = {
    "causal": site(keep=causal(S1 - S0), queries=S0, keys=S1),
    "window": site(keep=window(7)),
    "padding": site(keep=expr.logical_and(causal(), load(0, B, J, dtype=torch.bool)), side=(side(2, KEYS, dtype=torch.bool),)),
    "alibi": site(alibi(), causal(), side=(side(HEADS),)),
    "softcap": site(softcap(), causal()),
    "t5": site(t5(), side=(side(32, HEADS, grad=True),)),
    "weight": site(
        keep=causal(),
        weight=load(0, B, J, dtype=torch.bfloat16) * load(1, H),
        sink=load(1, H),
        side=(side(2, KEYS, dtype=torch.bfloat16), side(HEADS, grad=True)),
    ),
    "bias": site(
        SCALED + expr.cast(load(0, H, I, J, dtype=torch.bfloat16), torch.float32),
        side=(side(HEADS, 37, KEYS, dtype=torch.bfloat16),),
    ),
}


def source(s: AttentionSite) -> str:
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan), plan
    return codegen.source(plan)


@pytest.mark.parametrize("name", REVIEWED)
def test_source_is_what_was_reviewed(name: str) -> None:
    path, text = GOLDEN / f"{name}.py", source(REVIEWED[name])
    if os.environ.get("ATTNFX_REFRESH_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("example", [*examples(), *sink_examples()], ids=lambda e: e.name)
def test_every_source_is_python(example: object) -> None:
    compile(source(example.site), "generated", "exec")  # type: ignore[attr-defined]


def test_sizes_do_not_reach_the_source() -> None:
    assert source(site(keep=causal())) == source(site(keep=causal(), queries=100, keys=100, batch=7))


def test_division_that_may_be_negative_is_floored() -> None:
    blocks = expr.eq(Int(FloorDiv(I.value - J.value, 4)), Int(PythonMod(J.value - I.value, 3)))
    text = source(site(keep=blocks))
    assert "floor_divide(i - j, 4)" in text
    assert "floor_modulo(" in text


def test_division_that_is_not_negative_is_plain() -> None:
    blocks = expr.eq(Int(FloorDiv(I.value, 4)), Int(FloorDiv(J.value, 4)))
    assert "(i // 4) == (j // 4)" in source(site(keep=blocks))


def test_the_larger_of_sizes() -> None:
    text = source(site(keep=causal(Max(S1 - S0, Min(S0, 7), 0)), queries=S0, keys=S1))
    assert "i_last + tl.maximum(tl.maximum(0, tl.minimum(7, ints[0])), ints[1] - ints[0])" in text


def test_products_of_sizes_are_wide() -> None:
    index = Int(I.value * S1 + J.value)
    text = source(site(SCALED + load(0, index), queries=S0, keys=S1, side=(side(S0 * S1),)))
    assert re.search(r"tl\.cast\(i, tl\.int64\) \* tl\.cast\(ints\[\d\], tl\.int64\)", text)
    inside = source(site(keep=expr.le(J, Int(FloorDiv(S0 * S1 + I.value, 7))), queries=S0, keys=S1))
    assert "tl.cast(ints[0], tl.int64) * tl.cast(ints[1], tl.int64)" in inside


def test_a_mask_in_the_bias_keeps_its_finfo_min() -> None:
    assert "to_base_2(" in source(site(SCALED + load(0, B, I, J), side=(side(2, 37, KEYS),)))
    assert "to_base_2(" not in source(site(alibi(), side=(side(HEADS),)))


def test_what_cannot_be_printed_is_refused() -> None:
    score = SCALED + expr.call("pow", load(0, J), load(0, J))
    found = make_plan(site(score, side=(side(KEYS),)), "flash")
    assert isinstance(found, tuple)
    assert "exponent" in found[0]


def test_modules_are_written_once_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    plan = make_plan(site(keep=causal(-3), score=0.625 * expr.Score()), "flash")
    assert isinstance(plan, KernelPlan)
    codegen.program_of.cache_clear()
    first = codegen.program(plan)
    (file,) = tmp_path.glob("*.py")
    assert file.read_text(encoding="utf-8") == codegen.source(plan)
    assert codegen.program(plan) is first


def test_tables_of_distances_are_given_from_their_middle_in_base_2() -> None:
    plan = make_plan(REVIEWED["t5"], "flash")
    assert isinstance(plan, KernelPlan)
    queries, keys = int(plan.site.queries), int(plan.site.keys)
    # a compiler may leave gaps between the rows of what it makes
    table = torch.randn(int(plan.site.heads), queries + keys + 20)[:, : queries + keys - 1]
    loads = [torch.randn(32, int(plan.site.heads)), table]
    (given,) = handed.pointers(plan, keys, loads)
    strides = handed.ints(plan, plan.values((), keys, loads), (given,))[-2:]
    assert strides == given.stride()
    assert torch.allclose(given[:, 0], table[:, keys - 1] * math.log2(math.e))


@pytest.mark.parametrize(
    ("score", "slope", "factor"),
    [
        (0.625 * expr.Score(), 0.625, 0.625 * math.log2(math.e)),
        (expr.Score(), 1.0, math.log2(math.e)),
        (expr.div(expr.Score(), expr.lift(8.0)) * 2.0, 0.25, 0.25 * math.log2(math.e)),
        (-0.5 * expr.Score(), -0.5, None),  # the largest dot is the smallest logit
        (alibi(), 0.25, None),
        (softcap(), None, None),
    ],
    ids=("scaled", "plain", "divided", "negative", "alibi", "softcap"),
)
def test_a_factor_is_known_where_it_is_all_of_the_score(score: expr.Expr, slope: float | None, factor: float | None) -> None:
    plan = make_plan(site(score, causal(), side=(side(HEADS),)), "flash")
    assert isinstance(plan, KernelPlan), plan
    program = codegen.program(plan)
    assert program.slope == slope
    assert program.factor == (None if factor is None else pytest.approx(factor, rel=1e-15))
