"""Conditions over the sizes of an attention, as policies write them: "kv_len >= 8192 and head_dim <= 128".

Parsed into a tree of few kinds of nodes; nothing of a condition is ever executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnfx.errors import PolicyError, listing, nearest

#: What a condition may speak of, and what it is.
NAMES = {
    "batch": "batch size", "heads": "query heads", "kv_heads": "key heads", "q_len": "queries", "kv_len": "keys",
    "head_dim": "width of a query", "value_dim": "width of a value",
}  # fmt: skip
_LONGEST, _DEEPEST = 500, 20
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_COMPUTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """Comparisons of whole numbers and of the :data:`NAMES`, joined by `and`, `or`, `not`; `+ - * // %` compute.

    PolicyError says what is malformed.
    """

    text: str
    _tree: ast.expr = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise PolicyError(f'The condition is {self.text!r}; it must be text such as "kv_len >= 8192".')
        if len(self.text) > _LONGEST:
            raise PolicyError(f"The condition has {len(self.text)} characters; it may have {_LONGEST}.")
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as problem:
            raise PolicyError(f'The condition "{self.text}" cannot be read: {getattr(problem, "msg", problem)}.') from None
        _check_truth(tree, self.text)
        object.__setattr__(self, "_tree", tree)

    def holds(self, sizes: Mapping[str, Any]) -> bool:
        """Whether it is true of sizes by their :data:`NAMES`; those that are symbolic are guarded where they are compared."""
        return _truth(self._tree, sizes)


def _truth(node: ast.expr, sizes: Mapping[str, Any]) -> bool:
    if isinstance(node, ast.BoolOp):
        parts = (_truth(value, sizes) for value in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        return not _truth(node.operand, sizes)
    assert isinstance(node, ast.Compare)
    numbers = [_number(n, sizes) for n in (node.left, *node.comparators)]
    return all(bool(_COMPARED[type(op)](a, b)) for op, a, b in zip(node.ops, numbers, numbers[1:], strict=False))


def _number(node: ast.expr, sizes: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return -_number(node.operand, sizes)
    assert isinstance(node, ast.BinOp)
    return _COMPUTED[type(node.op)](_number(node.left, sizes), _number(node.right, sizes))


def _check_truth(node: ast.expr, text: str, depth: int = 0) -> None:
    _check_depth(depth, text)
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_truth(value, text, depth + 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_truth(node.operand, text, depth + 1)
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARED for op in node.ops):
        for part in (node.left, *node.comparators):
            _check_number(part, text, depth + 1)
    else:
        raise PolicyError(
            f'The condition "{text}" has {ast.unparse(node)!r} where a comparison such as "kv_len >= 8192" must stand.'
        )


def _check_number(node: ast.expr, text: str, depth: int) -> None:
    _check_depth(depth, text)
    if isinstance(node, ast.Name):
        if node.id not in NAMES:
            raise PolicyError(f'The condition "{text}" has "{node.id}"; known are {listing(NAMES)}.{nearest(node.id, NAMES)}')
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        _check_number(node.left, text, depth + 1)
        _check_number(node.right, text, depth + 1)
        divides = isinstance(node.op, ast.FloorDiv | ast.Mod)
        if divides and not (isinstance(node.right, ast.Constant) and node.right.value):
            raise PolicyError(f'The condition "{text}" divides by {ast.unparse(node.right)!r}; it may by a number other than 0.')
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check_number(node.operand, text, depth + 1)
    elif not isinstance(node, ast.Constant) or type(node.value) is not int or abs(node.value) > 2**62:
        raise PolicyError(f'The condition "{text}" has {ast.unparse(node)!r} where a whole number or a size must stand.')


def _check_depth(depth: int, text: str) -> None:
    if depth > _DEEPEST:
        raise PolicyError(f'The condition "{text}" is nested more than {_DEEPEST} deep.')
