"""The static sparse patterns: each against its pairs by hand, tables of heads and ids from files, refusals, skipped tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from variant_cases import applied, oracle, site_of, tensors_of

from attnfx import expr
from attnfx.algebra.intervals import enclose
from attnfx.algebra.tiling import Tiling, kinds
from attnfx.composing import OnTensors
from attnfx.errors import PolicyError
from attnfx.site import AttentionSite, Origin
from attnfx.variants import (
    Anchor,
    AShape,
    BlockSparse,
    DilatedWindow,
    Documents,
    LongRangeGroups,
    PerHeadSpans,
    RegionAttention,
    Sharded,
    ShiftedGroups,
    StreamingHeads,
    Strided,
)  # fmt: skip
from attnfx.variants.base import Example, Variant

N = 24
IDS = tuple(int(c) for c in "001112220001112220001122")
BLOCKS = ((1, 0, 0), (1, 1, 0), (0, 1, 1))


def _bit_apart(I: int, J: int) -> bool:
    return (I ^ J).bit_count() <= 1


#: Which pairs (head, query, key) of a causal attention with four heads, two of them key heads, are kept.
KEPT: list[tuple[Variant, Callable[[int, int, int], bool]]] = [
    (StreamingHeads((0.2, 0.7), sinks=2, recent=4), lambda h, i, j: h >= 2 or i - j < 4 or j < 2),
    (StreamingHeads((0.2, 0.7), sparsity=1.0, sinks=0, recent=3), lambda h, i, j: i - j < 3),
    # spans 5 + 24 / 8 = 8 and 3 + 24 / 4 = 9 of blocks of 4: 8 and 8, and 12 where the half is rounded up
    (PerHeadSpans((5, 4), (0.125, 0.25), sinks=2, block=4), lambda h, i, j: i - j < (6 if h < 2 else 10) or j < 2),
    (PerHeadSpans((0, 9, 14, 99), (0, 0, 0, 0), sinks=1, block=4), lambda h, i, j: i - j < (4, 7, 15, 99)[h] or j < 1),
    (AShape(3, 5), lambda h, i, j: j < 3 or i - j < 5),
    (Strided(5), lambda h, i, j: i - j <= 5 or (i - j) % 5 == 0),
    (Strided(5, heads="split"), lambda h, i, j: i - j <= 5 if h < 2 else (i - j) % 5 == 0),
    (DilatedWindow(3, dilation=4), lambda h, i, j: i - j in (0, 4, 8)),
    (Sharded(3, 2, 4), lambda h, i, j: i // 3 - j // 3 < 2 or (j // 3 + 2 * (h // 2)) % 4 == 0),
    (Sharded(3, 1, 4, num_dense_heads=1, offset=1), lambda h, i, j: h >= 2 or i // 3 == j // 3 or (j // 3 + 1) % 4 == 0),
    (ShiftedGroups(groups=3), lambda h, i, j: i // 8 == j // 8 if h < 2 else (i + 4) // 8 == (j + 4) // 8),
    (ShiftedGroups(group_size=6, sinks=1), lambda h, i, j: j < 1 or (i + 3 * (h > 1)) // 6 == (j + 3 * (h > 1)) // 6),
    (Documents((5, 1, 18)), lambda h, i, j: (i >= 5) + (i >= 6) == (j >= 5) + (j >= 6)),
    (Documents(boundaries=(9, 24)), lambda h, i, j: (i < 9) == (j < 9)),
    (Anchor((7, 17)), lambda h, i, j: j == 0 or (i < 7) == (j < 7)),
    (BlockSparse("butterfly", block=4), lambda h, i, j: _bit_apart(i // 4, j // 4)),
    (BlockSparse(BLOCKS, block=8), lambda h, i, j: bool(BLOCKS[i // 8][j // 8])),
    (BlockSparse((BLOCKS, ((1, 1, 1),) * 3), block=8), lambda h, i, j: h >= 2 or bool(BLOCKS[i // 8][j // 8])),
    (RegionAttention(IDS), lambda h, i, j: IDS[i] == IDS[j]),
    (LongRangeGroups((2, 3, 4), group_num=2), lambda h, i, j: (i % 12 // 4 % 2, i % 2) == (j % 12 // 4 % 2, j % 2)),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "kept"), KEPT, ids=lambda each: repr(each) if isinstance(each, Variant) else "")
def test_the_kept_pairs_are_the_definition(variant: Variant, kept: Callable[[int, int, int], bool]) -> None:
    example = Example(variant, queries=N, keys=N)
    q, k, v = tensors_of(example, torch.float64)
    mask = torch.tensor([[[j <= i and kept(h, i, j) for j in range(N)] for i in range(N)] for h in range(4)])
    z = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 0.25
    want = z.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(oracle(example, q, k, v), want)
    torch.testing.assert_close(applied(example, q, k, v), want)


class _Spy(OnTensors):
    """Keeps what a composition attends with."""

    def _run(self, operator: object, site: AttentionSite, *operands: object) -> object:
        self.seen = site, operands[3]
        return super()._run(operator, site, *operands)


LONG = 1536
SPARSE: list[tuple[Variant, float]] = [
    (StreamingHeads((0.0, 0.0, 0.0, 1.0), sinks=16, recent=100), 0.55),
    (PerHeadSpans((128, 128, 128, 640), (0.0,) * 4), 0.55),
    (AShape(32, 100), 0.4),
    (Strided(512, heads="split"), 0.6),
    (DilatedWindow(32, 4), 0.3),
    (Sharded(64, 2, 8), 0.4),
    (ShiftedGroups(group_size=128, sinks=4), 0.3),
    (Documents((128,) * 12), 0.2),
    (Anchor((128,) * 12), 0.3),
    (BlockSparse("butterfly", block=64), 0.5),
    (BlockSparse(tuple(tuple(int(J in (0, I)) for J in range(12)) for I in range(12))), 0.3),
    (RegionAttention(tuple(n // 128 for n in range(LONG))), 0.2),
]


@pytest.mark.parametrize(("variant", "most"), SPARSE, ids=lambda each: type(each).__name__)
def test_tiles_without_pairs_are_skipped(variant: Variant, most: float) -> None:
    """The part of the causal tiles of 128 x 64 in which a mask may keep something."""
    example = Example(variant, queries=LONG, keys=LONG, key_heads=4)
    site, q, k, v = site_of(example, torch.float32), *tensors_of(example, torch.float32)
    spy = _Spy(site, (), q.device, "portable")
    variant.compose(spy, q, k, v)
    changed, more = spy.seen
    assert changed.facts.nonempty
    assert isinstance(more, list | tuple)
    tiling = Tiling(1, 4, LONG, LONG, 128, 64)
    may = kinds(enclose(changed.keep), tiling, list(more), {}, q.device)[1]
    may = may.expand(1, 4, *may.shape[2:])
    causal = kinds(enclose(site.keep), tiling, (), {}, q.device)[1].expand_as(may)
    part = int((may & causal).sum()) / int(causal.sum())
    assert part <= most
    assert float(variant.pairs(site)) / (LONG * (LONG + 1) / 2) <= part


@pytest.mark.parametrize(
    "variant", [StreamingHeads((0.0,) * 4, sinks=0, recent=100), AShape(0, 100), ShiftedGroups(group_size=128), DilatedWindow(25)]
)
def test_ranges_are_proved(variant: Variant) -> None:
    site = site_of(Example(variant, queries=LONG, keys=LONG, key_heads=4), torch.float32)
    facts = variant.apply(site).facts
    assert facts.nonempty
    assert facts.delta_high or facts.keys.low is not None


def test_a_table_of_layers_goes_by_the_module_path(tmp_path: Path) -> None:
    (tmp_path / "gates.tsv").write_text("0.9\t0.1\n0.2\t0.7\n")
    (tmp_path / "gates.json").write_text(json.dumps([[0.9, 0.1], [0.2, 0.7]]))
    site = site_of(Example(AShape()), torch.float64).replace(origin=Origin("model.layers.1.self_attn"))
    want = StreamingHeads((0.2, 0.7), recent=5).apply(site)
    for name in ("gates.tsv", "gates.json"):
        variant = StreamingHeads(str(tmp_path / name), recent=5)
        assert variant.objections(site) == ()
        assert variant.apply(site) == want
        (missing,) = variant.objections(site.replace(origin=Origin("model.layers.2.self_attn")))
        assert "2 rows, and none for layer 2" in missing
        (unknown,) = variant.objections(site.replace(origin=Origin("attention")))
        assert "give `layer`" in unknown
    (absent,) = StreamingHeads(str(tmp_path / "none.tsv")).objections(site)
    assert "none.tsv" in absent


def test_sparsity_counts_the_heads_of_the_whole_table() -> None:
    gates = ((0.9, 0.1), (0.2, 0.1))
    site = site_of(Example(AShape()), torch.float64)
    some = [StreamingHeads(gates, sparsity=0.5, layer=layer).apply(site) for layer in (0, 1)]
    each = [StreamingHeads(row).apply(site) for row in ((1.0, 0.0), (1.0, 0.0))]
    assert some == each


def test_blocks_and_regions_come_from_files(tmp_path: Path) -> None:
    torch.save(torch.tensor(BLOCKS), tmp_path / "blocks.pt")
    torch.save(torch.tensor(IDS).view(4, 6), tmp_path / "ids.pt")
    (tmp_path / "blocks.json").write_text(json.dumps(BLOCKS))
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    example = Example(BlockSparse(BLOCKS, block=8), queries=N, keys=N)
    q, k, v = tensors_of(example, torch.float64)
    for suffix in ("pt", "json"):
        blocks = replace(example, variant=BlockSparse(str(tmp_path / f"blocks.{suffix}"), block=8))
        torch.testing.assert_close(applied(blocks, q, k, v), oracle(example, q, k, v))
        ids = replace(example, variant=RegionAttention(str(tmp_path / f"ids.{suffix}")))
        torch.testing.assert_close(applied(ids, q, k, v), RegionAttention(IDS).reference(q, k, v, 0.25, causal=True))


def test_spans_grow_with_a_length_that_is_not_known() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    example = Example(PerHeadSpans((0, 8), (0.25, 0.5), sinks=2, block=4), queries=N, keys=N)
    site = site_of(example, torch.float64).replace(queries=size, keys=size, ranges_low=((size, sympy.Integer(2)),))
    site = site.replace(keep=expr.le(expr.index("j"), expr.index("i")))
    assert example.variant.objections(site) == ()
    q, k, v = tensors_of(example, torch.float64)
    made = example.variant.compose(OnTensors(site, (), q.device, "portable", {size: N}), q, k, v)
    torch.testing.assert_close(made, oracle(example, q, k, v))


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        (StreamingHeads((0.1, 0.2, 0.3)), "The row has 3 numbers; the site has 2 key heads."),
        (PerHeadSpans((0, 0, 0), (0, 0)), "The row has 3 numbers; the site has 4 heads and 2 key heads."),
        (Sharded(num_dense_heads=3), "3 heads are to be dense; the site has 2 key heads."),
        (ShiftedGroups(), "37 keys are not 4 groups of an even size"),
        (Documents((30, 8)), "The documents are of 38 tokens; the site has 37 keys."),
        (RegionAttention((1, 2)), "The regions are of 2 tokens; the site has 37 keys."),
        (BlockSparse(BLOCKS, block=8), "1 tables of 3 x 3; the site has 4 heads, 2 key heads and 5 x 5 blocks of 8."),
        (BlockSparse(((0, 1), (1, 1)), block=19), "There is a row of blocks without one that its queries see"),
        (BlockSparse((tuple(1 - n % 2 for n in range(74)),) * 74, block=1), "A row of blocks has 37 runs"),
    ],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_sites_of_other_sizes_are_refused(variant: Variant, sentence: str) -> None:
    keys = 74 if "37 runs" in sentence else 37
    (found,) = variant.objections(site_of(Example(variant, queries=keys, keys=keys), torch.float64))
    assert sentence in found


def test_an_a_shape_needs_a_causal_mask() -> None:
    (found,) = AShape().objections(site_of(Example(AShape(), causal=False), torch.float64))
    assert "No causal mask is proved" in found


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: StreamingHeads(()), "StreamingHeads.gates is ()"),
        (lambda: StreamingHeads((1.0,), sparsity=2), "StreamingHeads.sparsity is 2"),
        (lambda: PerHeadSpans((1,), (True,)), "PerHeadSpans.beta is (True,)"),
        (lambda: Strided(4, heads="all"), "Strided.heads is 'all'"),
        (lambda: ShiftedGroups(group_size=7), "ShiftedGroups.group_size is 7; it must be an even number."),
        (lambda: Documents(), "one of the four"),
        (lambda: Documents((3,), (3,)), "one of the four"),
        (lambda: Documents((3, 0)), "at least one token"),
        (lambda: Documents(boundaries=(3, 2)), "at least one token"),
        (lambda: Anchor((3,), anchors=0), "Anchor.anchors is 0"),
        (lambda: BlockSparse(((1, 2), (0, 1))), "0 and 1"),
        (lambda: BlockSparse(3), "BlockSparse.blocks is 3"),
        (lambda: RegionAttention((1.5,)), "RegionAttention.regions is (1.5,)"),
    ],
)  # fmt: skip
def test_parameters_are_checked(make: Callable[[], Variant], complaint: str) -> None:
    with pytest.raises(PolicyError) as error:
        make()
    assert complaint in str(error.value)
