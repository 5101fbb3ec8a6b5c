"""What tells queries, keys and values from other matrices: activations, not parameters, whose tokens lie along the same axes."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from attnfx import expr
from attnfx.graphs.mirror import Mirror
from attnfx.patterns.lift import Index
from attnfx.patterns.readings import Reading


def activation(mirror: Mirror, node: fx.Node) -> bool:
    """Whether a value depends on an input of the graph that is neither parameter nor buffer."""
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop()
        if at.op == "placeholder" and isinstance(at.meta.get("val"), torch.Tensor) and not _constant(mirror.origin.get(at)):
            return True
        if at.name.startswith("opaque"):
            return True
        new = [n for n in at.all_input_nodes if n not in seen]
        seen.update(new)
        queue.extend(new)
    return False


def _constant(placeholder: fx.Node | None) -> bool:
    if placeholder is None:
        return False
    example = placeholder.meta.get("example_value")
    return isinstance(example, torch.nn.Parameter) or "_parameters_" in placeholder.name or "_buffers_" in placeholder.name


def aligned_tokens(reading: Reading) -> bool:
    """Whether keys and values have tokens along the same axis, and queries, keys and values their features."""
    tokens = {_axis(reading.key.steps[-1][1], reading.j), _axis(reading.value.steps[-1][1], reading.j)}
    features = {
        _axis(reading.query.steps[-1][1], reading.d), _axis(reading.key.steps[-1][1], reading.d),
        _axis(reading.value.steps[-1][1], reading.e),
    }  # fmt: skip
    return len(tokens) == 1 and len(features) == 1 and None not in tokens | features


def _axis(index: Index, symbol: sympy.Symbol) -> int | None:
    """The axis of an operand that a symbol indexes, counted from the last."""
    found = [k - len(index) for k, x in enumerate(index) if symbol in expr.symbols(x)]
    return found[0] if len(found) == 1 else None


def same_operand(reading: Reading) -> bool:
    """Whether two of queries, keys and values are one tensor."""
    token, feature = sympy.Dummy("token"), sympy.Dummy("feature")
    roles = {reading.i: token, reading.j: token, reading.d: feature, reading.e: feature}
    seen = [(f.node, tuple(expr.substitute(x, dict(roles)) for x in f.index)) for f in (reading.query, reading.key, reading.value)]
    return len(set(seen)) < len(seen)
