"""Scores where the mask keeps them: ``|i - j|`` is ``i - j`` where no query sees a later key.

What a mask puts in place of a score never reads it, and a fill that no score comes near swallows what it is added to. So the score
of a masked key may be any number, and only has to be one: nothing is decided inside of a logarithm, a root or a quotient, which
may not be defined where the mask does not keep. A fill in reach is added to the score that the model computed.

A row in which no key is kept has the weights of what its scores and the fill add to. There a score that is itself out of all reach
is not swallowed (the smallest number twice is minus infinity, and that key has no weight where the others share it), so what may
hold one, a large constant or what a tensor holds, stays as the model computed it.
"""

from __future__ import annotations

import math

import sympy

from attnfx import expr
from attnfx.algebra.hulls import slacks
from attnfx.expr import Call, Const, Expr, Int, Load
from attnfx.site import AttentionSite
from attnfx.sites.facts import follows

#: A fill at or below this meets no real score.
UNREACHABLE = -1e30
#: Every such fill swallows a number below this.
_SMALL = 1e20
#: Operations that give a number of every size that positions have.
_TAME = frozenset(("add", "sub", "mul", "neg", "abs", "cast", "min", "max", "where", "tanh", "sin", "cos", "sigmoid", "erf"))
_LOGIC = frozenset(("le", "lt", "eq", "ne", "and", "or", "xor", "not"))


def where_kept(site: AttentionSite, exact_rows: bool) -> Expr:
    """The score program of ``site`` with absolute values, smaller and larger numbers and choices that the mask decides.

    ``exact_rows``: rows may exist in which masked keys have weight. What is added to a fill there passes its gradient on.
    """
    learned = any(tensor.requires_grad for tensor in site.side)
    read = site.additive and site.fill != -math.inf and (site.fill > UNREACHABLE or (exact_rows and learned))
    if read or not site.facts.bounded:
        return site.score
    return _Decided(site, exact_rows and site.additive and site.fill != -math.inf).of(site.score)


class _Decided:
    """``swallowed``: rows may exist whose masked scores have weight but for a fill that swallows them if they are small."""

    def __init__(self, site: AttentionSite, swallowed: bool) -> None:
        self.site, self.swallowed = site, swallowed
        self.known: dict[Expr, Expr] = {}

    def of(self, e: Expr) -> Expr:
        if e not in self.known:
            self.known[e] = self._of(e)
        return self.known[e]

    def _of(self, e: Expr) -> Expr:
        entered = not self.swallowed if isinstance(e, Load) else isinstance(e, Call) and e.op in _TAME
        if not entered:
            return e
        made = expr.rebuild(e, lambda n: None if n is e else self.of(n))
        return made if not isinstance(made, Call) else self._chosen(made) or made

    def _chosen(self, e: Call) -> Expr | None:
        """Another operand that ``e`` is equal to wherever the mask keeps, if that is a number everywhere else as well."""
        if e.op == "where":
            condition, on, off = e.args
            for value, other, decided in ((on, off, condition), (off, on, expr.logical_not(condition))):
                if self._always(decided) and _tame(value) and not (self.swallowed and not _small(other)):
                    return expr.cast(value, e.dtype) if e.dtype.is_floating_point else value
            return None
        if e.op not in ("abs", "min", "max") or e.dtype.is_floating_point:
            return None
        a = e.args[0]
        b = e.args[1] if e.op != "abs" else Int(-a.value) if isinstance(a, Int) else a
        if not isinstance(a, Int) or not isinstance(b, Int):
            return None
        larger, smaller = (a, b) if self._holds(a.value - b.value) else (b, a) if self._holds(b.value - a.value) else (None, None)
        return smaller if e.op == "min" else larger

    def _always(self, condition: Expr) -> bool:
        parts = slacks(condition)
        return bool(parts) and all(map(self._holds, parts))

    def _holds(self, slack: sympy.Expr) -> bool:
        """Whether ``slack`` is proved not to be negative where the mask keeps."""
        s = self.site
        return follows(sympy.expand(slack), s.facts, s.queries, s.keys, s.ranges)


def _tame(e: Expr) -> bool:
    return all(not isinstance(n, Call) or n.op in _TAME | _LOGIC for n in expr.walk(e))


def _small(e: Expr) -> bool:
    """Whether ``e`` is certainly far from every unreachable fill; products of queries with keys are."""
    return _tame(e) and all(not isinstance(n, Load) and not (isinstance(n, Const) and abs(n.value) >= _SMALL) for n in expr.walk(e))
