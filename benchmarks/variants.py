"""Variants beside the dense attention that they replace, FlexAttention and flash-linear-attention, side by side, in one run.

    python -m benchmarks.variants [--quick] [--rows GLOB] [--out FILE] [--device cuda|cpu]

bf16, an attention as a model calls it under a policy with one rule. "dense": attnfx's generated kernel for the model's own
attention. `kept` is the share of the dense attention's pairs that the variant keeps; `of dense` the share of its time, beside
1.25 times `kept` and 0.03. Numbers are checked before anything is timed: some queries against a float32 softmax over the keys that
a second spelling of the mask keeps; a variant whose choice hangs on the data against its own oracle where that is small enough,
linear attention against a float64 recurrence of one head. `ms`: CUDA events with a cold L2 cache, median; `graph ms`: the same
step as a CUDA graph, by which peers are compared where either takes less than 1 ms. A peer that fails is a row of data with the
error in it.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import sys
from collections.abc import Callable, Iterator

import sympy
import torch
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.testing import peak_bytes
from attnfx.variants import SkipSoftmax
from benchmarks import command, kernel_peers, kernel_rows, timing
from benchmarks.command import Result
from benchmarks.variant_rows import Attend, Row, fla, flex, rows

BOUND, CHECKED = 2e-2, 64
HEADER = ("row", "peer", "ms", "graph ms", "attnfx is", "asked", "kept", "of dense", "allowed", "peak MiB", "distance")
Make = Callable[[], Attend]


def peers(row: Row, device: str) -> Iterator[tuple[str, Make]]:
    """Names, and what makes the call of each: q, k, v (B,H,S,D) to (B,M,H,D)."""
    yield "attnfx", lambda: ours(row, device)
    if not row.linear:
        yield "dense", lambda: dense(row, device)
    if row.flex and device == "cuda":
        yield "flex", lambda: flex(row, device)
    if row.linear and device == "cuda" and importlib.util.find_spec("fla") is not None:
        yield "fla", lambda: fla(row)


def ours(row: Row, device: str) -> Attend:
    """The model under a policy."""
    import attnfx
    from attnfx.backend import attnfx as backend

    policy = attnfx.Policy([attnfx.Rule("*", row.variant)])
    options = {"policy": policy, "strict_sites": 1} | ({"inner": "eager"} if device == "cpu" else {})
    return torch.compile(row.model, backend=backend, dynamic=False, options=options)


def dense(row: Row, device: str) -> Attend:
    """The generated kernel of the model's own attention."""
    form = kernel_rows.CAUSALLY if row.causal and row.queries > 1 else kernel_rows.FULL
    like = kernel_rows.Row("", form, row.keys, row.width, row.batch, row.heads, row.heads, backward=row.backward)
    if row.queries == row.keys:
        made = kernel_peers.generated(like, row.inputs(device), device)
        return lambda q, k, v: made.attend(q, k, v).transpose(1, 2)
    return row.model


def share(row: Row) -> float | None:
    """What the variant keeps of the model's pairs; None for linear attention."""
    if row.linear:
        return None
    if isinstance(row.variant, SkipSoftmax):
        q, k, _ = (t[:, :1] for t in row.inputs("cpu"))
        return 1 - row.variant.share(q, k, row.width**-0.5, row.causal)
    n = sympy.Integer
    score, keep = kernel_rows.FULL.formula(kernel_rows.Row("", kernel_rows.FULL, row.keys, row.width), ())  # type: ignore[misc]
    site = AttentionSite(
        n(row.batch), n(row.heads), n(row.heads), n(row.queries), n(row.keys), row.width, row.width, torch.bfloat16, "cpu", score,
        kernel_rows.CAUSAL if row.causal else keep,
    )  # fmt: skip
    if row.keep is None:
        return float(row.variant.pairs(site)) / row.dense_pairs
    j = torch.arange(row.keys)
    sampled = torch.arange(0, row.queries, max(1, row.queries // 512))
    kept = torch.stack([row.keep(i, j).sum() for i in sampled]).double().mean() * row.queries
    return float(kept) / row.dense_pairs


def check(row: Row, found: Tensor, inputs: tuple[Tensor, ...], peer: str) -> float | None:
    """Relative L2 distance of ``found`` (B,M,H,D) where a truth is at hand; None: none is, at this size."""
    q, k, v = (t[:1, :1].detach() for t in inputs)
    mine = found[:1, :, :1].detach().transpose(1, 2).float()
    if row.linear:
        right = recurrence(row, peer, *(t[0, 0].double() for t in (q, k, v)))[None, None]
        mine = mine[:, :, -CHECKED:]
    elif row.keep is not None:
        i = torch.linspace(0, row.queries - 1, CHECKED, device=q.device).long()
        kept = row.keep(i[:, None], torch.arange(row.keys, device=q.device)[None, :])
        scores = (q[0, 0, i].float() @ k[0, 0].float().T * row.width**-0.5).masked_fill(~kept, float("-inf"))
        right, mine = (scores.softmax(-1) @ v[0, 0].float())[None, None], mine[:, :, i]
    elif row.queries * row.keys <= 2**28:
        right = row.variant.reference(q.float(), k.float(), v.float(), row.width**-0.5, causal=row.causal)
    else:
        return None
    distance = float((mine - right).norm() / right.norm())
    if not distance <= BOUND:
        raise ArithmeticError(f"relative L2 distance {distance:.2e} from the truth; the bound is {BOUND:.0e}")
    return distance


def recurrence(row: Row, peer: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last outputs of the first head, from all keys, in float64. Lightning's decay there is ALiBi's first slope; that of
    flash-linear-attention's is none, since it counts its heads from zero."""
    rate = 2.0 ** (-8.0 / row.heads) if (row.linear, peer) == ("lightning", "attnfx") else 0.0
    scale = 1.0 if row.linear == "lightning" else row.width**-0.5
    at = torch.arange(k.shape[0], device=q.device, dtype=torch.float64)
    away = at[-CHECKED:, None] - at[None, :]
    return torch.where(away >= 0, torch.exp(-rate * away), 0.0) * (q[-CHECKED:] @ k.T) * scale @ v


def run(row: Row, device: str) -> Iterator[Result]:
    """All peers of one row."""
    inputs, kept = row.inputs(device), share(row)
    for peer, make in peers(row, device):
        result: Result = {"row": row.name, "peer": peer, "kept": kept}
        try:
            result |= measured(row, make(), inputs, device, peer)
        except Exception as error:  # whatever a peer raises is what the row reports
            result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        timing.release(device)
        yield result


def measured(row: Row, call: Attend, inputs: tuple[Tensor, ...], device: str, peer: str) -> Result:
    """Check, then time and memory. Raises ArithmeticError where the numbers are wrong."""
    given = [t.detach().requires_grad_(row.backward) for t in inputs]
    push = torch.randn(row.batch, row.queries, row.heads, row.width, device=device, dtype=torch.bfloat16)

    def step() -> object:
        with torch.set_grad_enabled(row.backward):
            out = call(*given)
            return torch.autograd.grad(out, given, push) if row.backward else out

    with torch.set_grad_enabled(row.backward):
        found = call(*given)
    distance = None if peer == "dense" else check(row, found, inputs, peer)
    del found
    step()
    return {
        "ms": timing.median_ms(step, device, 100), "graph_ms": timing.graph_ms(step, device, 100),
        "peak_mib": peak_bytes(step, device) / 2**20, "distance": distance,
    }  # fmt: skip


def table(results: list[Result], made: list[Row]) -> str:
    """One line a peer; beside each peer how many times as fast attnfx is, and what was asked for."""
    ours = {r["row"]: r for r in results if r["peer"] == "attnfx" and "ms" in r}
    whole = {r["row"]: r for r in results if r["peer"] == "dense" and "ms" in r}
    named = {row.name: row for row in made}
    lines = [HEADER]
    for r in results:
        if "error" in r:
            lines.append((r["row"], r["peer"], f"failed: {r['error'][:90]}", *[""] * 8))
            continue
        row, mine = named[r["row"]], r["peer"] == "attnfx"
        speed = f"{timing.ratio(r, ours[row.name]):.2f}x" if row.name in ours and not mine else ""
        wanted = f"{row.targets[r['peer']]}x" if r["peer"] in row.targets else ""
        kept = f"{r['kept']:.3f}" if mine and r["kept"] is not None else ""
        part = f"{1 / timing.ratio(whole[row.name], r):.3f}" if mine and row.name in whole else ""
        allowed = f"{1.25 * r['kept'] + 0.03:.3f}" if mine and row.density else ""
        graph = "-" if r["graph_ms"] is None else f"{r['graph_ms']:.3f}"
        away = "-" if r["distance"] is None else f"{r['distance']:.1e}"
        lines.append(
            (r["row"], r["peer"], f"{r['ms']:.3f}", graph, speed, wanted, kept, part, allowed, f"{r['peak_mib']:.0f}", away)
        )
    widths = [max(len(line[c]) for line in lines if not line[2].startswith("failed")) for c in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    """Run the rows asked for; 1 if a number of attnfx was wrong or missing, 2 if nothing was asked for."""
    options = command.options("variants", __doc__, quick="tiny sizes", example="linear-*")
    made = rows(options.quick)
    chosen = [row for row in made if fnmatch.fnmatch(row.name, options.rows)]
    if not chosen:
        print(f"No row is called {options.rows}. Rows: {', '.join(row.name for row in made)}.", file=sys.stderr)
        return 2
    results, out = command.collected("variants", (r for row in chosen for r in run(row, options.device)), options)
    print(table(results, made) + f"\nwritten to {out}")
    return int(any("error" in r for r in results if r["peer"] == "attnfx"))


if __name__ == "__main__":
    sys.exit(main())
