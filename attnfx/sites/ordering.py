"""Tokens that an attention counts in another order than they lie in: the digits of a token's place, counted in another order.

A layout of 64 x 64 whose tiles of 8 x 8 are to be together has the places ``(8 Y + y) 64 + 8 X + x``, of digits ``Y y X x``; the
attention counts ``Y X y x``. So no table is needed: a place is a few divisions of the token's number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch
from torch import Tensor

from attnfx.algebra.integers import FloorDiv, Mod


@dataclass(frozen=True)
class Side:
    """An axis of ``length`` places, ``step`` tokens apart, of which a block takes ``box`` neighbouring ones. A token's place along
    it is the sum of ``number // below % size * weight`` over ``digits`` (below, size, weight)."""

    length: int
    step: int
    box: int
    digits: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Order:
    """``sizes`` of the digits of a place, the one that counts most first; ``axes``: the digits as the attention counts them."""

    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))} as {', '.join(map(str, self.axes))}"

    @property
    def tokens(self) -> int:
        return math.prod(self.sizes)

    @property
    def trivial(self) -> bool:
        """Whether the tokens lie as they are counted."""
        kept = [a for a in self.axes if self.sizes[a] > 1]
        return kept == sorted(kept)

    @cached_property
    def digits(self) -> tuple[tuple[int, int], ...]:
        """(size, step in the tensor) of each digit as the attention counts them, without those that are always 0."""
        steps = [math.prod(self.sizes[a + 1 :]) for a in range(len(self.sizes))]
        return tuple((self.sizes[a], steps[a]) for a in self.axes if self.sizes[a] > 1)

    def place(self, number: Tensor) -> Tensor:
        """Where the tokens of these numbers lie."""
        found, below = torch.zeros_like(number), 1
        for size, step in reversed(self.digits):
            found, below = found + number // below % size * step, below * size
        return found

    def number(self, axes: Sequence[int], token: sympy.Expr) -> sympy.Expr:
        """What some digits of a token's place are together, the first of which counts most."""
        found = sympy.Integer(0)
        for a in axes:
            if a in self._values:
                below, size = self._values[a]
                digit = FloorDiv(token, sympy.Integer(below)) if below > 1 else token
                last = below * size == self.tokens  # has no digit above it
                found = found * size + (digit if last else Mod(digit, sympy.Integer(size)))
        return sympy.expand(found)

    def moved(self, x: Tensor) -> Tensor:
        """(B, H, N, D), its tokens put as the attention counts them."""
        return x if self.trivial else _turned(x, self.sizes, self.axes)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`moved`."""
        inverse = tuple(self.axes.index(a) for a in range(len(self.axes)))
        return x if self.trivial else _turned(x, tuple(self.sizes[a] for a in self.axes), inverse)

    @cached_property
    def _values(self) -> dict[int, tuple[int, int]]:
        """Of each digit by its place among ``sizes``: (tokens between its steps as they are counted, its size)."""
        found, below = {}, 1
        for a in reversed(self.axes):
            if self.sizes[a] > 1:
                found[a] = below, self.sizes[a]
                below *= self.sizes[a]
        return found

    def boxes(self, block: int) -> tuple[Side, ...] | None:
        """The axes, outer ones first, along which every block of so many tokens is a box, whose tokens are counted as they lie;
        None where blocks are no such boxes."""
        taken = self._taken(block)
        if taken is None or list(taken) != sorted(taken, reverse=True):
            return None
        found, run = list[Side](), list[int]()
        digits = sorted(self._values)
        for n, a in enumerate(digits):
            run.append(a)
            following = digits[n + 1] if n + 1 < len(digits) else None
            whole = following is not None and taken.get(following) == self.sizes[following]
            if following is None or (a in taken and not whole):
                found.append(self._side(run, taken))
                run = []
        return tuple(found)

    def _taken(self, block: int) -> dict[int, int] | None:
        """The digits that vary in a block, those that count least first, and how many values each has there."""
        found = {}
        for a, (_, size) in self._values.items():
            if block == 1:
                break
            found[a] = min(size, block)
            if max(size, block) % found[a]:
                return None
            block //= found[a]
        return found if block == 1 else None

    def _side(self, run: list[int], taken: dict[int, int]) -> Side:
        """The axis that neighbouring digits make."""
        below, digits = 1, list[tuple[int, int, int]]()
        for a in reversed(run):
            digits.append((*self._values[a], below))
            below *= self.sizes[a]
        return Side(below, math.prod(self.sizes[run[-1] + 1 :]), math.prod(taken.get(a, 1) for a in run), tuple(digits))

    def additive(self, block: int) -> bool:
        """Whether place(first + n) = place(first) + place(n) in each block of so many tokens, which begins with ``first``: the
        block takes whole digits, and of the last one a part of which there are several."""
        return self._taken(block) is not None


def objections(order: Order | None, queries: sympy.Expr, keys: sympy.Expr, alone: bool) -> tuple[str, ...]:
    """Why an attention of so many queries and keys has no plan in an order; ``alone``: it has nothing that knows of neighbours."""
    if order is None:
        return ()
    found = []
    if not queries == keys == order.tokens:
        found.append(f"there are {queries} queries and {keys} keys; their order is one of {order.tokens} tokens.")
    if not alone:
        found.append("the tokens are counted in an order of their own, and there is a second product, or tiles are left out.")
    return tuple(found)


def _turned(x: Tensor, sizes: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """(B, H, N, D) with the digits of its tokens in another order; in functions that a proxy takes, too."""
    turned = torch.permute(torch.unflatten(x, 2, list(sizes)), [0, 1, *(2 + a for a in axes), 2 + len(sizes)])
    return torch.flatten(turned, 2, 1 + len(sizes))
