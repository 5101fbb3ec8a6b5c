"""`attnfx::page_scores`: how well each page of a key-value cache goes with a query, for variants that choose pages."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnfx.lowering.configs import padded
from attnfx.lowering.mapped import looped
from attnfx.lowering.ops import _TAGS, LIBRARY

LIBRARY.define("page_scores(Tensor key, Tensor by, int page) -> Tensor", tags=_TAGS)
#: Rows of a tile of keys; a larger page is a tile.
ROWS = 64


def page_scores(key: Tensor, by: Tensor, page: int) -> Tensor:
    """Means of by . k over pages of ``page`` keys, (B, HK, pages) float32, of k (B, HK, N, D) in half precision and ``by``
    (B, HK, 1, D) float32. The last page may have fewer keys. Not differentiable: a choice has no gradient."""
    number = -(-key.shape[2] // page)
    products = pad(key.float() * by, (0, 0, 0, number * page - key.shape[2]))
    count = torch.clamp(key.shape[2] - page * torch.arange(number, device=key.device), max=page)
    found: Tensor = torch.unflatten(products, 2, (number, page)).sum((3, 4)) / count
    return found


def _by_kernel(key: Tensor, by: Tensor, page: int) -> Tensor:
    from attnfx.lowering import replay

    def call() -> Tensor:
        return launched(key, by, page)

    return replay.repeated(call, ("page_scores", page), (key, by))


def launched(key: Tensor, by: Tensor, page: int) -> Tensor:
    """:func:`page_scores` by its kernel."""
    from attnfx.lowering.launch import run
    from attnfx.lowering.templates.page_scores import page_scores as kernel

    (batch, heads, keys, width), rows = key.shape, 1 << (page - 1).bit_length()
    number, together = -(-keys // page), max(1, ROWS // rows)
    scores = key.new_empty((batch, heads, number), dtype=torch.float32)
    with torch.cuda.device(key.device) if key.is_cuda else nullcontext():
        run(
            kernel, (-(-number // together) * batch * heads,), key, by.contiguous(), scores, key.stride(), heads, keys, number,
            PAGE=page, PADDED=rows, PAGES=together, D=width, BLOCK_D=padded(width), num_warps=4,
        )  # fmt: skip
    return scores


def _on_cpu(key: Tensor, by: Tensor, page: int) -> Tensor:
    return (_by_kernel if os.environ.get("TRITON_INTERPRET") == "1" else page_scores)(key, by, page)


def _fake(key: Tensor, by: Tensor, page: int) -> Tensor:
    pages: Any = (key.shape[2] + page - 1) // page
    return key.new_empty((key.shape[0], key.shape[1], pages), dtype=torch.float32)


LIBRARY.impl("page_scores", _on_cpu, "CPU")
LIBRARY.impl("page_scores", _by_kernel, "CUDA")
torch.library.register_fake("attnfx::page_scores", _fake, lib=LIBRARY)
torch.library.register_vmap("attnfx::page_scores", looped("page_scores"), lib=LIBRARY)
