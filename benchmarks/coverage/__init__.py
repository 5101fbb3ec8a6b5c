"""Attentions of real models that attnfx sees and rewrites, next to torch.compile's default: ``python -m benchmarks.coverage``."""
