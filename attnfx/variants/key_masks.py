"""What a mask says about keys alone, computed as a tensor: (B or 1, 1, 1, N), never of queries times keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor

from attnfx.algebra.nodes import depends_on, walk
from attnfx.expr import INDEX, Call, Const, Expr, Int, Load
from attnfx.variants.attend import Attend

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor, "lt": torch.lt, "le": torch.le, "eq": torch.eq,
    "ne": torch.ne,
}  # fmt: skip


def readable(keep: Expr) -> bool:
    """Whether :func:`kept` computes it: elements of tensors, whole numbers and constants, compared and joined."""
    return all(map(_known, walk(keep)))


def of_keys(keep: Expr) -> bool:
    """Whether it is readable, and the same for all queries and heads."""
    return readable(keep) and not depends_on(keep, "h", "i")


def _known(node: Expr) -> bool:
    if isinstance(node, Int):
        return all(e.is_Add or e.is_Mul or e.is_Integer or e.is_Symbol for e in sympy.preorder_traversal(node.value))
    if isinstance(node, Call) and node.op != "not":
        return node.op in _OPERATIONS and any(not isinstance(a, Const) for a in node.args)
    return isinstance(node, Load | Const | Call)


def kept(attend: Attend, keep: Expr) -> Tensor:
    """Whether ``keep``, which is readable, keeps each key for the first query of the first head."""
    site = attend.site
    rows = torch.reshape(attend.arange(attend.number(site.batch)), (-1, 1, 1, 1))
    keys = torch.reshape(attend.arange(attend.number(site.keys)), (1, 1, 1, -1))
    places: dict[sympy.Symbol, Any] = {INDEX["b"]: rows, INDEX["j"]: keys, INDEX["h"]: 0, INDEX["i"]: 0}

    def number(e: sympy.Expr) -> Any:
        if e.is_Integer:
            return int(e)
        if e.is_Symbol:
            return places[e] if e in places else attend.number(e)
        return reduce((lambda a, b: a + b) if e.is_Add else (lambda a, b: a * b), map(number, e.args))

    def visit(node: Expr) -> Any:
        if isinstance(node, Int):
            return number(node.value)
        if isinstance(node, Const):
            return node.value
        if isinstance(node, Load):
            return element(node)
        assert isinstance(node, Call)
        found = list(map(visit, node.args))
        if node.op == "not":
            return torch.logical_not(found[0])
        return reduce(lambda a, b: _joined(node.op, a, b), found)

    def element(node: Load) -> Any:
        assert isinstance(node.slot, int)
        at = []
        for e, size in zip(node.indices, site.side[node.slot].shape, strict=True):
            index, most = visit(e), attend.number(size) - 1
            at.append(index if isinstance(index, int) else torch.clamp(index, 0, most))  # what is not kept may lie outside
        found = attend.loads[node.slot]
        if not at:
            return found
        return torch.ops.aten.index.Tensor(found, [x if not isinstance(x, int) else keys * 0 + x for x in at])

    return visit(keep) | torch.zeros_like(keys, dtype=torch.bool)  # type: ignore[no-any-return]


def _joined(op: str, a: Any, b: Any) -> Any:
    """Of a number and a tensor the tensor comes first, as torch has it."""
    if isinstance(a, int | float):
        mirrored = {"lt": torch.gt, "le": torch.ge}
        return mirrored.get(op, _OPERATIONS[op])(b, a)
    return _OPERATIONS[op](a, b)
