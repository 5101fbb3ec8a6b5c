"""Lowering: from a described attention to the operators and kernels that run it."""
