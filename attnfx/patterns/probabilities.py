"""From a normaliser onwards: the contractions that its probabilities reach, and what is done to them on the way.

Between a softmax and the product with the values, models cast, permute, drop, mask again, guard against NaN and multiply
by gates. The way is read as an expression like everything else, and taken apart into one factor of the probabilities.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Call, Const, Expr, Load
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.candidate import Refused
from attnfx.patterns.contraction import contraction
from attnfx.patterns.lift import has_rule, operation
from attnfx.patterns.lift_moves import argument

ONE = expr.ONE
_DROPOUT = ("aten.dropout", "aten.dropout_", "aten.native_dropout")


@dataclass(frozen=True)
class Course:
    """Where probabilities go: ``ends``, the contractions; ``path``, all nodes on the way there; ``leaves``, other users
    that somebody reads; ``dropout``, the share that is dropped."""

    ends: tuple[fx.Node, ...]
    path: frozenset[fx.Node]
    leaves: tuple[str, ...]
    dropout: float


def course(mirror: Mirror, normaliser: fx.Node, apart: Collection[fx.Node] = ()) -> Course:
    """Follow the probabilities of ``normaliser`` through everything that a formula can hold, but not through ``apart``."""
    reached, ends, queue = {normaliser: None}, dict[fx.Node, None](), [normaliser]
    while queue:
        for user in queue.pop(0).users:
            if user in reached or user in ends or user in apart:
                continue
            if contraction(user) is not None:
                ends[user] = None
            elif has_rule(user):
                reached[user] = None
                queue.append(user)
    leading = set(ends)
    for node in sorted(reached, key=lambda n: -mirror.position[n]):
        if any(user in leading for user in node.users):
            leading.add(node)
    path = frozenset(n for n in reached if n in leading) | {normaliser}
    leaves = [user.name for step in path for user in step.users if user not in leading and mirror.live(user)]
    last = max((mirror.position[end] for end in ends), default=0)
    leaves += [step.name for step in path if mirror.targets(step) and mirror.position[step] > last]
    leaves += ["the caller, as an output of the model" for step in path if mirror.leaves_graph(step)]
    dropout = 0.0
    for step in path:
        if operation(step) in _DROPOUT and argument(step, 2, "train", False):
            dropout = 1 - (1 - dropout) * (1 - float(argument(step, 1, "p")))
    return Course(tuple(ends), path, tuple(leaves), dropout)


def beside(node: fx.Node) -> bool:
    """Whether a node on the way only asks about the probabilities (their sizes, their NaNs) and does not pass them on."""
    return not node.meta["val"].is_floating_point() or operation(node).endswith("_like")


@dataclass(frozen=True)
class Factor:
    """What the probabilities are multiplied by, and whether NaN ones are replaced by zero."""

    weight: Expr = ONE
    guarded: bool = False


def factor(e: Expr, probability: Load) -> Factor:
    """``e`` as a factor of ``probability``. Raises Refused where it is not a multiple of it."""
    if e == probability:
        return Factor()
    if isinstance(e, Call):
        holding = [a for a in e.args if _holds(a, probability)]
        if e.op == "cast" and e.dtype.is_floating_point and e.dtype.itemsize >= 2:
            return factor(e.args[0], probability)
        if e.op in ("min", "max") and _idle(e):
            return factor(holding[0], probability)
        if e.op == "where":
            return _selected(e, probability)
        if e.op in ("mul", "div") and len(holding) == 1 and (e.op == "mul" or holding[0] is e.args[0]):
            inner = factor(holding[0], probability)
            other = e.args[1] if holding[0] is e.args[0] else e.args[0]
            make = expr.mul if e.op == "mul" else expr.div
            dtype = torch.float64 if other.dtype == torch.float64 else torch.float32
            return Factor(make(inner.weight, expr.cast(other, dtype), dtype), inner.guarded)
        raise Refused(f"its probabilities are changed ({e.op}) before the values are summed")
    raise Refused("its probabilities are changed before the values are summed")


def _holds(e: Expr, probability: Load) -> bool:
    return any(n == probability for n in expr.walk(e))


def _idle(e: Call) -> bool:
    """A clamp that no probability reaches."""
    bound = next((a for a in e.args if isinstance(a, Const)), None)
    return bound is not None and (bound.value >= 1 if e.op == "min" else bound.value <= 0)


def _selected(e: Call, probability: Load) -> Factor:
    condition, a, b = e.args
    if _holds(condition, probability):
        if isinstance(condition, Call) and condition.op == "not":
            condition, a, b = condition.args[0], b, a
        assert isinstance(condition, Call)
        is_nan = condition.op == "ne" and condition.args[0] == condition.args[1] and _bare(condition.args[0]) == probability
        if is_nan and expr.is_number(a, 0):
            return Factor(factor(b, probability).weight, True)
        raise Refused("its probabilities are selected by their own value")
    for kept, other, when in ((a, b, condition), (b, a, expr.logical_not(condition))):
        if _holds(kept, probability) and expr.is_number(other, 0):
            inner = factor(kept, probability)
            dtype = inner.weight.dtype
            return Factor(expr.where(when, inner.weight, expr.constant(0.0, dtype), dtype), inner.guarded)
    raise Refused("its probabilities are replaced by something else than zero")


def _bare(e: Expr) -> Expr:
    while isinstance(e, Call) and e.op == "cast":
        e = e.args[0]
    return e


def support(weight: Expr) -> tuple[Expr, Expr, bool]:
    """``keep, rest, selected``: ``weight`` is ``rest`` where ``keep`` and zero elsewhere. ``keep`` is TRUE where no such part
    is seen; ``selected`` tells that zeros are put in place, so that a NaN under them vanishes, and are not multiplied."""
    if isinstance(weight, Call) and weight.op == "where":
        for when, kept, other in ((0, 1, 2), (0, 2, 1)):
            if expr.is_number(weight.args[other], 0):
                condition = weight.args[when] if kept == 1 else expr.logical_not(weight.args[when])
                keep, rest, _ = support(weight.args[kept])
                return expr.logical_and(condition, keep), rest, True
    if isinstance(weight, Call) and weight.op == "cast" and weight.args[0].dtype == torch.bool:
        return weight.args[0], ONE, False
    return expr.TRUE, weight, False
