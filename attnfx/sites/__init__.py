"""What an attention is beside its formulas, and how it is written down; :mod:`attnfx.site` is the whole of it."""
