"""What a variant gives a site beside the model's own operands, as nodes of the graph.

Tensors that a variant computed are buffers of the graph: the inner compiler takes them for inputs, so that no cache of compiled
code holds their values.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor, fx

from attnfx.low_rank import Beside
from attnfx.rewrite import Splicer

_ATEN = torch.ops.aten


def laid_beside(
    splicer: Splicer, beside: Beside, query: fx.Node, key: fx.Node, loads: Sequence[fx.Node]
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """Queries and keys with their further columns, and the side tensors that ``beside.site`` reads."""
    if beside.query is not None and beside.key is not None:
        query = _with_columns(splicer, query, held(splicer, beside.query), beside.site.batch)
        key = _with_columns(splicer, key, held(splicer, beside.key), beside.site.batch)
    return query, key, [*(loads[k] for k in beside.loads), *(held(splicer, t) for t in beside.tensors)]


def _with_columns(splicer: Splicer, node: fx.Node, columns: fx.Node, batch: sympy.Expr) -> fx.Node:
    """(B, H, S, D) and (H, S, C) as (B, H, S, D + C)."""
    spread = splicer.call(
        _ATEN.expand.default, splicer.call(_ATEN.unsqueeze.default, columns, 0), [splicer.number(batch), -1, -1, -1]
    )
    return splicer.call(_ATEN.cat.default, [node, spread], -1)


def held(splicer: Splicer, tensor: Tensor) -> fx.Node:
    """A tensor as a buffer of the graph; equal ones are one, as those of layers that share a bias."""
    known = dict(splicer.gm.named_buffers())
    name = next((n for n, t in known.items() if n.startswith(_NAME) and _same(t, tensor)), "")
    if not name:
        name = next(f"{_NAME}{k}" for k in range(len(known) + 1) if f"{_NAME}{k}" not in known)
        splicer.gm.register_buffer(name, tensor)
    splicer.made.append(splicer.graph.get_attr(name))
    return splicer.made[-1]


_NAME = "attnfx_constant_"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
