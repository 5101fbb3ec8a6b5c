"""Host side of the kernels of linear attention: allocates, picks blocks and chunks, launches. Deterministic: no atomics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnfx.lowering.configs import padded
from attnfx.lowering.launch import run
from attnfx.lowering.linear.portable import Result, divided_by, gradient_of_sums
from attnfx.lowering.templates.delta import flash_delta
from attnfx.lowering.templates.linear import linear_mix, linear_scan, linear_states

#: Tokens whose states are summed by one program where none is wanted in between.
WHOLE_CHUNK = 512
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

    @property
    def wide(self) -> bool:
        """Products of bfloat16 run in bfloat16; float16 is widened, since sums over keys overflow it, and costs its own bits."""
        return self.q.dtype != torch.bfloat16

    @property
    def block(self) -> int:
        """Rows of a tile."""
        return 32 if self.wide else 64

    def blocks(self, width: int) -> int:
        """Of an axis of features."""
        return min(32 if self.wide else 64, padded(width))

    @property
    def chunk(self) -> int:
        """Tokens between two states that are kept: about as many numbers as the operands have."""
        if not self.causal:
            return WHOLE_CHUNK
        d, dv = self.q.shape[3], self.v.shape[3]
        return max(64, min(512, 1 << (2 * d * dv // (d + dv)).bit_length() - 1))

    @property
    def precision(self) -> str:
        return "tf32" if self.q.dtype == torch.float16 else "ieee"

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
        block_d, block_e = self.blocks(d), self.blocks(dv)
        grid = chunks * -(-d // block_d) * -(-dv // block_e) * batch * heads
        if grid:
            run(
                linear_states, (grid,), x, y, made, totals, scale, add, self.rates, x.stride(), y.stride(), heads,
                heads // x.shape[1], heads // y.shape[1], n, self.chunk, BACK=back, D=d, E=dv, BLOCK=self.block,
                BLOCK_D=block_d, BLOCK_E=block_e, num_warps=4, num_stages=2, **self.switches,
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
        sums: Tensor, eps: float = 0.0, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """(B,.,S,E), contiguous: the output or a gradient, as the template says; ``turned``: the state is transposed."""
        batch, own, tokens, width = x1.shape
        out = x1.new_empty((batch, own, tokens, z.shape[3]), dtype=dtype or z.dtype)
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


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, state_sums: Tensor | None, causal: bool,
    normalize: bool, eps: float, divisor: str = "add",
) -> Result:  # fmt: skip
    """As :func:`attnfx.lowering.linear.portable.forward`."""
    call = _Call(q, k, v, decay, causal, normalize, divisor)
    with call.device:
        *states, final, final_sums = call.states(k, v, state, state_sums, False, q, q)
        sums = q.new_empty(q.shape[:3] if normalize else (0,), dtype=torch.float32)
        out = call.mix("output", q, k, v, tuple(states), False, sums, sums, sums, eps)
    return Result(out, sums, final, final_sums)


def backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, state_sums: Tensor | None, out: Tensor,
    sums: Tensor, grad_out: Tensor, grad_sums: Tensor | None, grad_state: Tensor | None, grad_state_sums: Tensor | None,
    causal: bool, normalize: bool, eps: float, divisor: str = "add",
) -> list[Tensor]:  # fmt: skip
    """As :func:`attnfx.lowering.linear.portable.backward`; the states are made again."""
    call = _Call(q, k, v, decay, causal, normalize, divisor)
    with call.device:
        scale, add = _upstream(out, sums, grad_out, grad_sums, eps, divisor) if normalize else (sums, sums)
        *states, _, _ = call.states(k, v, state, state_sums, False, q, q)
        dq = call.mix("query", grad_out, v, k, tuple(states), True, scale, add, sums)
        *grads, begun, begun_sums = call.states(q, grad_out, grad_state, grad_state_sums, True, scale, add)
        dk = call.mix("key", v, grad_out, q, tuple(grads), True, scale, add, sums)
        dv = call.mix("value", k, q, grad_out, tuple(grads), False, scale, add, sums)
    return [dq, dk, dv, begun, begun_sums]


def _upstream(
    out: Tensor, sums: Tensor, grad_out: Tensor, grad_sums: Tensor | None, eps: float, divisor: str
) -> tuple[Tensor, Tensor]:
    """What divides, inverted, and the gradient of the sums, (B,H,M) fp32 each."""
    r, delta = 1.0 / divided_by(sums, eps, divisor), torch.empty_like(sums)
    batch, heads, m, dv = out.shape
    block_m = max(16, 2048 // padded(dv))
    if sums.numel():
        run(
            flash_delta, (-(-m // block_m) * batch * heads,), out, grad_out, delta, delta, out.stride(), grad_out.stride(), heads,
            m, HAS_GRAD_LSE=False, DV=dv, BLOCK_M=block_m, BLOCK_DV=padded(dv),
        )  # fmt: skip
    return r, gradient_of_sums(delta, r, sums, grad_sums, eps, divisor)
