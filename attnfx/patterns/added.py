"""Scores that are a sum of products: ``q1.k1 + q2.k2`` is one product of queries and keys laid side by side.

Multi-head latent attention (arXiv:2405.04434) spells its scores so: one product without positions, one with rotary ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from torch import fx

from attnfx import expr
from attnfx.expr import Call, Expr, Int, Load
from attnfx.patterns.lift import Dot, Index


def summed_with(z: Expr, first: Load) -> tuple[Expr, tuple[Load, ...]] | None:
    """The sum inside logits ``z`` whose terms are ``first`` and other products of the same rows and keys, and those others."""
    best: tuple[Expr, tuple[Load, ...]] | None = None
    for node in expr.walk(z):
        if isinstance(node, Call) and node.op == "add":
            terms = list(_terms(node))
            if first in terms and terms.count(first) == 1 and all(_product(t) for t in terms):
                others = tuple(t for t in terms if t != first and isinstance(t, Load))
                if best is None or len(others) > len(best[1]):
                    best = node, others
    return best


def _terms(e: Expr) -> Iterator[Expr]:
    if isinstance(e, Call) and e.op == "add" and e.dtype.is_floating_point:
        for a in e.args:
            yield from _terms(a)
    else:
        yield e


def _product(e: Expr) -> bool:
    return isinstance(e, Load) and isinstance(e.slot, Dot) and all(isinstance(x, Int) for x in e.indices)


def place(load: Load) -> tuple[fx.Node, Index]:
    """The contraction behind a product, and where it is read."""
    assert isinstance(load.slot, Dot)
    return load.slot.node, load.indices


def summation(k: int) -> sympy.Symbol:
    """The head_dim symbol of the k-th further product."""
    return sympy.Symbol(f"d{k + 1}", integer=True, nonnegative=True)
