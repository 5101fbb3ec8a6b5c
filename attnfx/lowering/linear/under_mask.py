"""What the mask decides of weights that are a product: distances have a sign where it keeps, and decays are between zero and one.

A table of decays is often spelled for all pairs first: the distance to a masked key is infinite, so that its decay is zero, or NaN
that is put away later. With the decay of each head known, such a table is a decay and a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch

from attnfx import expr
from attnfx.algebra.hulls import slacks
from attnfx.algebra.nodes import has_score
from attnfx.expr import Call, Const, Expr
from attnfx.lowering.linear.decay import I, J, Refusal, Values, numbers, rate, whole
from attnfx.site import AttentionSite
from attnfx.sites.facts import Facts, conjuncts, follows, prove


def simplified(site: AttentionSite, values: Values | None) -> AttentionSite:
    """``site`` with a weight that is the same number wherever its mask keeps, and a mask that keeps the same pairs."""
    site = _masked_by_distance(site, values)
    decided = _Decided(site, values)
    score = decided.of(site.score)
    keep = expr.logical_and(*(term for term in conjuncts(site.keep) if not decided.is_number(term)))
    return site.replace(score=score, keep=keep)


def _masked_by_distance(site: AttentionSite, values: Values | None) -> AttentionSite:
    """A factor that is zero where a condition on positions fails: the condition is a mask."""
    for atom in _factors(site.score):
        for condition, hidden in _conditions(atom):
            zero = _assuming(atom, condition, hidden)
            known = "" if {I, J} & expr.symbols(zero) else numbers(site, zero, values)
            if isinstance(known, str) or not bool((known == 0).all()):
                continue
            shown = expr.logical_not(condition) if hidden else condition
            score, keep = (_assuming(e, condition, not hidden) for e in (site.score, site.keep))
            return _masked_by_distance(site.replace(score=score, keep=expr.logical_and(keep, shown)), values)
    return site


def _factors(e: Expr) -> Iterator[Expr]:
    """The factors of a product that stand beside the score and look at query and key."""
    if isinstance(e, Call) and e.op in ("mul", "div", "cast", "neg"):
        for a in e.args:
            yield from _factors(a)
    elif not has_score(e) and {I, J} <= expr.symbols(e):
        yield e


def _conditions(e: Expr) -> Iterator[tuple[Expr, bool]]:
    """The conditions of choices in ``e`` that bound the distance, and for what value of theirs a pair may be masked."""
    for n in expr.walk(e):
        if isinstance(n, Call) and n.op == "where" and {I, J} <= expr.symbols(n.args[0]):
            for hidden in (False, True):
                if slacks(expr.logical_not(n.args[0]) if hidden else n.args[0]):
                    yield n.args[0], hidden


def _assuming(e: Expr, condition: Expr, value: bool) -> Expr:
    decided = {condition: expr.constant(value, torch.bool)}
    return expr.rebuild(e, decided.get)


@dataclass
class _Decided:
    """Formulas of a site where its mask keeps; ``values``: of side tensors, where they may be read."""

    site: AttentionSite
    values: Values | None

    @cached_property
    def facts(self) -> Facts:
        """Of what the mask says of positions."""
        terms = [t for t in conjuncts(self.site.keep) if slacks(t)]
        return prove(expr.logical_and(*terms), self.site.queries, self.site.keys, self.site.ranges)

    def of(self, e: Expr) -> Expr:
        """``e``, simpler."""

        def chosen(n: Expr) -> Expr | None:
            return self._chosen(Call(n.op, tuple(map(self.of, n.args)), n.dtype)) if isinstance(n, Call) else None

        return expr.rebuild(e, chosen)

    def _chosen(self, e: Call) -> Expr:
        if e.op == "where":
            condition, on, off = e.args
            if self._always(condition):
                return on
            if self._always(expr.logical_not(condition)) or (_compares_itself(condition) and self._unit(condition.args[0])):  # type: ignore[attr-defined]
                return off
        if e.op in ("abs", "min", "max") and (found := self._sided(e)) is not None:
            return found
        if e.op in ("min", "max") and len(e.args) == 2:
            for x, bound in (e.args, e.args[::-1]):
                idle = isinstance(bound, Const) and (bound.value >= 1 if e.op == "min" else bound.value <= 0)
                if idle and self._unit(x):
                    return x
        return e

    def _sided(self, e: Call) -> Expr | None:
        """The operand that an absolute value, or a smaller or larger number, of whole numbers always is."""
        a = e.args[0]
        b = expr.call("neg", a, dtype=e.dtype) if e.op == "abs" else e.args[1]
        m, n = whole(a), whole(b)
        if m is None or n is None:
            return None
        larger, smaller = (a, b) if self._holds(m - n) else (b, a) if self._holds(n - m) else (None, None)
        return smaller if e.op == "min" else larger

    def is_number(self, term: Expr) -> bool:
        """Whether a term of a mask says of a number that it is none."""
        if not (isinstance(term, Call) and term.op == "not" and _compares_itself(term.args[0])):
            return False
        compared = term.args[0]
        assert isinstance(compared, Call)
        return self._unit(self.of(compared.args[0]))

    def _unit(self, e: Expr) -> bool:
        """Whether ``e`` is proved to be between zero and one."""
        if isinstance(e, Const):
            return bool(0 <= e.value <= 1)
        if not isinstance(e, Call):
            return False
        if e.op == "cast":
            return e.args[0].dtype == torch.bool or self._unit(e.args[0])
        if e.op == "mul":
            return all(map(self._unit, e.args))
        if e.op not in ("exp", "exp2", "pow") or not self._ahead:
            return False
        try:
            known = numbers(self.site, rate(self.site, e, self.values), self.values)
        except Refusal:
            return False
        return not isinstance(known, str) and bool((known <= 0).all())

    @property
    def _ahead(self) -> bool:
        """Whether no query is before its keys, so that powers are not negative."""
        return self._holds(I + sympy.expand(self.site.keys - self.site.queries) - J)

    def _always(self, condition: Expr) -> bool:
        parts = slacks(condition)
        return bool(parts) and all(map(self._holds, parts))

    def _holds(self, slack: sympy.Expr) -> bool:
        s = self.site
        return follows(sympy.expand(slack), self.facts, s.queries, s.keys, s.ranges)


def _compares_itself(e: Expr) -> bool:
    """Whether ``e`` is x != x, as only NaN is."""
    return isinstance(e, Call) and e.op == "ne" and e.args[0] == e.args[1]
