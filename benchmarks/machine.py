"""Which machine and which versions a measurement was taken on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: str, commit: str | None = None) -> dict[str, str]:
    """Plain data for a results file: device, driver, versions and commit. What cannot be read is "unknown"."""
    on_gpu = torch.device(device).type == "cuda"
    processor = {} if on_gpu else {"processor": _processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    return processor | {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none",
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": commit or _commit(),
    }


def slug(machine: dict[str, str]) -> str:
    """The device as part of a file name: "NVIDIA H200" gives "nvidia-h200"."""
    words = "".join(c if c.isalnum() else " " for c in machine["device"].lower()).split()
    return "-".join(words)


def _processor() -> str:
    """What the system calls the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = commit != "unknown" and _output("git", "status", "--porcelain", "--", "attnfx") not in ("", "unknown")
    return f"{commit}, changed" if changed else commit


def _output(*command: str) -> str:
    """First line that a command prints; "" where it prints nothing, "unknown" where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
