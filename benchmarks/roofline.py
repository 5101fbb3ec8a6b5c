"""Arithmetic a second that a device can do, by its name: what a measured rate is a share of."""

from __future__ import annotations

#: Dense bfloat16 products with float32 sums, in TFLOP/s, from the vendor's data sheets. First match counts.
PEAKS = (("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H200 NVL", 835.0), ("H100", 989.0), ("H200", 989.0), ("A100", 312.0))


def peak_tflops(device: str) -> float | None:
    """The peak of a device ("NVIDIA H200"); None for one that is not known."""
    return next((peak for name, peak in PEAKS if name in device), None)
