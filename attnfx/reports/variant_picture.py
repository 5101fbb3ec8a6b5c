"""Which keys a variant lets each query see, as a picture: read off its oracle, whose values are the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from attnfx.variants.base import Example

_WIDTH, _BATCH, _HEADS = 16, 1, 4


def weights(example: Example, seed: int = 0) -> Tensor:
    """What each key's value weighs in each query's output, (H, M, N) in float64, of random queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (_BATCH, _HEADS, example.queries, _WIDTH), (_BATCH, example.key_heads, example.keys, _WIDTH)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    eye = torch.eye(example.keys, dtype=torch.float64).expand(_BATCH, example.key_heads, -1, -1)
    return example.variant.reference(q, k, eye, 0.25, causal=example.causal)[0]


def picture(example: Example) -> str:
    """Rows of queries, columns of keys, two rows a line; heads that see the same keys share a picture."""
    seen = weights(example).nan_to_num() != 0
    pictures: dict[str, list[int]] = {}
    for head, each in enumerate(seen):
        pictures.setdefault(_blocks(each), []).append(head)
    if len(pictures) == 1:
        return next(iter(pictures))
    return "\n\n".join(f"head {', '.join(map(str, heads))}\n{drawn}" for drawn, heads in pictures.items())


def _blocks(seen: Tensor) -> str:
    rows = [[bool(x) for x in row] for row in seen.tolist()]
    rows += [[False] * len(rows[0])] * (len(rows) % 2)
    marks = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): "·"}
    return "\n".join(
        "".join(marks[pair] for pair in zip(upper, lower, strict=True)) for upper, lower in zip(rows[::2], rows[1::2], strict=True)
    )
