"""One decode step of attention: attnfx, scaled_dot_product_attention and flex_attention side by side, in one run.

    python -m benchmarks.decode [--quick] [--rows GLOB] [--out FILE] [--device cuda|cpu]

One query a sequence, 32 query heads over 8 key heads of width 128, bf16, batch 1, 8 and 64, caches of 1k to 128k keys: plain, with
a key-padding mask that is data, and with a sliding window of 4096 keys. On a GPU each call is captured in a CUDA graph, so that
what is timed is the device's work: CUDA events around a replay with a cold L2 cache, the median. The peer "attnfx" is whatever
`torch.compile(step, backend="attnfx")` decides (plain attention: torch's own kernel); "split" is attnfx's split-KV kernel on plain
attention, to compare that decision. Numbers are checked before they are timed, on the first sequence of the batch: relative L2
distance from float32. A peer that fails is a row of data with the error in it. `read` is how much of the keys and values that the
mask keeps a second brings in, which the memory bounds.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import command, timing
from benchmarks.command import Result

HEADS, KEY_HEADS, WIDTH, SCALE, WINDOW = 32, 8, 128, 0.25, 4096
BOUND = 2e-2
MASKS = ("plain", "padding", "window")
HEADER = ("row", "peer", "us", "read GB/s", "against sdpa", "distance")


@dataclass(frozen=True)
class Row:
    """One query for each of `batch` sequences over `keys` keys."""

    mask: str
    batch: int
    keys: int

    @property
    def name(self) -> str:
        return f"{self.mask}-b{self.batch}-n{self.keys}"

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B,32,1,128), k and v (B,8,N,128), bool keep (B,N): a quarter of each cache, less for later sequences, is padding."""
        noise = torch.Generator(device).manual_seed(0)
        shapes = (
            (self.batch, heads, length, WIDTH) for heads, length in ((HEADS, 1), (KEY_HEADS, self.keys), (KEY_HEADS, self.keys))
        )
        q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, generator=noise) for s in shapes)
        lost = torch.linspace(self.keys / 4, 0, self.batch, device=device)[:, None]
        return q * 0.5, k, v, torch.arange(self.keys, device=device) >= lost

    def kept(self, keep: Tensor) -> int:
        """How many keys, over all sequences, the mask keeps."""
        if self.mask == "padding":
            return int(keep.sum())
        return self.batch * (min(self.keys, WINDOW) if self.mask == "window" else self.keys)


def rows(quick: bool) -> list[Row]:
    lengths = (300, 1000) if quick else (1024, 4096, 16_384, 65_536, 131_072)
    return [Row(mask, batch, n) for mask in MASKS for batch in ((1, 2) if quick else (1, 8, 64)) for n in lengths]


def step(row: Row) -> Callable[..., Tensor]:
    """The attention as a model spells it, mask included."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = None
        if row.mask == "padding":
            mask = keep[:, None, None, :]
        elif row.mask == "window":
            n = k.shape[2]
            mask = (n - 1 - torch.arange(n, device=k.device) < WINDOW)[None, None, None, :]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)

    return attend


def peers(row: Row, keep: Tensor, device: str) -> Iterator[tuple[str, Callable[[], Callable[..., Tensor]]]]:
    """Names, and what makes the call; masks that can be made once before all steps are."""
    yield "sdpa", lambda: step(row)
    if device == "cuda":
        yield "flex", lambda: _flex(row, keep)
    yield "attnfx", lambda: _attnfx(row)
    if device == "cuda" and row.mask == "plain":
        yield "split", lambda: _split


def _attnfx(row: Row) -> Callable[..., Tensor]:
    from attnfx.backend import attnfx

    return torch.compile(step(row), backend=attnfx, dynamic=False)


def _split(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    from attnfx.lowering.crosscompile import DENSE
    from attnfx.lowering.flash import forward

    return forward(DENSE, q, k, v, (), ())[0]


def _flex(row: Row, keep: Tensor) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def padding(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return keep[b, j]

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return row.keys - 1 - j < WINDOW

    mod = {"padding": padding, "window": window}.get(row.mask)
    batch = row.batch if row.mask == "padding" else None
    blocks = create_block_mask(mod, batch, None, 1, row.keys, device=str(keep.device)) if mod else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, keep: compiled(q, k, v, block_mask=blocks, scale=SCALE, enable_gqa=True)  # type: ignore[return-value]


def reference(row: Row, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The first sequence in float32, (8,4,128)."""
    grouped, keys, values = q[0].float().view(KEY_HEADS, -1, WIDTH), k[0].float(), v[0].float()
    scores = grouped @ keys.transpose(-1, -2) * SCALE
    if row.mask == "padding":
        scores = scores.masked_fill(~keep[0], float("-inf"))
    elif row.mask == "window":
        scores[..., : max(row.keys - WINDOW, 0)] = float("-inf")
    return scores.softmax(-1) @ values


def run(row: Row, device: str) -> Iterator[Result]:
    """All peers of one row."""
    q, k, v, keep = row.tensors(device)
    truth = reference(row, q, k, v, keep)
    read = row.kept(keep) * KEY_HEADS * WIDTH * 2 * k.element_size()
    for peer, make in peers(row, keep, device):
        result: Result = {"row": row.name, "peer": peer}
        try:
            with torch.no_grad():
                result |= measured(make(), (q, k, v, keep), truth, read, device)
        except Exception as error:  # whatever a peer raises is what the row reports
            result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        timing.release(device)
        yield result


def measured(call: Callable[..., Tensor], arguments: tuple[Tensor, ...], truth: Tensor, read: int, device: str) -> Result:
    """Check, then time. Raises ArithmeticError where the numbers are wrong."""
    found = call(*arguments)[0].float().view(truth.shape)
    distance = float((found - truth).norm() / truth.norm())
    if not distance <= BOUND:
        raise ArithmeticError(f"relative L2 distance {distance:.2e} from float32; the bound is {BOUND:.0e}")

    def step() -> Tensor:
        return call(*arguments)

    ms = timing.median_ms(timing.captured(step) if device == "cuda" else step, device)
    return {"us": 1000 * ms, "read_gb_s": read / ms / 1e6, "distance": distance}


def table(results: list[Result]) -> str:
    """One line a peer."""
    theirs = {r["row"]: r["us"] for r in results if r["peer"] == "sdpa" and "us" in r}
    lines = [HEADER]
    for r in results:
        if "error" in r:
            lines.append((r["row"], r["peer"], f"failed: {r['error'][:80]}", "", "", ""))
            continue
        speed = f"{theirs[r['row']] / r['us']:.2f}x" if r["row"] in theirs else "-"
        lines.append((r["row"], r["peer"], f"{r['us']:.1f}", f"{r['read_gb_s']:.0f}", speed, f"{r['distance']:.1e}"))
    widths = [max(len(line[c]) for line in lines if not line[2].startswith("failed")) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    """Run the rows asked for; 1 if a number of attnfx was wrong or missing."""
    options = command.options("decode", __doc__, quick="tiny caches", example="window-b8-*")
    chosen = [row for row in rows(options.quick) if fnmatch.fnmatch(row.name, options.rows)]
    results, out = command.collected("decode", (result for row in chosen for result in run(row, options.device)), options)
    print(table(results) + f"\nwritten to {out}")
    return int(any("error" in r for r in results if r["peer"] in ("attnfx", "split")))


if __name__ == "__main__":
    sys.exit(main())
