"""Blocks of rows through torch's CPU flash kernel, where the plan is scale * dot + bias under a mask: several times faster.

The kernel has SDPA's meaning: it drops masked keys and gives rows without keys 0. A block that holds a row for which the model
means something else is left to the textbook's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.lowering.plan import UNREACHABLE
from attnfx.lowering.portable import bands, shifted
from attnfx.lowering.portable.affine import Affine, affine
from attnfx.lowering.portable.blocks import Block, Problem
from attnfx.lowering.portable.picked import Layout

#: Mask elements in one call (16 MB of float32), and query rows of one call with a mask; half as many where so few keys meet them
#: that the masked corners of a block are a good part of it.
ELEMENTS = 1 << 22
ROWS = 256
#: Rows of one call where tiles of keys are picked.
STEPS = (ROWS // 4, ROWS // 2, ROWS)


@dataclass(frozen=True)
class Fused:
    """One problem in this form; :meth:`of` says whether it has it."""

    problem: Problem
    form: Affine

    @staticmethod
    def of(problem: Problem) -> Fused | None:
        plan, q, v = problem.plan, problem.q, problem.v
        if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or q.shape[3] != v.shape[3]:
            return None
        form = affine(plan.site.score)
        if plan.site.skip is not None:
            return None
        if form is None or plan.site.normaliser != "softmax" or plan.site.dropout > 0.0 or plan.weight is not None or problem.empty:
            return None
        return Fused(problem, form)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (p.q, p.k, p.v))  # the kernel does not look
        return q, k, v

    @property
    def whole(self) -> bool:
        """Plain causal attention of equal lengths, or no mask and no bias: one call, no mask tensor."""
        plan = self.problem.plan
        triangular = plan.masked and plan.facts.causal_offset == 0 and self.problem.rows == self.problem.keys
        plain = self.form.bias is None and plan.site.band is None
        return plain and (not plan.masked or (triangular and self.certain))

    @cached_property
    def certain(self) -> bool:
        """No row is without keys, and no fill is in reach of a score: known without looking."""
        plan = self.problem.plan
        return not plan.exact_rows and (not plan.masked or plan.facts.nonempty)

    def rows(self) -> Iterator[range]:
        p, step = self.problem, self._step()
        for first in range(0, p.rows, step):
            yield range(first, min(first + step, p.rows))

    @cached_property
    def names(self) -> list[str]:
        """On which of b, h and i a mask depends."""
        parts = [e for e in (self.form.bias, self.problem.plan.site.keep) if e is not None]
        each = self.problem.plan.site.band is not None
        return [name for name in "bhi" if each or any(expr.depends_on(e, name) for e in parts)]

    @cached_property
    def layout(self) -> Layout | None:
        """Which rows, batches and heads one call has, where tiles of keys are picked."""
        return None if self.whole else self.problem.layout(STEPS if "i" in self.names else (self.problem.rows,))

    def _step(self) -> int:
        """Query rows of one call: all of them where one row of the mask is that of every query."""
        p, layout = self.problem, self.layout
        if self.whole or "i" not in self.names:
            return p.rows
        batch, heads = (p.batch, p.heads) if layout is None else (layout.batches, layout.key_heads * p.group)
        copies = math.prod(n for n, name in ((batch, "b"), (heads, "h")) if name in self.names)
        room = max(1, ELEMENTS // (copies * p.keys))
        if layout is not None:
            return min(layout.rows, room)
        last = p.block(range(p.batch), range(p.heads), range(max(0, p.rows - ROWS), p.rows))
        return min(ROWS // 2 if len(last.keys) <= 2 * ROWS else ROWS, room)

    def blocks(self, rows: range) -> Iterator[Block]:
        """The calls of some rows."""
        p = self.problem
        if self.whole:
            yield Block(range(p.batch), range(p.heads), rows, range(p.keys), True)
            return
        batches, heads = (p.batch, p.heads) if self.layout is None else (self.layout.batches, self.layout.key_heads * p.group)
        for b in range(0, p.batch, batches):
            for h in range(0, p.heads, heads):
                yield p.block(range(b, b + batches), range(h, h + heads), rows)

    def mask(self, block: Block) -> tuple[bool, Tensor | None]:
        """(whether the kernel means what the model means, the additive mask (b, h, R, C) of the block)."""
        p, plan = self.problem, self.problem.plan
        if self.whole:
            return True, None
        if block.width < 2:  # torch 2.11's kernel wants to view a mask of one key, which cannot be viewed
            return False, None
        bias = None
        if self.form.bias is not None:
            bias = evaluate(self.form.bias, p.grid(block), p.loads, p.values, known=p.known(self.form.bias, block)).float()
        if (band := bands.product(p, block)) is not None:
            bias = band * self.form.scale if bias is None else band * self.form.scale + bias
        if bias is None and not block.full and block.unsure is not None and plan.site.fill <= UNREACHABLE:
            # all other columns are kept, so that no row is without keys
            part = _masked(None, p.unsure(block, block.unsure))
            mask = part.new_zeros((*part.shape[:-1], block.width))
            mask[..., block.unsure] = part
            while mask.dim() < 4:
                mask = mask[None]
            return True, mask.expand(*mask.shape[:2], len(block.rows), block.width)
        if bias is None and self.certain and (remembered := shifted.additive(p, block)) is not None:
            return True, remembered[None, None]
        keep = p.keep(block)
        if keep is not None:
            if not self.certain and (plan.site.fill > UNREACHABLE or not bool(keep.any(-1).all())):
                return False, None
            bias = _masked(bias, keep)
        if bias is not None and plan.exact_rows:
            top = bias.amax(-1)
            if not bool(((top > plan.floor) & (top < -plan.hidden)).all()):
                return False, None
        if bias is not None:
            while bias.dim() < 4:
                bias = bias[None]
            bias = bias.expand(*bias.shape[:2], len(block.rows), block.width)
        return True, bias

    def forward(self, block: Block, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """O (B',H',R,D) and the natural LSE (B',H',R)."""
        q, k, v = self.tensors
        at, read = block.place, self.problem.read
        found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[at],
            read(k, block),
            read(v, block),
            0.0,
            self.whole and self.problem.plan.masked,
            attn_mask=mask,
            scale=self.form.scale,
        )
        return found

    def backward(
        self, block: Block, mask: Tensor | None, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq (B',H',R,D), and this block's parts of dk and dv (B',HK',C,D)."""
        q, k, v = self.tensors
        at, read = block.place, self.problem.read
        grad = grad_out[at]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad if grad.stride(3) == 1 else grad.contiguous(), q[at], read(k, block), read(v, block), out[at],
            lse[at], 0.0, self.whole and self.problem.plan.masked, attn_mask=mask, scale=self.form.scale,
        )  # fmt: skip
        return found


def _masked(bias: Tensor | None, keep: Tensor) -> Tensor:
    """``bias``, -inf where ``keep`` is not. A sum takes a third of the time of a choice, where the mask is the smaller of the two
    and no sum with -inf is NaN."""
    none = torch.zeros((), dtype=torch.float32, device=keep.device)
    if bias is None:
        return torch.where(keep, none, -math.inf)
    size = math.prod(map(max, zip_longest(bias.shape[::-1], keep.shape[::-1], fillvalue=1)))
    if 2 * keep.numel() <= size and bool(bias.amax() < math.inf):
        return bias + torch.where(keep, none, -math.inf)
    return torch.where(keep, bias, -math.inf)
