"""SlidingWindow: the definition, the rewritten site against the oracle, what it refuses, and its parameters."""

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants import SlidingWindow

I, J = expr.index("i"), expr.index("j")
CAUSAL = expr.le(J, I)
SIZE = sympy.Symbol("s0", integer=True, positive=True)


def _site(queries: int | sympy.Expr, keys: int | sympy.Expr, keep: Expr = expr.TRUE, **fields: object) -> AttentionSite:
    numbers = [sympy.sympify(number) for number in (2, 4, 2, queries, keys)]
    score = expr.Score() * 0.25
    return AttentionSite(*numbers, 16, 8, torch.float64, "cpu", score, keep=keep, **fields)  # type: ignore[arg-type]


def _tensors(M: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, M, 16), (2, 2, N, 16), (2, 2, N, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("variant", [SlidingWindow(1), SlidingWindow(5), SlidingWindow(5, sinks=3), SlidingWindow(999, 7)])
@pytest.mark.parametrize(("M", "N", "causal"), [(37, 37, False), (37, 37, True), (13, 37, True), (1, 37, True), (1, 37, False)])
def test_oracle_is_the_definition(variant: SlidingWindow, M: int, N: int, causal: bool) -> None:
    q, k, v = _tensors(M, N)
    out = variant.reference(q, k, v, 0.25, causal=causal)
    for b, h, i in [(0, 0, 0), (1, 3, M - 1), (1, 2, M // 2)]:
        position = i + N - M
        kept = [j for j in range(N) if (abs(position - j) < variant.window or j < variant.sinks) and not (causal and j > position)]
        weights = torch.stack([0.25 * q[b, h, i] @ k[b, h // 2, j] for j in kept]).softmax(0)
        torch.testing.assert_close(out[b, h, i], weights @ v[b, h // 2, kept])


@pytest.mark.parametrize("variant", [SlidingWindow(1), SlidingWindow(6), SlidingWindow(6, sinks=2), SlidingWindow(100)])
@pytest.mark.parametrize(("M", "N", "causal"), [(37, 37, False), (37, 37, True), (13, 37, True), (1, 37, False)])
def test_rewritten_site_means_what_the_oracle_says(variant: SlidingWindow, M: int, N: int, causal: bool) -> None:
    site = _site(M, N, expr.le(J, I + (N - M)) if causal else expr.TRUE)
    assert variant.objections(site) == ()
    q, k, v = _tensors(M, N)
    expected = variant.reference(q, k, v, 0.25, causal=causal)
    torch.testing.assert_close(variant.apply(site).reference(q, k, v), expected)


def test_the_models_own_mask_still_holds() -> None:
    padding = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) < 0.7
    padding[:, 0] = True
    load = expr.Load(0, (expr.index("b"), J), torch.bool)
    side = (SideTensor((sympy.Integer(2), sympy.Integer(37)), torch.bool),)
    site = _site(37, 37, expr.logical_and(CAUSAL, load), side=side)
    variant = SlidingWindow(8, sinks=1)
    assert variant.objections(site) == ()
    q, k, v = _tensors(37, 37)
    expected = variant.reference(q, k, v, 0.25, causal=True, keep=padding[:, None, None, :])
    torch.testing.assert_close(variant.apply(site).reference(q, k, v, padding), expected)


def test_window_follows_the_diagonal_of_the_mask_not_the_sizes() -> None:
    """A causal mask whose first query stands at the first key, though there are more keys than queries."""
    site = _site(13, 37, CAUSAL)
    facts = SlidingWindow(4).apply(site).facts
    assert (facts.delta_low, facts.delta_high, facts.nonempty) == ((0,), (3,), True)


@pytest.mark.parametrize("length", [37, SIZE])
def test_the_window_is_proved_so_that_blocks_outside_it_are_skipped(length: int | sympy.Expr) -> None:
    known = {"ranges_low": ((SIZE, sympy.Integer(2)),)}
    facts = SlidingWindow(5).apply(_site(length, length, CAUSAL, **known)).facts
    assert (facts.delta_low, facts.delta_high, facts.rest, facts.nonempty) == ((0,), (4,), (), True)
    centred = SlidingWindow(5).apply(_site(length, length, **known)).facts
    assert (centred.delta_low, centred.delta_high, centred.rest, centred.nonempty) == ((-4,), (4,), (), True)


def test_nothing_but_the_mask_changes() -> None:
    sink = expr.Load(0, (expr.index("h"),), torch.float64)
    side = (SideTensor((sympy.Integer(4),), torch.float64),)
    site = _site(37, 37, CAUSAL, fill=-1e9, dropout=0.1, sink=sink, weight=sink * 0.5, side=side)
    changed = SlidingWindow(5).apply(site)
    assert changed != site
    assert changed.replace(keep=site.keep) == site


def test_cross_attention_is_refused_with_its_sizes() -> None:
    (sentence,) = SlidingWindow(5).objections(_site(13, 37))
    assert "13 queries and 37 keys" in sentence
    assert "cross-attention" in sentence


def test_single_query_at_an_unknown_position_is_refused() -> None:
    load = expr.Load(0, (expr.index("b"), J), torch.bool)
    (sentence,) = SlidingWindow(5).objections(_site(1, 37, load))
    assert "single query" in sentence


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"window": 0}, "SlidingWindow.window is 0; it must be a whole number of at least 1."),
        ({"window": 2.5}, "SlidingWindow.window is 2.5"),
        ({"window": True}, "SlidingWindow.window is True"),
        ({"window": 4, "sinks": -1}, "SlidingWindow.sinks is -1; it must be a whole number of at least 0."),
    ],
)
def test_parameters_are_checked(parameters: dict[str, int], complaint: str) -> None:
    with pytest.raises(PolicyError) as error:
        SlidingWindow(**parameters)
    assert complaint in str(error.value)
