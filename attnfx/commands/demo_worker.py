"""One measurement of the demo, in a process of its own.

`python -m attnfx.commands.demo_worker BACKEND REFERENCE LENGTH LAYERS REPEATS`
"""

import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Measure one backend; every line of output that starts with the marker is an event for the parent process."""
    backend, reference, length, layers, repeats = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    _say(stage="building the model")
    model, tokens = _llama(length, layers)
    if backend == "float64":
        _say(stage="running")
        with torch.no_grad():
            torch.save(_call(model.double(), tokens), reference)
        _say(result={})
        return
    compiled = model if backend == "eager" else torch.compile(model, backend=backend)
    result = _measured(lambda: _call(compiled, tokens), backend, repeats, torch.load(reference))
    if backend == "attnfx":
        import attnfx

        _say(stage="explaining")
        with torch.no_grad():
            result["explain"] = str(attnfx.explain(model, tokens, use_cache=False))
    _say(result=result)


def _llama(length: int, layers: int) -> tuple[torch.nn.Module, torch.Tensor]:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        vocab_size=1000,
        max_position_embeddings=length,
    )
    model = transformers.LlamaModel(config)
    model.train(False)
    return model, torch.randint(config.vocab_size, (1, length))


def _call(model: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    hidden = model(tokens, use_cache=False).last_hidden_state
    assert isinstance(hidden, torch.Tensor)
    return hidden


@torch.no_grad()
def _measured(call: Callable[[], torch.Tensor], backend: str, repeats: int, expected: torch.Tensor) -> dict[str, Any]:
    _say(stage="running" if backend == "eager" else "compiling")
    start = time.perf_counter()
    output = call()
    first_call = time.perf_counter() - start
    error = (output.double() - expected).abs().max().item()
    del output
    peak, memory = _peak_bytes(call)
    times = []
    for repeat in range(repeats):
        _say(stage=f"timing, call {repeat + 1} of {repeats}")
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "first_call": first_call,
        "milliseconds": statistics.median(times),
        "peak_bytes": peak,
        "memory": memory,
        "error": error,
        "repeats": repeats,
    }


def _peak_bytes(call: Callable[[], torch.Tensor]) -> tuple[int, str]:
    """The peak of resident memory that one call adds, and how it was measured: Linux can reset its high-water mark."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before, "peak memory is what one call adds to what the process holds"
    except (OSError, AttributeError):
        call()
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, "peak memory is the whole process's, compilation included"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _say(**event: Any) -> None:
    print(json.dumps({"attnfx-demo": 1} | event), flush=True)


if __name__ == "__main__":
    main()
