"""Attention that leaves out tiles (:mod:`attnfx.sites.skipping`): what of it can be lowered, and with which blocks.

The tile that is decided on is the kernel's block, so it is the variant's to choose and never tuned.
"""

from __future__ import annotations

import math

import torch

from attnfx.expr import ONE
from attnfx.lowering.configs import SHARED_LIMIT, Config, Tile, default, padded, target_of
from attnfx.site import AttentionSite
from attnfx.sites.skipping import Skip


def objections(site: AttentionSite) -> tuple[str, ...]:
    """Why a site that leaves out tiles has no plan, as sentences; empty where it has, and for all other sites."""
    if site.skip is None:
        return ()
    found = []
    if site.requires_grad:
        found.append("tiles are left out by their scores and a gradient is wanted; such an attention is for inference.")
    if site.band is not None:
        found.append("tiles are left out and the scores hold a second product; here the scores are of q.k and side tensors.")
    if site.weight != ONE or site.normaliser != "softmax":
        found.append("tiles are left out and the probabilities are more than a softmax: a factor, or none that divides.")
    if not found and site.device.startswith("cuda") and torch.cuda.is_available():
        found += _too_large(site, site.skip)
    return tuple(found)


def _too_large(site: AttentionSite, skip: Skip) -> list[str]:
    """Why a tile is no block of a kernel on the site's device."""
    target, width = target_of(torch.device(site.device)), max(padded(site.head_dim), padded(site.value_dim))
    usual = default("forward", site.dtype, site.head_dim, site.value_dim, target)
    most = usual.block_m * usual.block_n if site.dtype == torch.float32 else 128 * 128 * 128 // max(width, 128)
    found = []
    if skip.rows * skip.keys > most:
        found.append(
            f"the tiles have {skip.rows} x {skip.keys} scores; of {site.dtype} and head_dim {site.head_dim} the registers of "
            f"{target} hold {most}, as of {usual.block_m} x {usual.block_n}."
        )
    used = _bytes(skip, site.dtype, site.head_dim, site.value_dim)
    if sum(used) > SHARED_LIMIT[target]:
        found.append(
            f"tiles of {skip.rows} x {skip.keys} take {sum(used)} bytes of shared memory; {target} has {SHARED_LIMIT[target]}."
        )
    return found


def _bytes(skip: Skip, dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[int, int]:
    """Shared memory of a tile of queries, and of one of keys and values."""
    queries, both = padded(head_dim), padded(head_dim) + padded(value_dim)
    return skip.rows * queries * dtype.itemsize, skip.keys * both * dtype.itemsize


def limit(skip: Skip | None, keys: int) -> float | None:
    """log2(lambda) for the kernels; None: nothing is left out."""
    return None if skip is None else skip.limit(keys) * math.log2(math.e)


def config(skip: Skip, dtype: torch.dtype, head_dim: int, value_dim: int, target: str) -> Config:
    """Blocks of the flash kernel: the tile, as many warps as its scores want, as many stages as shared memory holds."""
    large = dtype == torch.float32 or skip.rows * skip.keys > 64 * 64 or max(padded(head_dim), padded(value_dim)) > 128
    queries, step = _bytes(skip, dtype, head_dim, value_dim)
    stages = max(1, min(2 if target == "gfx942" else 3, (SHARED_LIMIT[target] - queries) // step))
    return Config(skip.rows, skip.keys, 8 if large else 4, stages)


def tile(skip: Skip, dtype: torch.dtype, head_dim: int, value_dim: int, target: str) -> Tile:
    """Keys, warps and stages of the split-KV kernels."""
    made = config(skip, dtype, head_dim, value_dim, target)
    return Tile(skip.keys, made.num_warps, made.num_stages)
