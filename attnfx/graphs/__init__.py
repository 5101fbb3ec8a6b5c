"""The model's graph: captured, read as a mirror, edited, and handed on."""
