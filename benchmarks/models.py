"""Whole unmodified models: eager, torch.compile's default backend and attnfx side by side, in one run.

    python -m benchmarks.models [--quick] [--rows GLOB] [--out FILE] [--no-eager] [--device cuda|cpu]

Inference is a forward of the bare model (no head) without gradients; a training step is a forward and a backward to
every parameter from a fixed random gradient of the last hidden state, without an optimiser. bf16, batch 1, two layers.
The peer "patched" is torch.compile's default backend on a Llama whose mask was patched away by hand, so that
scaled_dot_product_attention is called with is_causal. Each row checks its numbers before it is timed: relative L2
distance (outputs; for training, outputs and all gradients) from an eager float32 run of the same bf16 weights at the
same length. A peer that fails is a row of data with the error in it. Writes after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import fnmatch
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnfx.files import replace_file
from benchmarks import machine, timing
from benchmarks.model_rows import Inputs, Row, rows
from benchmarks.table import table

RESULTS = Path(__file__).parent / "results"
FACTOR, SLACK = 1.5, 1e-3  # a compiled peer may be this much farther from float32 than eager bf16 is
UNREFERENCED = 5e-2  # the bound where eager itself ran out of memory
Result = dict[str, Any]


def main() -> int:
    """Run the rows asked for; 1 if any number of attnfx was wrong or missing."""
    options = _options()
    quick = options.quick or options.device == "cpu"
    chosen = [row for row in rows(quick) if fnmatch.fnmatch(row.name, options.rows)]
    if not chosen:
        print(f"--rows {options.rows} matches none of: {', '.join(row.name for row in rows(quick))}", file=sys.stderr)
        return 2
    about = machine.describe(options.device, options.commit)
    out = options.out or RESULTS / f"{datetime.date.today()}-{machine.slug(about)}{'-quick' if quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, transformers {about['transformers']}")
    _warm_up(options.device)
    results = _earlier(out, about)
    for row in chosen:
        for result in _run(row, options.device, with_eager=not options.no_eager):
            results = [r for r in results if (r["row"], r["peer"]) != (row.name, result["peer"])] + [result]
            print(json.dumps(result), flush=True)
            document = {"date": str(datetime.date.today()), "quick": quick, "machine": about, "results": results}
            replace_file(out, json.dumps(document, indent=1) + "\n")
    names = [row.name for row in chosen]
    print("\n" + table([r for r in results if r["row"] in names]) + f"\nwritten to {out}")
    return int(any("error" in r for r in results if r["peer"] == "attnfx" and r["row"] in names))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that all of it runs")
    parser.add_argument("--rows", default="*", metavar="GLOB", help="which rows, by name: 'llama8b-sdpa-*-training'")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file; rows already in it are kept")
    parser.add_argument("--no-eager", action="store_true", help="leave eager out of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--commit", help="the commit to record, where this tree is no git checkout")
    return parser.parse_args()


def _earlier(out: Path, about: dict[str, str]) -> list[Result]:
    """The rows already in the file, if they come from this machine and these versions."""
    if not out.exists():
        return []
    document = json.loads(out.read_text())
    if document["machine"] != about:
        print(f"{out} holds results of another machine, version or commit; they are replaced")
        return []
    return list(document["results"])


def _run(row: Row, device: str, with_eager: bool) -> Iterator[Result]:
    """All peers of one row, each measured from a clean state."""
    model, inputs = row.build(device, torch.bfloat16)
    config: Any = model.config
    gradient = torch.randn(1, row.length, config.hidden_size, device=device, dtype=torch.bfloat16)
    truth = _attempt(lambda: _reference(row, model, inputs, gradient))
    timing.release(device)
    if isinstance(truth, str):
        print(f"{row.name}: no float32 reference ({truth}); numbers are not checked", file=sys.stderr)
    theirs: float | None = None
    for peer in ("eager", "default", *(["patched"] if row.patchable else []), "attnfx"):
        result: Result = {"row": row.name, "title": row.title, "peer": peer, "target": row.target}
        measure = functools.partial(_measure, row, peer, model, inputs, gradient, device, truth, theirs)
        with _patched() if peer == "patched" else contextlib.nullcontext():
            measured = _attempt(measure)
        timing.release(device)
        model.zero_grad(set_to_none=True)
        result |= {"error": measured} if isinstance(measured, str) else measured
        if peer == "eager" and isinstance(measured, dict):
            theirs = measured["distance"]
        if with_eager or peer != "eager":
            yield result


def _measure(
    row: Row,
    peer: str,
    model: nn.Module,
    inputs: Inputs,
    gradient: Tensor,
    device: str,
    truth: Any,
    theirs: float | None,
) -> Result:
    """First call, check, time, memory. Raises where the numbers are wrong."""
    call = _compiled(peer, model)
    step = _step(row, call, inputs, gradient, model)
    with _fresh_cache(row.cold and peer != "eager"):
        first = timing.seconds(step, device)
        distance = None if isinstance(truth, str) else _distance(step(), truth)
        bound = UNREFERENCED if theirs is None else FACTOR * theirs + SLACK
        if peer != "eager" and distance is not None and not distance <= bound:
            raise ArithmeticError(f"relative L2 distance {distance:.2e} from float32; the bound is {bound:.2e}")
        return {
            "ms": timing.median_ms(step, device),
            "peak_gb": timing.peak_gb(step, device),
            "first_call_s": first,
            "cold": row.cold,
            "distance": distance,
        }


def _step(
    row: Row, call: Callable[..., Any], inputs: Inputs, gradient: Tensor, owner: nn.Module | None = None
) -> Callable[[], dict[str, Tensor]]:
    """One forward, or one training step, as a call without arguments that returns what is to be checked."""
    module = owner or call
    assert isinstance(module, nn.Module)

    def infer() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": call(**inputs).last_hidden_state}

    def train() -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        output = call(**inputs).last_hidden_state
        output.backward(gradient)
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return {"output": output.detach(), **gradients}

    return train if row.training else infer


def _reference(row: Row, model: nn.Module, inputs: Inputs, gradient: Tensor) -> dict[str, Tensor]:
    """What float32 gives for the same weights. On the CPU, so that it does not count as a peer's memory."""
    import transformers.integrations.sdpa_attention as integration

    sdpa: Any = integration
    original = sdpa.use_gqa_in_sdpa
    sdpa.use_gqa_in_sdpa = lambda *args: False  # in float32 SDPA has no fused kernel for grouped heads: S x S scores
    try:
        found = _step(row, copy.deepcopy(model).float(), inputs, gradient.float())()
    finally:
        sdpa.use_gqa_in_sdpa = original
    return {name: value.detach().cpu() for name, value in found.items()}


def _distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest over all tensors of |found - truth| / |truth|; NaN anywhere gives NaN.

    Tensors of next to no length (gradients that are zero in exact arithmetic) are measured against the longest.
    """
    lengths = {name: float(value.norm()) for name, value in truth.items()}
    least = 1e-4 * max(lengths.values())
    errors = [
        (found[name].detach().float() - value.to(found[name].device)).norm() / max(lengths[name], least)
        for name, value in truth.items()
    ]
    return float(torch.stack(errors).max())


def _compiled(peer: str, model: nn.Module) -> Callable[..., Any]:
    if peer == "eager":
        return model
    if peer == "attnfx":
        import attnfx.backend

        named = "attnfx" in torch._dynamo.list_backends(exclude_tags=())
        return torch.compile(model, backend="attnfx" if named else attnfx.backend.attnfx, dynamic=False)
    return torch.compile(model, dynamic=False)


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """transformers' Llama without its mask: sdpa_attention_forward then passes is_causal."""
    import transformers.models.llama.modeling_llama as llama

    modeling_llama: Any = llama
    original = modeling_llama.create_causal_mask
    modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    try:
        yield
    finally:
        modeling_llama.create_causal_mask = original


def _fresh_cache(fresh: bool) -> contextlib.AbstractContextManager[Any]:
    from torch._inductor import utils

    context: contextlib.AbstractContextManager[Any] = utils.fresh_cache() if fresh else contextlib.nullcontext()
    return context


def _warm_up(device: str) -> None:
    """What only the first compile of a process pays (imports, worker processes) is no peer's first call."""
    double = torch.compile(lambda x: (x * 2).sum(-1), dynamic=False)
    double(torch.ones(64, 64, device=device))
    timing.release(device)


def _attempt(call: Callable[[], Any]) -> Any:
    """The call's result, or its error as text."""
    try:
        return call()
    except Exception as error:  # whatever a peer raises is what the row reports
        text = f"{type(error).__name__}: {error}".strip()
    return " ".join(text.split())[:300]


if __name__ == "__main__":
    sys.exit(main())
