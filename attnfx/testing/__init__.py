"""Looking inside compiled models."""

from attnfx.testing.graphs import AtenLog, GraphLog, peak_bytes, square_tensors

__all__ = ["AtenLog", "GraphLog", "peak_bytes", "square_tensors"]
