"""How many attentions of real models attnfx sees and rewrites, next to torch.compile's default: ``python -m benchmarks.coverage``."""
