"""`attnfx::linear_site`: an attention of a model that runs as linear attention. Factors are torch operations around the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import attnfx.lowering.linear.ops  # noqa: F401 - registers the operators
from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.expr import Const, Expr
from attnfx.lowering.linear.plan import LinearPlan
from attnfx.lowering.mapped import looped
from attnfx.lowering.ops import LIBRARY

LIBRARY.define(
    "linear_site(Tensor query, Tensor key, Tensor value, Tensor[] loads, SymInt[] sizes, str plan, str site='') -> Tensor"
)


def linear_site(
    query: Tensor, key: Tensor, value: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], plan: str, site: str = ""
) -> Tensor:
    """(B,H,M,D), (B,HK,N,D), (B,HK,N,DV) -> (B,H,M,DV), queries and keys behind their feature maps: what ``plan`` (text of a
    :class:`LinearPlan`) describes. Differentiable in the operands and in the side tensors of factors. ``site`` names the call
    in a profiler's timeline.

    Raises ValueError where the numbers of loads or sizes are not the plan's.
    """
    read = LinearPlan.from_json(plan)
    if len(loads) != read.given or len(sizes) != len(read.symbols):
        given = f"{len(loads)} side tensors and {len(sizes)} sizes"
        raise ValueError(f"{given} were given; the plan has {read.given} and {len(read.symbols)}")
    values = dict(zip(read.symbols, sizes, strict=True))

    def multiplied(x: Tensor, factor: Expr, token: str) -> Tensor:
        if factor == expr.ONE:
            return x
        if isinstance(factor, Const):
            return x * float(factor.value)
        grid = {n: torch.arange(size, device=x.device) for n, size in zip(("b", "h", token), x.shape, strict=False)}
        grid = {n: at.view([-1 if axis == place else 1 for axis in range(4)]) for place, (n, at) in enumerate(grid.items())}
        wide = torch.float64 if x.dtype == torch.float64 else None
        return (x * evaluate(factor, grid, loads, values, dtype=wide, clamp=True)).to(x.dtype)

    dtype = query.dtype
    if dtype == torch.float16 and not (_near_one(read.rows) and _near_one(read.columns)):
        query, key, value = query.float(), key.float(), value.float()
    decay = None
    if read.decay is not None:
        with torch.no_grad():
            heads = {"h": torch.arange(query.shape[1], device=query.device)}
            decay = evaluate(read.decay, heads, loads, values).expand(query.shape[1])
    number = isinstance(read.rows, Const)
    query, key = query if number else multiplied(query, read.rows, "i"), multiplied(key, read.columns, "j")
    scale = float(read.rows.value) if isinstance(read.rows, Const) else 1.0
    options = (read.causal, bool(read.divisor), read.eps, None, None, read.divisor or "add", scale, site)
    out: Tensor = torch.ops.attnfx.linear_attention.default(query, key, value, decay, *options)
    return out.to(dtype)


def _near_one(factor: Expr) -> bool:
    """Whether what is multiplied with a factor stays in the range of float16, as the model's own products may not have to."""
    return isinstance(factor, Const) and 2.0**-8 <= abs(factor.value) <= 2.0**4


LIBRARY.impl("linear_site", linear_site, "CompositeImplicitAutograd")
torch.library.register_vmap("attnfx::linear_site", looped("linear_site"), lib=LIBRARY)
