"""What a variant gives a site beside the model's own operands, as nodes of the graph.

Tensors that a variant computed are buffers of the graph: the inner compiler takes them for inputs, so that no cache of compiled
code holds their values.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor, fx

from attnfx.biases.beside import Beside, Networks
from attnfx.biases.pair_bias import PairNodes
from attnfx.graphs.rewrite import Splicer

_ATEN = torch.ops.aten
#: How the names of such buffers begin.
CONSTANT = "attnfx_constant_"


def laid_beside(
    splicer: Splicer, beside: Beside, query: fx.Node, key: fx.Node, loads: Sequence[fx.Node]
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """Queries and keys with their further columns, and the side tensors that ``beside.site`` reads."""
    if beside.query is not None and beside.key is not None:
        query = _with_columns(splicer, query, held(splicer, beside.query, shared=True), beside.site.batch)
        key = _with_columns(splicer, key, held(splicer, beside.key, shared=True), beside.site.batch)
    if beside.networks is not None:
        query, key = _with_networks(splicer, beside.networks, query, key)
    return query, key, [*(loads[k] for k in beside.loads), *(held(splicer, t, shared=True) for t in beside.tensors)]


def _with_networks(splicer: Splicer, networks: Networks, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Queries and keys with the columns that networks make of a pair representation, once for all that share it."""
    import attnfx.lowering.pair_columns  # noqa: F401 - registers the operator

    pair, network = networks.pair, networks.network
    assert isinstance(pair, PairNodes)
    node = splicer.held(pair.node, pair.node)
    if pair.order != tuple(range(len(pair.order))):
        node = splicer.call(_ATEN.permute.default, node, list(pair.order))
    device = pair.node.meta["val"].device
    weights = [[held(splicer, t.to(device)) for t in each] for each in (network.query, network.key)]
    scale = held(splicer, networks.scale.to(device))
    columns = splicer.call(torch.ops.attnfx.pair_columns.default, node, *weights, scale, query)
    parts = [splicer.call(operator.getitem, columns, k) for k in (0, 1)]
    return splicer.call(_ATEN.cat.default, [query, parts[0]], -1), splicer.call(_ATEN.cat.default, [key, parts[1]], -1)


def _with_columns(splicer: Splicer, node: fx.Node, columns: fx.Node, batch: sympy.Expr) -> fx.Node:
    """(B, H, S, D) and (H, S, C) as (B, H, S, D + C)."""
    spread = splicer.call(
        _ATEN.expand.default, splicer.call(_ATEN.unsqueeze.default, columns, 0), [splicer.number(batch), -1, -1, -1]
    )
    return splicer.call(_ATEN.cat.default, [node, spread], -1)


def held(splicer: Splicer, tensor: Tensor, shared: bool = False) -> fx.Node:
    """A tensor as a buffer of the graph. ``shared``: equal ones are one, as those of layers that share a bias."""
    known = dict(splicer.gm.named_buffers())
    name = next((n for n, t in known.items() if shared and n.startswith(CONSTANT) and _same(t, tensor)), "")
    if not name:
        name = next(f"{CONSTANT}{k}" for k in range(len(known) + 1) if f"{CONSTANT}{k}" not in known)
        splicer.gm.register_buffer(name, tensor)
    splicer.made.append(splicer.graph.get_attr(name))
    return splicer.made[-1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
