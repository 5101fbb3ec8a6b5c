"""Sites made by hand: what models mean, without the models. Shared by the tests of plans, sources, operators and blocks."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.expr import Call, Expr, Int, Load, Score
from attnfx.site import AttentionSite, SideTensor

B, H, I, J = (expr.index(name) for name in "bhij")
F32 = torch.float32
MIN32 = torch.finfo(torch.float32).min
SCALED = 0.25 * Score()
BATCH, HEADS, KEY_HEADS, QUERIES, KEYS = 2, 4, 2, 37, 53


def site(score: Expr = SCALED, keep: Expr = expr.TRUE, **changes: Any) -> AttentionSite:
    """B 2, H 4 over 2, M 37, N 53, D = Dv = 16, unless changed; sizes may be numbers or symbols."""
    values: dict[str, Any] = {
        "batch": BATCH, "heads": HEADS, "key_heads": KEY_HEADS, "queries": QUERIES, "keys": KEYS, "head_dim": 16, "value_dim": 16,
        "dtype": F32, "device": "cpu", "requires_grad": True,
    }  # fmt: skip
    values |= changes
    for name in ("batch", "heads", "key_heads", "queries", "keys"):
        values[name] = sympy.sympify(values[name])
    return AttentionSite(score=score, keep=keep, **values)


def side(*shape: int | sympy.Expr, dtype: torch.dtype = F32, grad: bool = False) -> SideTensor:
    return SideTensor(tuple(sympy.sympify(n) for n in shape), dtype, grad)


def load(slot: int, *indices: Expr, dtype: torch.dtype = F32) -> Load:
    return Load(slot, indices, dtype)


def causal(ahead: int | sympy.Expr = 0) -> Expr:
    return expr.le(J, Int(I.value + ahead))


def window(width: int) -> Expr:
    return expr.logical_and(causal(), expr.lt(I - J, expr.integer(width)))


def softcap(cap: float = 3.0) -> Expr:
    return expr.call("tanh", expr.div(SCALED, expr.lift(cap))) * cap


def t5_bucket(buckets: int = 32, farthest: int = 128) -> Expr:
    """T5's relative bucket of j - i for an encoder, as the model computes it."""
    half, exact = buckets // 2, buckets // 4
    distance = expr.call("abs", J - I)
    far = expr.div(
        expr.call("log", expr.div(expr.cast(distance, F32), expr.lift(float(exact)))), expr.lift(math.log(farthest / exact))
    )
    far = expr.add(expr.cast(far * float(half - exact), torch.int64), expr.integer(exact))
    near = expr.where(expr.lt(distance, expr.integer(exact)), distance, expr.minimum(far, expr.integer(half - 1)), torch.int64)
    return expr.add(expr.mul(expr.cast(expr.lt(expr.integer(0), J - I), torch.int64), expr.integer(half)), near)


def t5(slot: int = 0) -> Expr:
    return Score() + load(slot, t5_bucket(), H)


def alibi(slot: int = 0) -> Expr:
    return SCALED + load(slot, H) * expr.cast(I - J, F32)


@dataclass(frozen=True)
class Example:
    """A site, and its side tensors for a dtype."""

    name: str
    site: AttentionSite
    loads: Callable[[torch.dtype], Sequence[Tensor]] = field(default=lambda dtype: ())


def padding(all_of_one: bool = False) -> Tensor:
    """bool (B, N); the last batch entirely padded if asked."""
    keep = torch.rand(BATCH, KEYS) > 0.4
    keep[0, 0] = True
    if all_of_one:
        keep[-1] = False
    return keep


def random(*shape: int, grad: bool = True) -> Callable[[torch.dtype], Sequence[Tensor]]:
    return lambda dtype: (torch.randn(shape, dtype=dtype, requires_grad=grad),)


CHUNK = expr.integer(8)


def examples() -> Iterator[Example]:
    yield Example("plain", site())
    yield Example("dv 24", site(value_dim=24))
    for ahead in (0, 16, -16):
        yield Example(f"causal {ahead}", site(keep=causal(ahead)))
        yield Example(f"causal {ahead} zero", site(keep=causal(ahead), empty_rows="zero"))
    yield Example("window", site(keep=window(7)))
    yield Example("window long", site(keep=window(40), batch=1, queries=300, keys=300, key_heads=1))
    yield Example("chunks", site(keep=expr.logical_and(causal(), expr.eq(expr.floordiv(I, CHUNK), expr.floordiv(J, CHUNK)))))
    yield Example("block causal", site(keep=expr.le(expr.floordiv(J, CHUNK), expr.floordiv(I + 3, CHUNK))))
    yield Example("prefix", site(keep=expr.logical_or(causal(), expr.lt(J, expr.integer(21)))))
    yield Example("bits", site(keep=expr.ne(expr.call("bitand", I, J), expr.integer(0)), fill=MIN32, empty_rows="fill"))
    yield Example("softcap", site(softcap(), causal()))
    yield Example("key range", site(keep=expr.logical_and(expr.le(J, expr.integer(30)), expr.le(expr.integer(4), J))))
    for additive in (False, True):
        for fill in (MIN32, -1e9, -1e4, -math.inf):
            rows = "nan" if math.isinf(fill) else "fill"
            more: dict[str, Any] = {"fill": fill, "additive": additive, "empty_rows": rows}
            how = "added" if additive else "replaced"
            yield Example(f"causal -16 {fill:g} {how}", site(keep=causal(-16), **more))
            padded = expr.logical_and(causal(), load(0, B, J, dtype=torch.bool))
            mask = side(BATCH, KEYS, dtype=torch.bool)
            yield Example(f"padded {fill:g} {how}", site(keep=padded, side=(mask,), **more), lambda dtype: (padding(True),))
    yield from biased()


def biased() -> Iterator[Example]:
    slopes = side(HEADS)
    yield Example("alibi", site(alibi(), causal(), side=(slopes,)), random(HEADS, grad=False))
    yield Example("alibi learned", site(alibi(), causal(16), side=(side(HEADS, grad=True),)), random(HEADS))
    yield Example("t5", site(t5(), side=(side(32, HEADS, grad=True),)), random(32, HEADS))
    forms = {
        "tile": ((HEADS, QUERIES, KEYS), (H, I, J)),
        "tile of batches": ((QUERIES, BATCH, 1, KEYS), (I, B, expr.integer(0), J)),
        "tile too large": ((HEADS, QUERIES + 3, KEYS + 5), (H, I, J)),
        "column": ((KEYS, BATCH), (J, B)),
        "column shared": ((KEYS,), (J,)),
        "row": ((QUERIES, HEADS), (I, H)),
        "head": ((HEADS,), (H,)),
    }
    reached = {"fill": -1.0, "empty_rows": "fill"}
    for name in ("row", "head"):
        shape, indices = forms[name]
        under = site(SCALED + load(0, *indices), causal(16), side=(side(*shape, grad=True),), **reached)
        yield Example(f"bias {name} under a fill in reach", under, random(*shape))
    for name, (shape, indices) in forms.items():
        score = SCALED + load(0, *indices)
        yield Example(f"bias {name}", site(score, causal(16), side=(side(*shape, grad=True),)), random(*shape))
    tile, shape = load(0, HEADS * B + H, I, J), (BATCH * HEADS, QUERIES, KEYS)
    scaled = site((SCALED - tile) * 0.3, causal(16), side=(side(*shape, grad=True),))
    yield Example("bias folded, with a factor", scaled, random(*shape))
    grouped = load(0, J, expr.floordiv(H, expr.integer(2)))  # several heads share an element, and not all elements are used
    yield Example("bias of key heads", site(SCALED + grouped, side=(side(KEYS, 3, grad=True),)), random(KEYS, 3))
    for name, shape, bias in (
        ("tile", (QUERIES, KEYS), load(0, I, J)), ("row", (QUERIES,), load(0, I)), ("head", (HEADS,), load(0, H)),
        ("distance", (32, HEADS), load(0, t5_bucket(), H)),
    ):  # fmt: skip
        capped = expr.call("tanh", (SCALED + bias * 0.5) * 0.3) * 3.0
        yield Example(f"bias {name} capped", site(capped, causal(16), side=(side(*shape, grad=True),)), random(*shape))
    masked = SCALED + load(0, B, I, J)

    def float_mask(dtype: torch.dtype) -> Sequence[Tensor]:
        keep = torch.rand(BATCH, QUERIES, KEYS) > 0.5
        keep[:, 3] = False
        return (torch.where(keep, 0.0, MIN32).to(dtype),)

    yield Example("loaded mask", site(masked, side=(side(BATCH, QUERIES, KEYS),)), float_mask)
    table = load(0, Call("floordiv", (I + J, expr.integer(4)), torch.int64))
    yield Example("gather", site(SCALED + table, side=(side(40),)), random(40, grad=False))


def inputs(s: AttentionSite, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a site with numbers for sizes, requiring grad."""
    torch.manual_seed(seed)
    b, h, hk, m, n = (int(x) for x in (s.batch, s.heads, s.key_heads, s.queries, s.keys))
    shapes = (b, h, m, s.head_dim), (b, hk, n, s.head_dim), (b, hk, n, s.value_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; infinite where NaNs differ."""
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return math.inf
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double().nan_to_num(), want.detach().double().nan_to_num()
    return float((got - want).abs().max() / want.abs().max().clamp_min(0.05))


def named(examples: Iterator[Example], names: Sequence[str]) -> list[Example]:
    """Those with these names, all of which there are: what Triton's interpreter, which is slow, runs in the tests."""
    found = [e for e in examples if e.name in names]
    assert len(found) == len(names), sorted(set(names) - {e.name for e in found})
    return found


def tell(examples: Sequence[Example], errors: Callable[[Example], dict[str, float]]) -> None:
    """Print a line of JSON for each example: its errors, or how it failed."""
    for example in examples:
        try:
            line = {"name": example.name, "errors": errors(example)}
        except Exception:
            line = {"name": example.name, "failure": traceback.format_exc()}
        print(json.dumps(line), flush=True)
