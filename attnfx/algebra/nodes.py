"""The nodes of index expressions, and walks over them. They are built by the constructors of :mod:`attnfx.expr`, which
fold as they build."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import sympy
import torch

Number = int | float | bool

#: Index symbols: never negative, and below the size of their axis.
INDEX = {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhij"}

UNARY = (
    "neg", "abs", "exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf", "floor", "ceil", "trunc",
    "round", "not", "sigmoid",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "floordiv", "mod", "pow", "min", "max", "and", "or", "xor", "bitand", "bitor", "bitxor",
)  # fmt: skip
COMPARE = ("lt", "le", "eq", "ne")
OPERATIONS = frozenset((*UNARY, *BINARY, *COMPARE, "where", "cast"))


def _made(constructor: str, a: Expr | Number, b: Expr | Number) -> Expr:
    from attnfx import expr

    made: Expr = getattr(expr, constructor)(expr.lift(a), expr.lift(b))
    return made


class Expr:
    """Base of the five kinds of node. Immutable, hashable, compared by structure."""

    dtype: torch.dtype

    def __add__(self, other: Expr | Number) -> Expr:
        return _made("add", self, other)

    def __radd__(self, other: Number) -> Expr:
        return _made("add", other, self)

    def __sub__(self, other: Expr | Number) -> Expr:
        return _made("sub", self, other)

    def __rsub__(self, other: Number) -> Expr:
        return _made("sub", other, self)

    def __mul__(self, other: Expr | Number) -> Expr:
        return _made("mul", self, other)

    def __rmul__(self, other: Number) -> Expr:
        return _made("mul", other, self)

    def __neg__(self) -> Expr:
        return _made("sub", 0, self) if isinstance(self, Int) else Call("neg", (self,), self.dtype)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}  # hashes differ from process to process

    def __str__(self) -> str:
        from attnfx.sites.notation import formula

        return formula(self)


@dataclass(frozen=True, repr=False)
class Int(Expr):
    """An integer polynomial over index and size symbols (dtype int64)."""

    value: sympy.Expr
    dtype: torch.dtype = torch.int64

    def __repr__(self) -> str:
        return f"Int({self.value})"


@dataclass(frozen=True)
class Const(Expr):
    """A float or bool constant, already rounded to its dtype. NaN is not representable; see :func:`constant`."""

    value: float | bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Load(Expr):
    """Element ``indices`` of side tensor ``slot``."""

    slot: Hashable
    indices: tuple[Expr, ...]
    dtype: torch.dtype

    def __hash__(self) -> int:
        return _remembered(self, (self.slot, self.indices, self.dtype))


@dataclass(frozen=True)
class Score(Expr):
    """The raw dot product of query i and key j, accumulated in float32; ``scale`` and everything else is outside it."""

    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Call(Expr):
    """An operation of :data:`OPERATIONS` on other expressions, with the dtype of its result."""

    op: str
    args: tuple[Expr, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise ValueError(f"unknown operation {self.op!r}; an expression may use {sorted(OPERATIONS)}")

    def __hash__(self) -> int:
        return _remembered(self, (self.op, self.args, self.dtype))


def _remembered(e: Expr, parts: tuple[Hashable, ...]) -> int:
    """The hash of a node with children, computed once: else hashing each node of a tree would walk all of the tree below it."""
    found: int | None = e.__dict__.get("_hash")
    if found is None:
        found = hash(parts)
        object.__setattr__(e, "_hash", found)
    return found


def children(e: Expr) -> tuple[Expr, ...]:
    return e.args if isinstance(e, Call) else e.indices if isinstance(e, Load) else ()


def walk(e: Expr) -> Iterator[Expr]:
    """Every distinct node of ``e``, parents before children."""
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(reversed(children(node)))


def symbols(e: Expr) -> frozenset[sympy.Symbol]:
    """Every index and size symbol that ``e`` depends on."""
    return frozenset().union(*(n.value.free_symbols for n in walk(e) if isinstance(n, Int)))


def depends_on(e: Expr, *names: str) -> bool:
    """Whether any of the index symbols ``names`` occurs in ``e``. :class:`Score` counts as depending on all four."""
    if any(isinstance(n, Score) for n in walk(e)):
        return True
    return not symbols(e).isdisjoint(INDEX[n] for n in names)


def has_score(e: Expr) -> bool:
    """Whether the dot product of a query and a key occurs in ``e``."""
    return any(isinstance(n, Score) for n in walk(e))
