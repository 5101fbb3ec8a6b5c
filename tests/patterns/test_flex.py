"""flex_attention calls: every score_mod and mask_mod against plain broadcasting in float64, block tables, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graphs import assert_same, compiled, dynamo_graph
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

from attnfx.backend import rewrite
from attnfx.options import Options

B, H, HK, M, N, D, DV = 2, 4, 2, 23, 37, 8, 5
BLOCK = 16  # neither length is a multiple
Mod = Callable[..., Tensor]

torch.manual_seed(0)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.randn(H, M + N)
BUCKETS = torch.randn(8, H)
DOCUMENTS = torch.randint(0, 3, (B, N)).sort(-1).values
LENGTHS = torch.tensor([N, 9])
PREFIX = torch.tensor([4, 11])


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i - j < 7


def documents(b: Any, h: Any, i: Any, j: Any) -> Any:
    return DOCUMENTS[b, i] == DOCUMENTS[b, j]


def padding(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j < LENGTHS[b]


def prefix(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j < PREFIX[b]


def natten(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Neighbours of a 2-D grid of width 6, three rows and three columns around each."""
    return ((i // 6 - j // 6).abs() <= 1) & ((i % 6 - j % 6).abs() <= 1)


def never(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= 5) & (j <= i)  # the first queries have no key


def alibi(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + SLOPES[h] * (j - i)


def softcap(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 3.0 * torch.tanh(s / 3.0)


def relative(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + TABLE[h, i - j + N - 1]


def t5(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    distance = torch.clamp(i - j, min=0)
    far = 2 + (torch.log(distance.float() / 2 + 1e-6) * 2).long()
    return s + BUCKETS[torch.where(distance < 2, distance, torch.clamp(far, max=7)), h]


def masked(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return torch.where(j <= i, s * 2.0, -float("inf"))


def smoothed(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + torch.nn.functional.softplus(SLOPES)[h]  # no formula, but computed from a whole tensor only


def reference(q: Tensor, k: Tensor, v: Tensor, score: Mod | None, mask: Mod | None, listed: Tensor | None = None) -> Tensor:
    """Plain broadcasting over (B, H, M, N); queries without keys give zero."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    b, h, i, j = (torch.arange(n).view(shape) for n, shape in
                  ((q.shape[0], (-1, 1, 1, 1)), (q.shape[1], (-1, 1, 1)), (q.shape[2], (-1, 1)), (k.shape[2], (-1,))))  # fmt: skip
    z = q @ k.mT * q.shape[-1] ** -0.5
    z = z if score is None else score(z, b, h, i, j)
    if mask is not None:
        z = z.masked_fill(~torch.as_tensor(mask(b, h, i, j)), -torch.inf)
    if listed is not None:
        z = z.masked_fill(~listed, -torch.inf)
    return torch.nan_to_num(z.softmax(-1)) @ v


def operands(dtype: torch.dtype = torch.float32, m: int = M) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(s).to(dtype) for s in ((B, H, m, D), (B, HK, N, D), (B, HK, N, DV))]


@dataclass(frozen=True)
class Call:
    """A score_mod, a mask_mod, and what the site must show of them."""

    score: Mod | None = None
    mask: Mod | None = None
    formula: str = "full"
    inside: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, table: BlockMask | None = None) -> Tensor:
        if self.mask is not None and table is None:
            table = create_block_mask(self.mask, B, H, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=BLOCK)
        return flex_attention(q, k, v, self.score, table, enable_gqa=True)


CALLS = {
    "plain": Call(formula="softmax((q·k)·0.353553 | full)"),
    "alibi": Call(alibi, causal, "| causal)"),
    "softcap": Call(softcap, formula="tanh"),
    "relative": Call(relative, formula="i + 36 - j]"),
    "t5": Call(t5, formula="log"),
    "masked score": Call(masked, formula="| causal)"),
    "computed once": Call(smoothed, formula="+ T0["),
    "causal": Call(None, causal, "softmax((q·k)·0.353553 | causal)"),
    "window": Call(None, and_masks(causal, window), "| causal ∧ i - j ≤ 6)"),
    "prefix": Call(None, or_masks(causal, prefix), "∨"),
    "documents": Call(None, and_masks(causal, documents), "| causal ∧ T0[b, i] = T0[b, j])"),
    "padding": Call(None, padding, "T0[b]"),
    "natten": Call(None, natten, "| "),
    "no keys": Call(None, never, "| causal ∧ 6 ≤ i + 1)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_with_the_table_built_in_the_graph(name: str) -> None:
    call = CALLS[name]
    given = operands()
    got, report = compiled(call, *given)
    (site,) = report.sites
    assert not report.missed
    assert call.formula in str(site.site)
    assert f"//{BLOCK}" not in str(site.site), "the table says no more than mask_mod, which the graph shows"
    assert_same(got, reference(*(t.double() for t in given), call.score, call.mask))


def test_a_call_equals_torchs_own_operator_in_double_precision() -> None:
    seen: list[torch.fx.GraphModule] = []

    def compare(graph: torch.fx.GraphModule, inputs: Any) -> Mod:
        work, report = rewrite(graph, Options(strict=True))
        assert len(report.sites) == 1
        seen.append(work)

        def run(*given: Any) -> Any:
            want = graph(*given)
            torch.testing.assert_close(work(*given), want, rtol=1e-11, atol=1e-11)
            return want

        return run

    torch._dynamo.reset()
    torch.compile(Call(relative, and_masks(never, documents)), backend=compare)(*operands(torch.float64))
    (work,) = seen
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in work.graph.nodes)
    assert not [name for name, _ in work.named_children()], "its functions go with the call"


@pytest.mark.parametrize("mask", [causal, lambda b, h, i, j: (j <= i) & (i - j < 7)])
def test_facts_are_those_of_the_same_mask_elsewhere(mask: Mod) -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(M)[:, None], torch.arange(N)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask(0, 0, i, j), enable_gqa=True)

    (site,), (other,) = (compiled(f, *operands())[1].sites for f in (Call(None, mask), dense))
    assert site.site.facts == other.site.facts
    assert site.site == other.site


@pytest.mark.parametrize("mask", [and_masks(causal, documents), noop_mask])
def test_a_table_that_is_given_is_honoured(mask: Mod) -> None:
    """Rows list block columns 0 and 2 (row 0) and 1 (row 1); what stands behind the count means nothing."""
    count = torch.tensor([2, 1], dtype=torch.int32).view(1, 1, 2)
    columns = torch.tensor([[2, 0, 1], [1, 1, 0]], dtype=torch.int32).view(1, 1, 2, 3)
    table = BlockMask.from_kv_blocks(count, columns, BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(M, N))
    given = operands()
    got, report = compiled(Call(), *given, table)
    blocks = torch.tensor([[True, False, True], [False, True, False]])
    listed = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:M, :N]
    assert len(report.sites) == 1
    assert_same(got, reference(*(t.double() for t in given), None, mask, listed))


def test_full_and_partial_blocks_of_a_given_table() -> None:
    table = create_block_mask(and_masks(causal, documents), B, None, M, N, device="cpu", BLOCK_SIZE=BLOCK)
    given = operands()
    got, report = compiled(Call(alibi), *given, table)
    (site,) = report.sites
    assert "causal" in str(site.site)
    assert f"[b, 0, i//{BLOCK}, j//{BLOCK}]" in str(site.site)
    assert_same(got, reference(*(t.double() for t in given), alibi, table.mask_mod))


def test_an_empty_table_keeps_nothing() -> None:
    none = torch.zeros(1, 1, 1, dtype=torch.int32)
    table = BlockMask.from_kv_blocks(none, none[..., None], BLOCK_SIZE=128, seq_lengths=(M, N))
    got, report = compiled(Call(), *operands(), table)
    assert len(report.sites) == 1
    assert not got.any()


def test_layers_share_one_table() -> None:
    table = create_block_mask(documents, B, None, M, N, device="cpu", BLOCK_SIZE=BLOCK)

    def layers(q: Tensor, k: Tensor, v: Tensor, table: BlockMask) -> Tensor:
        first = flex_attention(q, k, v, block_mask=table, enable_gqa=True)
        return first + flex_attention(q * 2, k, v, alibi, block_mask=table, enable_gqa=True)

    graph = dynamo_graph(layers, *operands(), table)
    work, report = rewrite(graph, Options(strict=True))
    assert len(report.sites) == 2
    assert sum(n.target is torch.ops.aten.scatter_add.default for n in work.graph.nodes) == 2  # the partial and the full list


@pytest.mark.parametrize("inside", [True, False])
def test_lengths_that_vary(inside: bool) -> None:
    call = Call(alibi, and_masks(causal, documents))
    given = operands()
    tables = () if inside else (create_block_mask(call.mask, B, None, M, N, device="cpu", BLOCK_SIZE=BLOCK),)
    got, report = compiled(call, *given, *tables, dynamic=True)
    (site,) = report.sites
    assert not site.site.queries.is_Integer
    assert_same(got, reference(*(t.double() for t in given), alibi, call.mask))


def test_one_graph_serves_other_lengths() -> None:
    results = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=BLOCK)
        return flex_attention(q, k, v, block_mask=table, enable_gqa=True)

    from attnfx.backend import attnfx

    torch._dynamo.reset()
    made = torch.compile(call, backend=attnfx, dynamic=True, options={"inner": "eager", "strict": True})
    for m in (35, 61):
        q, k, v = (torch.cat([t, t], 2)[:, :, :m] for t in operands(m=37))
        results.append((made(q, k, v), reference(q.double(), k.double(), v.double(), None, causal)))
    for got, want in results:
        assert_same(got, want)


@pytest.fixture
def trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's front end refuses gradients on a CPU, where its own operator has no backward; ours has."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def biased(table: Tensor, slopes: Tensor) -> Mod:
    return lambda s, b, h, i, j: torch.tanh(s) + table[h, i - j + N - 1] + torch.exp(slopes)[h] * (j - i)


@pytest.mark.usefixtures("trainable")
def test_gradients_reach_operands_and_captured_tables() -> None:
    made = [*operands(), TABLE.clone(), SLOPES.clone()]
    wide = [t.double().requires_grad_() for t in made]
    leaves = [t.requires_grad_() for t in made]

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, slopes: Tensor) -> Tensor:
        blocks = create_block_mask(causal, None, None, M, N, device="cpu", BLOCK_SIZE=BLOCK)
        return flex_attention(q, k, v, biased(table, slopes), blocks, enable_gqa=True)

    got, report = compiled(call, *leaves)
    (site,) = report.sites
    assert sorted(t.requires_grad for t in site.site.side) == [True] * len(site.site.side)
    want = reference(*wide[:3], biased(*wide[3:]), causal)
    towards = torch.randn(got.shape)
    got.backward(towards)
    want.backward(towards.double())
    assert_same(got, want)
    for a, b in zip(leaves, wide, strict=True):
        assert_same(a.grad, b.grad, 5e-5)


@pytest.mark.usefixtures("trainable")
def test_a_score_whose_gradient_is_cut_is_left_alone() -> None:
    graph = dynamo_graph(Call(lambda s, b, h, i, j: s + torch.tanh(s.detach())), *(t.requires_grad_() for t in operands()))
    _, report = rewrite(graph, Options(strict=True))
    assert not report.sites
    assert "detach has no formula" in report.missed[0].reason


def test_half_precision_scores_reach_score_mod_in_float32() -> None:
    given = operands(torch.bfloat16)
    got, report = compiled(Call(softcap, causal), *given)
    assert got.dtype == torch.bfloat16
    assert report.sites[0].site.dtype == torch.bfloat16
    assert_same(got, reference(*(t.double() for t in given), softcap, causal))


def test_autocast_narrows_the_operands() -> None:
    given = operands()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flex_attention(q, k, v, alibi, enable_gqa=True)

    got, report = compiled(call, *given)
    assert report.sites[0].site.dtype == got.dtype
    assert_same(got, reference(*(t.to(got.dtype).double() for t in given), alibi, None), 3e-2)


def test_keys_of_one_batch_entry_serve_all() -> None:
    q, k, v = operands()
    got, report = compiled(Call(alibi, causal), q, k[:1], v[:1])
    assert len(report.sites) == 1
    assert_same(
        got, reference(q.double(), k[:1].expand(B, -1, -1, -1).double(), v[:1].expand(B, -1, -1, -1).double(), alibi, causal)
    )


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
    return out * torch.sigmoid(lse).unsqueeze(-1)


def unknown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, lambda s, b, h, i, j: s + torch.erfinv(s * 0.01), enable_gqa=True)


def looked_up_by_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, lambda s, b, h, i, j: s + torch.erfinv(j / 100.0), enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [(with_lse, "log-sum-exp"), (unknown, "in its score_mod erfinv has no formula"), (looked_up_by_score, "has no formula")],
)
def test_what_cannot_be_described_is_left_alone(function: Mod, reason: str) -> None:
    given = operands()
    graph = dynamo_graph(function, *given)
    work, report = rewrite(graph, Options(strict=True))
    assert not report.sites
    assert reason in report.missed[0].reason
    assert work is graph


def test_the_rest_of_the_graph_compiles_with_inductor() -> None:
    call = Call(relative, and_masks(causal, documents))
    given = operands()
    got, report = compiled(call, *given, inner="inductor")
    assert len(report.sites) == 1
    assert_same(got, reference(*(t.double() for t in given), call.score, call.mask))
