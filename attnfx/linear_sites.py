"""Attention without a softmax over keys: whether linear attention runs it exactly, and why not."""

from __future__ import annotations

import sympy

from attnfx.expr import Call, Expr, Score, walk
from attnfx.lowering.linear.decay import Values
from attnfx.lowering.linear.plan import LinearPlan, linear_plan
from attnfx.site import AttentionSite

#: A length known only at run time is taken to be this where costs are compared.
SAMPLE = 4096
#: Sums over keys are worth their wider types where pairs cost this many times as much; chunks, whose own pairs are computed, more.
WORTH, WORTH_CAUSAL = 4, 8
#: Running sums over fewer tokens are small whatever they hold.
FEW = 16


def name(site: AttentionSite) -> str:
    """What kind of attention it is, in words."""
    return "linear attention" if _proportional(site.score) else "attention without a softmax over keys"


def served(site: AttentionSite, form: str, values: Values | None = None) -> tuple[LinearPlan | None, str, AttentionSite]:
    """How ``site`` runs, None where it stays as the model computes it, a reason, and the site as it is read for that.

    ``form``: how the model spells it: with weights of queries times keys ("quadratic"), with running sums ("running"), or with
    one sum over the keys first ("linear"). ``values``: of side tensors, where they may be read.
    """
    how = {
        "none": "its weights are not normalised", "sum": "its weights are divided by their sum",
        "abs_sum": "its weights are divided by the sum of their magnitudes",
    }[site.normaliser]  # fmt: skip
    what = f"{name(site)}, {how}"
    left = f"{what}: left as the model computes it"
    made = linear_plan(site, values)
    if isinstance(made, str):
        return None, f"{left}. {made}", site
    plan, site = made
    if form == "linear":
        return None, f"{left}, with a sum over the keys first, in time that grows with the length", site
    if not _cheaper(site, form):
        few = f"{site.queries} queries and {site.keys} keys cost less than states of {site.head_dim} x {site.value_dim} numbers"
        return None, f"{left}. {few}.", site
    state = f"a state of {site.head_dim} x {site.value_dim} numbers a head goes along the keys"
    return plan, f"{what}: {state}, so that time and memory grow with the length, not with its square", site


def _cheaper(site: AttentionSite, form: str) -> bool:
    """Whether sums over keys cost much less than all pairs of queries and keys, or than states of all tokens."""
    m, n = (size.subs(dict.fromkeys(size.free_symbols, SAMPLE)) for size in map(sympy.sympify, (site.queries, site.keys)))
    d, e = site.head_dim, site.value_dim
    if form == "running":
        return bool(n >= FEW)
    worth = WORTH if site.facts.full else WORTH_CAUSAL
    return bool(m * n * (d + e) > worth * (m + n) * d * e)


def _proportional(e: Expr) -> bool:
    """Whether a formula is the score times something that does not hold it: then sums over keys come first."""
    if isinstance(e, Score):
        return True
    if not isinstance(e, Call) or e.op not in ("mul", "div"):
        return False
    a, b = e.args
    if e.op == "mul" and any(isinstance(n, Score) for n in walk(b)):
        a, b = b, a
    return _proportional(a) and not any(isinstance(n, Score) for n in walk(b))
