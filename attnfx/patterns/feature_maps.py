"""Feature maps lifted: how a query or key operand was made, element by element or by a softmax, from an older tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.expr import Expr, Int, Load, Score
from attnfx.graphs.mirror import Mirror, is_tensor, sizes
from attnfx.patterns.lift import _MOVES, _RULES, Index, Lifter, operation
from attnfx.patterns.lift_moves import argument
from attnfx.patterns.products import CASTS
from attnfx.sites.feature_maps import FeatureMap

Step = tuple[fx.Node, Index]


def _max0(x: Expr, dtype: torch.dtype) -> Expr:
    return expr.maximum(x, expr.constant(0.0, dtype), dtype)


def relu(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return _max0(lifter.element(node.args[0], index), node.meta["val"].dtype)


def elu(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """x > 0 ? scale x : scale alpha (exp(input_scale x) - 1), the exponential of what cannot overflow."""
    dtype = node.meta["val"].dtype
    alpha, scale, inner = (float(argument(node, k, n, 1.0)) for k, n in ((1, "alpha"), (2, "scale"), (3, "input_scale")))
    x = lifter.element(node.args[0], index)

    def c(value: float) -> Expr:
        return expr.constant(value, dtype)

    low = expr.minimum(expr.mul(x, c(inner), dtype), c(0.0), dtype)
    below = expr.mul(expr.sub(expr.call("exp", low, dtype=dtype), c(1.0), dtype), c(alpha * scale), dtype)
    return expr.where(expr.lt(c(0.0), x), expr.mul(x, c(scale), dtype), below, dtype)


def silu(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x, dtype = lifter.element(node.args[0], index), node.meta["val"].dtype
    return expr.mul(x, expr.call("sigmoid", x, dtype=dtype), dtype)


def softplus(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    dtype = node.meta["val"].dtype
    if argument(node, 1, "beta", 1) != 1:
        return None
    threshold = expr.constant(float(argument(node, 2, "threshold", 20)), dtype)
    x = lifter.element(node.args[0], index)
    grown = expr.call("exp", expr.minimum(x, threshold, dtype), dtype=dtype)
    soft = expr.call("log", expr.add(expr.constant(1.0, dtype), grown, dtype), dtype=dtype)
    return expr.where(expr.lt(threshold, x), x, soft, dtype)


def leaky_relu(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x, dtype = lifter.element(node.args[0], index), node.meta["val"].dtype
    slope = expr.constant(float(argument(node, 1, "negative_slope", 0.01)), dtype)
    return expr.where(expr.lt(expr.constant(0.0, dtype), x), x, expr.mul(x, slope, dtype), dtype)


def square(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    x = lifter.element(node.args[0], index)
    return expr.mul(x, x, node.meta["val"].dtype)


#: Activations by name: the rules that scores and feature maps are read with besides those of all logits.
ACTIVATIONS: dict[str, Callable[[Lifter, fx.Node, Index], Expr | None]] = {
    "aten.relu": relu, "aten.relu_": relu, "aten.elu": elu, "aten.elu_": elu, "aten.silu": silu, "aten.silu_": silu,
    "aten.softplus": softplus, "aten.leaky_relu": leaky_relu, "aten.square": square,
}  # fmt: skip
#: Operations that compute each element from the elements of their operands.
ARITHMETIC = frozenset(
    f"aten.{name}{suffix}"
    for name in ("add", "sub", "rsub", "mul", "div", "pow", "neg", "abs", "exp", "exp2", "log", "sqrt", "rsqrt", "tanh", "sin",
                 "cos", "sigmoid", "clamp", "clamp_min", "clamp_max", "minimum", "maximum")
    for suffix in ("", "_")
)  # fmt: skip
_SOFTMAX = ("aten.softmax", "aten._softmax", "aten.special_softmax")


class _Once(Lifter):
    """A lifter that looks one operation back."""

    def element(self, node: object, index: Index) -> Expr:
        return Load(node, index, node.meta["val"].dtype) if is_tensor(node) else self.literal(node)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Mapped:
    """An operand and its map; ``steps``: the operand's history as in a factor; ``through``: the nodes that the map is made of."""

    map: FeatureMap
    steps: tuple[Step, ...]
    through: frozenset[fx.Node] = frozenset()


def lift_map(mirror: Mirror, lifter: Lifter, steps: tuple[Step, ...], feature: sympy.Symbol, token: sympy.Symbol) -> Mapped:
    """The map of an operand whose axes ``feature`` (head_dim) and ``token`` (query or key) are given."""
    kind, through = "elementwise", set()
    node, index = steps[-1]
    if operation(node) in _SOFTMAX and not mirror.overwritten(node.args[0], lifter.at):  # type: ignore[arg-type]
        over = index[int(argument(node, 1, "dim")) % len(index)]
        known = {Int(feature): "softmax_features", Int(token): "softmax_tokens"}
        if over in known and not lifter.severed(node):
            kind = known[over]
            through.add(node)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            steps = history_of(mirror, lifter, (source, index))
    formula, base, passed = _elementwise(mirror, lifter, steps)
    return Mapped(FeatureMap(kind, formula), base, frozenset(through | passed))


def history_of(mirror: Mirror, lifter: Lifter, step: Step) -> tuple[Step, ...]:
    """A node at an index, and what it was before operations that only moved elements or widened them."""
    steps = [step]
    while True:
        node, index = steps[-1]
        name = operation(node)
        older: Step | None = None
        if name in _MOVES:
            older = lifter.moved(node, index)
        elif name in CASTS and not lifter.severed(node) and is_tensor(node.args[0]) and _floating(node.args[0]) and _floating(node):
            older = node.args[0], index  # type: ignore[assignment]
        if older is None or mirror.overwritten(older[0], lifter.at):
            return tuple(steps)
        steps.append(older)


def _floating(node: object) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].is_floating_point() and node.meta["val"].dtype.itemsize >= 2


def _elementwise(mirror: Mirror, lifter: Lifter, steps: tuple[Step, ...]) -> tuple[Expr, tuple[Step, ...], set[fx.Node]]:
    """The oldest single tensor of which the operand is an elementwise formula."""
    once = _Once(mirror, lifter.ranges, at=lifter.at)
    node, index = steps[-1]
    e: Expr = Load(node, index, node.meta["val"].dtype)
    best: tuple[Expr, tuple[Step, ...], set[fx.Node]] = (Score(), steps, set())
    passed: set[fx.Node] = set()
    for _ in range(40):
        loads = list(dict.fromkeys(n for n in expr.walk(e) if isinstance(n, Load)))
        if len(loads) == 1 and loads[0].slot is not node:
            only = loads[0]
            base = history_of(mirror, lifter, (only.slot, only.indices))  # type: ignore[arg-type]
            oldest = Load(base[-1][0], base[-1][1], base[-1][0].meta["val"].dtype)
            best = (_at_score(e, only), base, set(passed))
            if oldest != only:
                e = expr.rebuild(e, lambda n, only=only, oldest=oldest: oldest if n == only else None)  # type: ignore[misc]
                loads = [oldest]
        following = max((n for n in loads if _opens(mirror, lifter, n)), key=lambda n: mirror.position[n.slot], default=None)
        if following is None:
            return best
        slot = following.slot
        assert isinstance(slot, fx.Node)
        name = operation(slot)
        apply = ACTIVATIONS.get(name) or _RULES[name]
        once.reader = slot
        opened = apply(once, slot, following.indices)
        if opened is None:
            return best
        passed.add(slot)
        e = expr.rebuild(e, lambda n, f=following, o=opened: o if n == f else None)  # type: ignore[misc]
    return best


def _opens(mirror: Mirror, lifter: Lifter, load: Load) -> bool:
    slot = load.slot
    if not isinstance(slot, fx.Node) or lifter.severed(slot):
        return False
    name = operation(slot)
    if name not in ACTIVATIONS and name not in ARITHMETIC:
        return False
    tensors = [a for a in slot.all_input_nodes if is_tensor(a)]
    if any(mirror.overwritten(a, lifter.at) or not _floating(a) for a in tensors):
        return False
    # Only what each element does to itself: other tensors (a rotation, a mask, a learned scale) end the map.
    return all(sizes(a) == sizes(slot) for a in tensors)


def _at_score(e: Expr, load: Load) -> Expr:
    """``e`` with the load replaced by the variable, in float32 or wider."""
    return expr.rebuild(e, lambda n: Score() if n == load else None)
