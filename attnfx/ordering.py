"""Tokens that an attention counts in another order than they lie in: the digits of a token's place, counted in another order.

A layout of 64 x 64 whose tiles of 8 x 8 are to be together has the places ``(8 Y + y) 64 + 8 X + x``, of digits ``Y y X x``; the
attention counts ``Y X y x``. So no table is needed: a place is a few divisions of the token's number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import sympy
import torch
from torch import Tensor


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

    def moved(self, x: Tensor) -> Tensor:
        """(B, H, N, D), its tokens put as the attention counts them."""
        return x if self.trivial else _turned(x, self.sizes, self.axes)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`moved`."""
        inverse = tuple(self.axes.index(a) for a in range(len(self.axes)))
        return x if self.trivial else _turned(x, tuple(self.sizes[a] for a in self.axes), inverse)

    def additive(self, block: int) -> bool:
        """Whether place(first + n) = place(first) + place(n) in each block of so many tokens, which begins with ``first``."""
        return _additive(self, block)


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


@lru_cache(maxsize=256)
def _additive(order: Order, block: int) -> bool:
    if order.tokens % block:
        return False
    places = order.place(torch.arange(order.tokens)).view(-1, block)
    return bool((places == places[:, :1] + places[:1]).all())
