"""`attnfx::pair_columns`: the columns beside queries and keys that two networks make of a pair representation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.biases.pair_network import factors, features
from attnfx.lowering.mapped import looped
from attnfx.lowering.ops import LIBRARY

LIBRARY.define(
    "pair_columns(Tensor pair, Tensor[] query_layers, Tensor[] key_layers, Tensor scale, Tensor query) -> (Tensor, Tensor)"
)


def pair_columns(
    pair: Tensor, query_layers: Sequence[Tensor], key_layers: Sequence[Tensor], scale: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    """``pair`` (P, N, N, C) as columns of queries and of keys, (B, H, N, R) each in the dtype of ``query`` (B, H, N, D).

    B is a multiple of P. Columns of queries are divided by ``scale`` (H). Computed in float32, outside of any autocast.
    """
    with torch.autocast(pair.device.type, enabled=False):
        u, v = factors(tuple(query_layers), tuple(key_layers), scale.shape[0], features(pair))
        u = u / scale[:, None, None]
    batch, heads, tokens = query.shape[:3]
    repeats = batch // pair.shape[0]
    made = [t.to(query.dtype).unsqueeze(1).expand(-1, repeats, -1, -1, -1).reshape(batch, heads, tokens, -1) for t in (u, v)]
    return made[0], made[1]


LIBRARY.impl("pair_columns", pair_columns, "CompositeImplicitAutograd")
torch.library.register_vmap("attnfx::pair_columns", looped("pair_columns"), lib=LIBRARY)
