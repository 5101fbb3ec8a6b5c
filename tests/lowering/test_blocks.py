"""Lists of tiles against the mask evaluated on every query and key, and where there are none."""

from pathlib import Path

import pytest
import torch
from block_sites import BATCH, KEYS, QUERIES, document_ids, masks, same, sized
from interpreted import rows
from lowering_sites import Example, I, J, causal, distance, inputs, load, side
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

import attnfx.lowering.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of
from attnfx.lowering import blocks
from attnfx.lowering.blocks import OWN, WALKED, Mask
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.lowering.portable import aten
from attnfx.lowering.portable.blocks import Problem
from attnfx.site import AttentionSite

#: Of masks, by the start of their names, and what makes the lists.
GROUPS = (
    ("lists", "documents", "regions", "neighbourhood", "window"),
    ("padding", "lengths", "times"),
    ("table",),
    ("bias",),
)
EXAMPLES = {e.name: e for e in masks()}
CPU = torch.device("cpu")


def mask_of(s: AttentionSite) -> Mask | None:
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan), plan
    return blocks.mask_of(plan.to_json())


def dense(example: Example) -> Tensor:
    """The mask (B,H,M,N) by its formula."""
    s, loads = example.site, example.loads(torch.float32)
    grid = grid_of(BATCH, int(s.heads), range(QUERIES), range(KEYS), CPU)
    return evaluate(s.keep, grid, loads, {}).expand(BATCH, int(s.heads), QUERIES, KEYS)


def marked(lists: Tensor, walked: int) -> tuple[Tensor, Tensor]:
    """The tiles listed as kept in part, and entirely: bool (batch, heads, lists, walked)."""
    batch, heads, own, _ = lists.shape
    found = torch.zeros(2, batch, heads, own, walked, dtype=torch.bool)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, own))).tolist():
        partial, full, *places = lists[b, h, t].tolist()
        found[0, b, h, t, places[:partial]] = True
        found[1, b, h, t, places[walked - full :]] = True
        assert places[:partial] == sorted(places[:partial])
        assert len(set(places[:partial]) | set(places[walked - full :])) == partial + full
    return found[0], found[1]


@pytest.mark.parametrize("by_keys", [False, True], ids=["of queries", "of keys"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_lists_hold_every_tile_that_is_kept(name: str, by_keys: bool) -> None:
    example = EXAMPLES[name]
    found = mask_of(example.site)
    assert found is not None
    plan, loads = KernelPlan.from_json(found.text), [example.loads(torch.float32)[s] for s in found.slots]
    batch, heads = BATCH if found.per_batch else 1, int(plan.site.heads) if found.per_head else 1
    lists = blocks.plain(
        plan.site.keep, loads, plan.values((), KEYS, loads), batch, heads, QUERIES, KEYS, by_keys, CPU
    )  # fmt: skip
    assert lists.shape == blocks.shape(batch, heads, QUERIES, KEYS, by_keys)
    kept = dense(example)
    if by_keys:
        kept = kept.transpose(2, 3)
    own, walked = -(-kept.shape[2] // OWN), -(-kept.shape[3] // WALKED)
    pad = (0, walked * WALKED - kept.shape[3], 0, own * OWN - kept.shape[2])
    tiles = [
        torch.nn.functional.pad(kept, pad, value=v).unflatten(3, (walked, WALKED)).unflatten(2, (own, OWN)) for v in (False, True)
    ]
    some, every = tiles[0].any(5).any(3), tiles[1].all(5).all(3)
    every[..., kept.shape[3] // WALKED :] = False
    partial, full = marked(lists, walked)
    assert not bool((full & ~every).any())
    assert not bool((some & ~(partial | full)).any())
    # and nothing else, but where two parts of a mask exclude one another in a tile that both reach
    loose = ("neighbourhood", "dilation in documents", "regions of heads", "times", "padding", "table of 64", "table of 24")
    if not name.startswith(loose):
        assert torch.equal((partial | full).expand(some.shape), some)
        assert torch.equal(full.expand(every.shape), every)
    assert float((partial | full).float().mean()) < 0.75


def test_masks_that_bounds_describe_have_no_lists() -> None:
    assert mask_of(sized(causal())) is None
    assert mask_of(sized(expr.TRUE)) is None


def test_masks_of_which_nothing_is_known_have_no_lists() -> None:
    data = load(0, I, J, dtype=torch.bool)
    assert mask_of(sized(expr.logical_and(causal(), data), side=(side(QUERIES, KEYS, dtype=torch.bool),))) is None
    assert mask_of(sized(expr.eq(expr.mod(I - J, expr.integer(3)), expr.integer(0)))) is None


def test_layers_with_one_mask_share_its_lists() -> None:
    documents, table = (side(BATCH, KEYS, dtype=torch.int64),), side(7)
    keep = expr.logical_and(causal(), same(I, J))
    other = expr.logical_and(causal(), same(I, J, slot=1))
    biased = sized(other, side=(table, *documents)).replace(score=0.5 * expr.Score() + load(0, expr.integer(3)))
    first, second = mask_of(sized(keep, side=documents)), mask_of(biased)
    assert first is not None
    assert second is not None
    assert first.text == second.text
    assert (first.slots, second.slots) == ((0,), (1,))


def test_a_graph_makes_the_lists_of_equal_masks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "kernels_run", lambda device: True)
    s = sized(expr.logical_and(causal(), same(I, J)), side=(side(BATCH, 2048, dtype=torch.int64),), queries=2048, keys=2048)
    first, second = make_plan(s, "flash"), make_plan(s.replace(score=0.5 * expr.Score()), "flash")
    assert isinstance(first, KernelPlan)
    assert isinstance(second, KernelPlan)

    def layers(q: Tensor, ids: Tensor) -> Tensor:
        for plan in (first, second, first):
            q = torch.ops.attnfx.attention(q, q, q, [ids], [], plan.to_json())
        return torch.autograd.grad(q.sum(), leaf)[0]

    leaf = torch.randn(BATCH, 1, 2048, 16, requires_grad=True)
    graph = make_fx(lambda ids: layers(leaf, ids), tracing_mode="fake", _allow_non_fake_inputs=True)(
        document_ids(BATCH, 2048)
    ).graph
    calls = [n.target for n in fx_graph_cse(graph).nodes if n.op == "call_function"]
    assert calls.count(torch.ops.attnfx.flash.default) == calls.count(torch.ops.attnfx.flash_backward.default) == 3
    assert calls.count(torch.ops.attnfx.blocks.default) == 2  # by rows and by keys


def test_documents_visit_few_tiles() -> None:
    length = 16384
    ids = document_ids(1, length, mean=1024)
    keep = expr.logical_and(causal(), same(I, J))
    lists = blocks.plain(keep, [ids], {}, 1, 1, length, length, False, CPU)
    visited = lists[..., :2].sum((0, 1, 2))
    triangle = sum(t + 1 for t in range(length // OWN))
    assert int(visited.sum()) < triangle / 5


@pytest.mark.parametrize("way", ["fused", "textbook"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_blocks_of_rows_meet_the_keys_that_are_kept(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "KEYS", 256)
    if way == "textbook":
        monkeypatch.setattr(aten.Fused, "of", staticmethod(lambda problem: None))
    s, loads = EXAMPLES[name].site, list(EXAMPLES[name].loads(torch.float32))
    plan = make_plan(s, "portable")
    assert isinstance(plan, KernelPlan)
    q, k, v = inputs(s, torch.float32)
    problem = Problem(plan, q, k, v, loads, (), None)
    runs = [range(r, min(r + 64, QUERIES)) for r in range(0, QUERIES, 64)]
    visited = sum(len(problem.block(range(BATCH), range(int(s.heads)), rows).keys) for rows in runs)
    assert visited < (1.0 if name in ("window or sinks", "regions of heads", "blocks of heads") else 0.8) * KEYS * len(runs)
    out = torch.ops.attnfx.attention(q, k, v, loads, [], plan.to_json())
    want = s.reference(q, k, v, *loads)
    grad = torch.randn_like(out)
    assert distance(out, want) < 1e-5
    for mine, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        assert distance(mine, theirs) < 3e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_kernels_walk_lists_in_interpreter(group: tuple[str, ...], tmp_path: Path) -> None:
    found = rows(Path(__file__).parent / "block_script.py", *group, ATTNFX_CACHE_DIR=str(tmp_path))
    assert [part for part in group if not any(row["name"].startswith(part) for row in found)] == []
    assert {row["name"]: row["errors"] for row in found if not max(row["errors"].values()) < 1e-5} == {}
