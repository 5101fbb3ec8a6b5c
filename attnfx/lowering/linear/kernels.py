"""Host side of the kernels of linear attention: allocates, picks blocks and chunks, launches. Deterministic: no atomics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering import descriptors, launch
from attnfx.lowering.configs import padded, target_of
from attnfx.lowering.decode import multiprocessors
from attnfx.lowering.launch import run
from attnfx.lowering.linear.portable import Result, divided_by, gradient_of_sums, laid_like
from attnfx.lowering.templates.delta import flash_delta
from attnfx.lowering.templates.linear import linear_mix, linear_scan, linear_states
from attnfx.lowering.templates.linear_walk import linear_walk

#: Tokens whose states are summed by one program where none is wanted in between.
WHOLE_CHUNK = 512
#: Features of which a program of a walk carries all in its registers.
WIDEST = 128
#: Programs of a walk that share a multiprocessor, and the fewest tokens of one.
SHARED_BY, SHORTEST = 2, 256
#: Elements of a state that a program of the scan carries.
SCANNED = 512


@dataclass(frozen=True)
class _Call:
    """What all launches of a call share: sizes, the chunk, and the constants of the kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    causal: bool
    normalize: bool
    divisor: str = "add"
    scale: float = 1.0

    @property
    def wide(self) -> bool:
        """Products of bfloat16 run in bfloat16; float16 is widened, since sums over keys overflow it, and costs its own bits."""
        return self.q.dtype != torch.bfloat16 or self.odd

    @property
    def odd(self) -> bool:
        """Whether features are many and rows of them start anywhere: bfloat16 kernels for such rows read beyond their tensors on an
        H200 (Triton 3.6), though their addresses do not in the interpreter; widened, the same calls are right there."""
        widths = (self.q.shape[3], self.v.shape[3])
        return max(widths) > 64 and any(width % 16 for width in widths)

    @property
    def block(self) -> int:
        """Rows of a tile."""
        return 32 if self.wide else 64

    def blocks(self, width: int) -> int:
        """Of an axis of features."""
        return min(32 if self.wide else 64, padded(width))

    @property
    def chunk(self) -> int:
        """Tokens between two states that are kept: about as many numbers as the operands have, or those of a walk."""
        if not self.causal:
            return WHOLE_CHUNK
        if self.walks:
            return self.segment
        d, dv = self.q.shape[3], self.v.shape[3]
        return max(64, min(512, 1 << (2 * d * dv // (d + dv)).bit_length() - 1))

    @property
    def walks(self) -> bool:
        """Whether programs walk over segments of the tokens with a state in their registers."""
        narrow = max(self.q.shape[3], self.v.shape[3]) <= WIDEST
        return self.causal and self.q.dtype != torch.float32 and narrow and not self.odd

    @property
    def target(self) -> str:
        return launch.recorded_target() or target_of(self.q.device)

    @property
    def warps(self) -> int:
        """Of the programs that hold a large state: Ampere's products take all operands from registers."""
        return 8 if self.target.startswith("sm8") and not self.wide else 4

    @property
    def columns(self) -> int:
        """Of a state that a program of a walk carries."""
        return 32 if self.wide else 64

    @property
    def segment(self) -> int:
        """Tokens of a walk: whole blocks, in as many segments as keep the device busy."""
        batch, heads, tokens, d = self.q.shape
        beside = batch * heads * -(-max(d, self.v.shape[3]) // self.columns)
        segments = max(1, SHARED_BY * multiprocessors(self.q.device) // max(beside, 1))
        return max(SHORTEST, -(-tokens // (segments * self.block)) * self.block)

    @property
    def precision(self) -> str:
        return "ieee" if self.q.dtype == torch.float32 else "tf32"

    @property
    def switches(self) -> dict[str, Any]:
        return {
            "DECAY": self.decay is not None, "NORMALIZE": self.normalize, "HALF": not self.wide, "PRECISION": self.precision,
        }  # fmt: skip

    @property
    def device(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext()

    @property
    def rates(self) -> Tensor:
        """The log-decays, or what stands for them."""
        return self.q if self.decay is None else self.decay.float().contiguous()

    def states(
        self, x: Tensor, y: Tensor, begun: Tensor | None, sums: Tensor | None, back: bool, scale: Tensor, add: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States beside each chunk (B,H,T,D,DV) and their sums (B,H,T,D), and those behind all; of x and y, with ``begun`` first.

        Not causal, the first two are those behind all, with T = 1.
        """
        (batch, heads, _, d), n, dv = self.q.shape, x.shape[2], self.v.shape[3]
        chunks = -(-n // self.chunk)
        made = self.q.new_empty((batch, heads, chunks, d, dv), dtype=torch.float32)
        totals = self.q.new_empty((batch, heads, chunks, d) if self.normalize else (0,), dtype=torch.float32)
        final = made.new_empty((batch, heads, d, dv))
        final_sums = made.new_empty((batch, heads, d) if self.normalize else (0,))
        block_d, block_e = (min(32 if self.wide else 128, padded(width)) for width in (d, dv))
        grid = chunks * -(-d // block_d) * -(-dv // block_e) * batch * heads
        if grid:
            run(
                linear_states, (grid,), x, y, made, totals, scale, add, self.rates, x.stride(), y.stride(), heads,
                heads // x.shape[1], heads // y.shape[1], n, self.chunk, BACK=back, D=d, E=dv, BLOCK=self.block,
                BLOCK_D=block_d, BLOCK_E=block_e, num_warps=self.warps, num_stages=2 if self.wide else 3, **self.switches,
            )  # fmt: skip
        scanned = [(made, begun, final, d * dv), (totals, sums, final_sums, d)][: 2 if self.normalize else 1]
        for by_chunk, before, after, size in scanned:
            first = None if before is None else before.float().contiguous()
            if batch * heads:
                run(
                    linear_scan, (-(-size // SCANNED) * batch * heads,), by_chunk, after if first is None else first, after,
                    self.rates, heads, size, n, self.chunk, BACK=back, DECAY=self.decay is not None, BEGUN=first is not None,
                    WRITE=self.causal, BLOCK=SCANNED, STAGES=4, num_warps=4,
                )  # fmt: skip
        if not self.causal:
            return final[:, :, None], final_sums[:, :, None] if self.normalize else final_sums, final, final_sums
        return made, totals, final, final_sums

    def mix(
        self, mode: str, x1: Tensor, x2: Tensor, z: Tensor, states: tuple[Tensor, ...], turned: bool, scale: Tensor, add: Tensor,
        sums: Tensor, like: Tensor, eps: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """(B,.,S,E): the output or a gradient, as the template says, laid like ``like``; ``turned``: the state is transposed."""
        if self.walks:
            return self.walk(mode, x1, x2, z, states, turned, scale, add, sums, like, eps)
        batch, own, tokens, width = x1.shape
        out = laid_like(like, z.shape[3], z.dtype)
        outer, chunks, d, e = states[0].stride()[1:] if states[0].numel() else (0, 0, 0, 0)
        strides = (outer, chunks, e, d) if turned else (outer, chunks, d, e)
        block_w, block_e = self.blocks(width), self.blocks(z.shape[3])
        grid = -(-tokens // self.block) * -(-z.shape[3] // block_e) * batch * own
        heads, heavy = self.q.shape[1], self.wide and mode == "key"
        if grid:
            run(
                linear_mix, (grid,), x1, x2, z, out, states[0], states[1], scale, add, sums, self.rates, x1.stride(), x2.stride(),
                z.stride(), out.stride(), strides, heads, heads // self.k.shape[1], tokens, self.chunk, eps, MODE=mode,
                CAUSAL=self.causal, W=width, E=z.shape[3], BLOCK=self.block, BLOCK_W=block_w, BLOCK_E=block_e,
                num_warps=8 if width > 256 or heavy else 4, num_stages=1 if heavy else 2,
                DIVISOR=self.divisor.partition(" ")[0], **self.switches,
            )  # fmt: skip
        return out

    def walk(
        self, mode: str, x1: Tensor, x2: Tensor, z: Tensor, states: tuple[Tensor, ...], turned: bool, scale: Tensor, add: Tensor,
        sums: Tensor, like: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        """As :meth:`mix`. Gradients of keys and values are made for each query head, and added up."""
        (batch, own, tokens, width), heads, e = x1.shape, self.q.shape[1], z.shape[3]
        out = laid_like(like, e, z.dtype)
        each = out if own == heads else x1.new_empty((batch, heads, tokens, e), dtype=torch.float32)
        outer, segments, rows, columns = states[0].stride()[1:]
        strides = (outer, segments, columns, rows) if turned else (outer, segments, rows, columns)
        block_w, block_e = padded(width), min(self.columns, padded(e))
        grid = -(-tokens // self.segment) * -(-e // block_e) * batch * heads
        tma = all(descriptors.serves(self.target, x) for x in (x1, x2, z))
        read: list[Any] = [x1, x2, z]
        if tma:
            widths = (block_w, block_w, block_e)
            read = [descriptors.describe(x, self.block, wide) for x, wide in zip(read, widths, strict=True)]
        if grid:
            run(
                linear_walk, (grid,), *read, each, states[0], states[1], scale, add, sums, self.rates, x1.stride(), x2.stride(),
                z.stride(), each.stride(), strides, heads, heads // self.k.shape[1], tokens, self.segment, eps, self.scale,
                MODE=mode, W=width, E=e, BLOCK=self.block, BLOCK_W=block_w, BLOCK_E=block_e, STAGES=2,
                DIVISOR=self.divisor.partition(" ")[0], num_warps=self.warps, TMA=tma, **self.switches,
            )  # fmt: skip
        return out if each is out else out.copy_(each.view(batch, own, -1, tokens, e).sum(2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, state_sums: Tensor | None, causal: bool,
    normalize: bool, eps: float, divisor: str = "add", scale: float = 1.0,
) -> Result:  # fmt: skip
    """As :func:`attnfx.lowering.linear.portable.forward`."""
    call = _made(q, k, v, decay, causal, normalize, divisor, scale)
    with call.device:
        *states, final, final_sums = call.states(k, v, state, state_sums, False, q, q)
        sums = q.new_empty(q.shape[:3] if normalize else (0,), dtype=torch.float32)
        out = call.mix("output", call.q, k, v, tuple(states), False, sums, sums, sums, q, eps)
    return Result(out, sums, final, final_sums)


def backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, state_sums: Tensor | None, out: Tensor,
    sums: Tensor, grad_out: Tensor, grad_sums: Tensor | None, grad_state: Tensor | None, grad_state_sums: Tensor | None,
    causal: bool, normalize: bool, eps: float, divisor: str = "add", scale: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """As :func:`attnfx.lowering.linear.portable.backward`; the states are made again."""
    call = _made(q, k, v, decay, causal, normalize, divisor, scale)
    with call.device:
        by, add = _upstream(out, sums, grad_out, grad_sums, eps, divisor) if normalize else (sums, sums)
        *states, _, _ = call.states(k, v, state, state_sums, False, q, q)
        dq = call.mix("query", grad_out, v, k, tuple(states), True, by, add, sums, q)
        # all of a walk's result is scaled, and what comes from behind the last key is not to be
        last, last_sums = (None if g is None else g / call.scale for g in (grad_state, grad_state_sums))
        *grads, begun, begun_sums = call.states(call.q, grad_out, last, last_sums, True, by, add)
        dk = call.mix("key", v, grad_out, call.q, tuple(grads), True, by, add, sums, k)
        dv = call.mix("value", k, call.q, grad_out, tuple(grads), False, by, add, sums, v)
    if call.scale != 1.0:
        return [dq, dk, dv, begun * call.scale, begun_sums * call.scale]
    return [dq if scale == 1.0 else dq * scale, dk, dv, begun, begun_sums]


def _made(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, causal: bool, normalize: bool, divisor: str, scale: float
) -> _Call:
    """A call, with a scale if it walks; without one, the queries are scaled."""
    call = _Call(q, k, v, decay, causal, normalize, divisor, scale)
    ordinary = call.walks and 2.0**-20 < abs(scale) < 2.0**20  # gradients of states are divided by it
    return call if scale == 1.0 or ordinary else replace(call, q=q * scale, scale=1.0)


def _upstream(
    out: Tensor, sums: Tensor, grad_out: Tensor, grad_sums: Tensor | None, eps: float, divisor: str
) -> tuple[Tensor, Tensor]:
    """What divides, inverted, and the gradient of the sums, (B,H,M) fp32 each."""
    r, delta = 1.0 / divided_by(sums, eps, divisor), torch.empty_like(sums)
    batch, heads, m, dv = out.shape
    block_m = max(16, 2048 // padded(dv))
    if sums.numel():
        run(
            flash_delta, (-(-m // block_m) * batch * heads,), out, grad_out, delta, None, delta, None, out.stride(),
            grad_out.stride(), heads, m, HAS_GRAD_LSE=False, DV=dv, BLOCK_M=block_m, BLOCK_DV=padded(dv),
        )  # fmt: skip
    return r, gradient_of_sums(delta, r, sums, grad_sums, eps, divisor)
