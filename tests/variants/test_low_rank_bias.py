"""LowRankBias in models: what it computes, what it reads and refuses, and that changed values are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from watched import Watched

import attnfx
from attnfx import expr
from attnfx.biases.beside import Beside, Exact
from attnfx.biases.low_rank import low_rank
from attnfx.errors import PolicyError
from attnfx.graphs import buffer_guard
from attnfx.report import Report
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants import LowRankBias

SIZES = (7, 5)
N = SIZES[0] * SIZES[1]


def table(heads: int, spread: float = 60.0) -> Tensor:
    """(13 * 9, heads): a smooth bias of a window's relative positions."""
    x, y = (torch.arange(1 - n, n, dtype=torch.float64) for n in SIZES)
    squared = x[:, None].square() + y.square()
    return torch.stack([3 * torch.exp(-squared / (spread * (h + 1))) for h in range(heads)], -1).flatten(0, 1)


def places() -> Tensor:
    """(N, N): where the table has the bias of two tokens."""
    x, y = (place.flatten() for place in torch.meshgrid(*map(torch.arange, SIZES), indexing="ij"))
    rows, columns = (p[:, None] - p + n - 1 for p, n in ((x, SIZES[0]), (y, SIZES[1])))
    return rows * (2 * SIZES[1] - 1) + columns


class Window(nn.Module):
    """Swin's attention in windows of 7 x 5 tokens, heads of 8; ``masks`` windows of an image have a mask of their own."""

    def __init__(self, heads: int = 4, key_heads: int = 4, masks: int = 0, trained: bool = False) -> None:
        super().__init__()
        self.heads, self.key_heads, self.masks = heads, key_heads, masks
        self.q, self.kv = nn.Linear(8, heads * 8), nn.Linear(8, 2 * key_heads * 8)
        self.table = nn.Parameter(table(heads).float(), requires_grad=trained)
        self.register_buffer("index", places())
        mask = torch.zeros(masks, N, N)
        for w in range(1, masks):
            mask[w, : w + 3, w + 3 :] = mask[w, w + 3 :, : w + 3] = -100.0
        self.register_buffer("mask", mask)

    def bias(self) -> Tensor:
        return self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.key_heads, 8)).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        return (q * 8**-0.5) @ k.mT, v

    def forward(self, x: Tensor) -> Tensor:
        z, v = self.scores(x)
        z = z + self.bias()[None]
        if self.masks:
            z = (z.view(-1, self.masks, *z.shape[1:]) + self.mask[None, :, None]).view(z.shape)
        return (z.softmax(-1) @ v).transpose(1, 2).flatten(2)


def model(dtype: torch.dtype = torch.float32, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Window(**sizes)).to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32, windows: int = 4) -> Tensor:
    return torch.randn(windows, N, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(m: nn.Module, variant: LowRankBias, *args: Tensor, glob: str = "0", **options: Any) -> tuple[Tensor, Report]:
    """What the compiled model gives without gradients, and the report of its only compile."""
    torch._dynamo.reset()
    reports: list[Report] = []
    token = attnfx.backend.listeners.set((reports.append,))
    given = {"inner": "eager", "strict": True, "policy": [attnfx.Rule(glob, variant)], **options}
    try:
        with torch.no_grad():
            out = torch.compile(m, backend=attnfx.backend.attnfx, options=given)(*args)
    finally:
        attnfx.backend.listeners.reset(token)
    (report,) = reports
    return out, report


@torch.no_grad()
def expected(m: nn.Module, variant: LowRankBias, x: Tensor) -> Tensor:
    """The definition, in float64."""
    m = m.double()
    (w,) = m
    assert isinstance(w, Window)
    q = w.q(x.double()).unflatten(-1, (w.heads, 8)).transpose(1, 2)
    k, v = w.kv(x.double()).unflatten(-1, (2, w.key_heads, 8)).permute(2, 0, 3, 1, 4)
    keep = (w.mask == 0).repeat(len(x) // w.masks, 1, 1)[:, None] if w.masks else None
    return variant.reference(q, k, v, 8**-0.5, keep=keep, bias=w.bias()).transpose(1, 2).flatten(2)


WAYS = {"products": 3, "columns": 12}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masks", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_it_is_the_definition(way: str, masks: int, dtype: torch.dtype) -> None:
    m, x, variant = model(dtype, masks=masks), inputs(dtype), LowRankBias(rank=WAYS[way], tolerance=0)
    out, report = run(m, variant, x)
    (site,) = report.sites
    assert (site.exact, site.variant, site.decision) == (False, variant, "portable")
    assert way in site.biases[0]
    assert f"rank of each head {', '.join([str(WAYS[way])] * 4)}" in site.biases[0]
    assert ("-100" in str(site.site)) == bool(masks) or site.site.side, "the shift mask stays"
    want, eager = expected(m, variant, x), model(dtype, masks=masks)(x).double()
    assert out.dtype == dtype
    exact = model(masks=masks).double()(x.double())
    bound = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 1.5 * float((eager - exact).norm()))
    assert float((out.double() - want).norm()) <= max(bound, 1e-6) * (1 if dtype.itemsize < 4 else float(want.norm()))


def test_query_heads_that_share_keys() -> None:
    m, x = model(heads=6, key_heads=2), inputs()
    for rank in WAYS.values():
        out, report = run(m, LowRankBias(rank=rank), x)
        assert "rank of each key head" in report.sites[0].biases[0]
        assert (report.sites[0].site.heads, report.sites[0].site.key_heads) == (6, 2)
        errors = report.sites[0].biases[0].partition("error of each head ")[2].partition(", row")[0]
        assert len(errors.split(", ")) == 6
        torch.testing.assert_close(out, model(heads=6, key_heads=2)(x), rtol=0, atol=2 * max(map(float, errors.split(", "))))


def low(m: nn.Module, *ranks: int) -> nn.Module:
    """The model with biases of the given ranks, row means apart: waves of one direction."""
    y = torch.arange(1 - SIZES[1], SIZES[1])
    waves = [torch.zeros(9), (0.7 * y).cos(), (0.7 * y).cos() + 0.1 * y * y]
    with torch.no_grad():
        for head, rank in enumerate(ranks):
            m[0].table[:, head] = waves[rank // 2].repeat(2 * SIZES[0] - 1)
    return m


def test_the_least_rank_of_each_head_within_the_tolerance() -> None:
    m, x = low(model(), 0, 2, 0, 2), inputs()
    out, report = run(m, LowRankBias(), x)
    assert "rank of each head 0, 2, 0, 2" in report.sites[0].biases[0]
    assert not report.sites[0].exact
    torch.testing.assert_close(out, m(x), rtol=0, atol=1e-5)
    assert report.sites[0].buffers == ("0.index", "0.table")


def test_a_bias_of_a_rank_that_does_not_pay_stays_exact() -> None:
    m, x = model(), inputs()
    with torch.no_grad():
        m[0].table.copy_(table(4, spread=1.0))
    out, report = run(m, LowRankBias(), x)
    (site,) = report.sites
    assert site.exact
    assert site.variant is None
    assert "LowRankBias leaves it exact: the bias as it is costs " in site.reason
    assert "ranks would cost more; with so many the errors of these heads are above 0.001: 0 (" in site.reason
    torch.testing.assert_close(out, m(x), rtol=0, atol=1e-6)


def test_what_all_keys_share_is_left_out_and_a_mask_in_the_bias_stays() -> None:
    m, x = model(), inputs()
    with torch.no_grad():
        m[0].table.fill_(12.0)
    out, report = run(m, LowRankBias(), x)
    assert "left out; rank of each head 0, 0, 0, 0" in report.sites[0].biases[0]
    torch.testing.assert_close(out, m(x), rtol=0, atol=1e-5)
    with torch.no_grad():
        m[0].table[3:5] = -1e9
    out, report = run(m, LowRankBias(rank=9), x)
    assert "a mask, which stays exact" in report.sites[0].reason
    torch.testing.assert_close(out, m(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_changed_values_are_noticed() -> None:
    m, x = low(model(), 2, 2, 2, 2), inputs()
    watched = Watched(m, policy=[attnfx.Rule("0", LowRankBias())])
    assert [watched(x), watched(x)] == [1, 1]
    m[0].table[:, 1] *= 1.5
    assert [watched(x), watched(x)] == [2, 2]
    assert "rank of each head 2, 2, 2, 2" in watched.reports[1].sites[0].biases[0]
    m[0].table.copy_(m[0].table.clone())
    assert watched(x) == 2, "the same values are no change"
    low(m, 0, 0, 0, 0)
    assert watched(x) == 3
    m[0].index.copy_(m[0].index.flip(0))
    assert watched(x) == 4


@torch.no_grad()
def test_values_that_change_with_every_call_are_left_alone() -> None:
    m, x = low(model(), 2, 2, 2, 2), inputs()
    watched = Watched(m, policy=[attnfx.Rule("0", LowRankBias())])
    for _ in range(buffer_guard.MOST_STRUCTURES + 3):
        watched(x)
        m[0].table *= 1.01
    assert len(watched.reports) == buffer_guard.MOST_STRUCTURES + 1
    assert "0.table has changed too often" in watched.reports[-1].sites[0].reason
    assert [r.sites[0].exact for r in watched.reports] == [False] * buffer_guard.MOST_STRUCTURES + [True]


def refusal(m: nn.Module, *args: Tensor, variant: LowRankBias | None = None, glob: str = "0", **options: Any) -> str:
    """The objection, which a rule for everything does not raise."""
    variant = variant or LowRankBias(rank=2)
    with pytest.raises(Exception, match="LowRankBias cannot serve") as raised:
        run(m, variant, *args, glob=glob, **options)
    _, report = run(m, variant, *args, glob="*", **options)
    assert report.sites[0].exact
    assert "LowRankBias objects" in report.sites[0].reason
    return str(raised.value)


class Given(nn.Module):
    """The bias is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Added()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.attention(x, bias)  # type: ignore[no-any-return]


class Added(Window):
    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        z, v = self.scores(x)
        return ((z + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_refusals() -> None:
    x = inputs()
    assert "is an input of the call" in refusal(Given(), x, torch.randn(4, N, N), glob="attention")
    assert "may not be read" in refusal(model(), x, buffers="ignore")
    assert "The rank is 400; a site like this takes at most 32." in refusal(model(), x, variant=LowRankBias(rank=400))
    assert "is added to its scores" in refusal(nn.Sequential(Added()), x)


def test_a_trained_bias_is_refused_and_a_frozen_one_lets_gradients_through() -> None:
    x, rule = inputs().requires_grad_(), [attnfx.Rule("0", LowRankBias(rank=12))]
    options = {"inner": "eager", "strict": True, "policy": rule}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a gradient of it is wanted"):
        torch.compile(model(trained=True), backend=attnfx.backend.attnfx, options=options)(x)
    m = model()
    torch._dynamo.reset()
    got = torch.autograd.grad(
        torch.compile(m, backend=attnfx.backend.attnfx, options=options)(x).square().sum(), [x, m[0].q.weight]
    )
    for a, b in zip(got, torch.autograd.grad(m(x).square().sum(), [x, m[0].q.weight]), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


def test_compiled_code_in_a_cache_holds_no_factors() -> None:
    x = inputs()
    for scale in (1.0, -2.0):
        m = low(model(), 2, 2, 2, 2)
        with torch.no_grad():
            m[0].table *= scale
        out, report = run(m, LowRankBias(), x, inner="inductor")
        assert not report.sites[0].exact
        torch.testing.assert_close(out, m(x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_any_number_of_windows_runs_the_same_graph() -> None:
    m = low(model(masks=2), 2, 2, 2, 2)
    for variant in (LowRankBias(), LowRankBias(rank=12, tolerance=0)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = attnfx.compile(m, [attnfx.Rule("0", variant)], strict=True, inner="eager")
        for windows in (4, 6, 10):
            x = inputs(windows=windows)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), m(x), rtol=0, atol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_verification_measures_it_and_the_report_has_each_layer() -> None:
    m = nn.Sequential(*(Window(heads=1, key_heads=1) for _ in range(2)), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        m[1].table *= 0.5
    found = attnfx.verify(m, inputs(), policy=[attnfx.Rule("[0-1]", LowRankBias(rank=2))])
    assert 1e-5 < found.worst < 0.1
    assert all(1e-6 < measured.error < 0.1 and measured.bound is None for measured in found.sites.values())
    assert " ".join(str(found.report).split()).count("largest error of each head") == 2


def test_a_bias_larger_than_the_caches_may_have_more_ranks() -> None:
    """Rank 20 is 64 columns: more than reading a small bias costs, and less than reading one from memory."""
    for size, pays in ((1500, False), (3000, True)):
        at = torch.arange(size) * (2 * torch.pi / size)
        bias = sum((f * (at[:, None] - at)).cos() for f in range(1, 11))[None]
        numbers = [sympy.Integer(n) for n in (2, 1, 1, size, size)]
        score = expr.Score() * 0.125 + expr.Load(0, tuple(map(expr.index, "hij")), torch.float32)
        side = (SideTensor((numbers[2], *numbers[3:]), torch.float32),)
        site = AttentionSite(*numbers, 64, 64, torch.bfloat16, "cpu", score, side=side)  # type: ignore[arg-type]
        found = low_rank(site, LowRankBias(tolerance=1e-2), lambda _, bias=bias: bias)  # type: ignore[misc]
        assert isinstance(found, Beside if pays else Exact), found
        if isinstance(found, Beside):
            assert (found.site.head_dim, found.site.side) == (128, ())
            assert "rank of each head 20; " in found.notes[0]


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 2.5}, {"tolerance": -1.0}, {"tolerance": float("inf")}, {"tolerance": "1"}]
)
def test_parameters_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"LowRankBias.{next(iter(wrong))} is "):
        LowRankBias(**wrong)
