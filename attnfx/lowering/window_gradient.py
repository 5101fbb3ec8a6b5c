"""Host side of the gradient of a band's window: how many programs share a distance, and the sum of what they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfx.lowering.band_launch import launched
from attnfx.lowering.bands import Arguments
from attnfx.lowering.call import Call, Program, Residuals
from attnfx.lowering.flash import statistics
from attnfx.lowering.launch import run
from attnfx.lowering.templates.window_gradient import flash_window_gradient

#: So many programs keep a large GPU busy.
PROGRAMS = 1024


def window_gradient(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    residuals: Residuals,
    grad_out: Tensor,
    loads: Sequence[Tensor],
    ints: Sequence[int],
    band: Arguments,
    *,
    batch_broadcast: bool,
    head_broadcast: bool,
    grad_lse: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """(BB,BH,M+N-1,D) fp32, BB being 1 or B and BH 1 or H: the gradient of the window of ``band``; the other arguments are those of
    :func:`attnfx.lowering.flash.bias_gradient`. Deterministic: no atomics."""
    launch = Call.of("diagonal_bias", program, q, k, v, loads, ints, dropout_p, seed, None, True, blocks, True)
    owners = 1 if batch_broadcast else launch.batch, 1 if head_broadcast else launch.heads
    m, n, block = launch.m, launch.n, launch.config.block_n
    if launch.empty:
        return q.new_zeros((*owners, max(m + n - 1, 0), launch.d), dtype=torch.float32)
    row_tiles, key_tiles = -(-m // block), -(-n // block)
    slots, members = row_tiles + key_tiles - 1, launch.batch * launch.heads // (owners[0] * owners[1])
    parts = max(1, min(members, PROGRAMS // (slots * owners[0] * owners[1])))
    grad = q.new_empty((2, *owners, parts, slots * block, launch.d), dtype=torch.float32)
    *tiles, tma = launch.streamed(q, k, v, grad_out)
    with launch.device:
        _, stats = statistics(launch, out, residuals, grad_out, grad_lse)
        run(
            flash_window_gradient, (slots * owners[0] * owners[1] * parts,), *tiles, grad, stats, launch.seed,
            q.stride(), k.stride(), v.stride(), grad_out.stride(), *launch.scalars, launch.lists, launch.batch, parts,
            *launched(band),
            SCORE_GRAD=program.score_grad, KV_RANGE=program.kv_range, BATCH_BROADCAST=batch_broadcast,
            HEAD_BROADCAST=head_broadcast, LISTS=blocks is not None, TMA=tma, **launch.even, **launch.switches,
        )  # fmt: skip
    lower, upper = grad.sum(3) if parts > 1 else grad[:, :, :, 0]
    # slot s begins at the distance (s - row_tiles + 1) * block, its lower block one before
    total = torch.zeros((*owners, (slots + 1) * block, launch.d), dtype=torch.float32, device=q.device)
    total[..., :-block, :] += lower
    total[..., block:, :] += upper
    first = row_tiles * block - (m - 1)
    return total[..., first : first + m + n - 1, :]
