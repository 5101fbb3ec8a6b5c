"""Attention programs: small frozen trees that say which attention is computed and how it is spelled.

A program is data. :func:`attnfx.testing.spelling.source` writes it as plain torch code, which is what runs and what a failure
prints. The first value of every field is the plainest, so that a smaller program is a plainer one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

#: Letters of axes: b batch, w window, g key head, r query heads a key head, i query, j key, d head_dim, e value head_dim.
#: In a layout, h stands for the heads that a tensor has, and (x y) for axes folded into one.
LETTERS = "bwgrijde"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the axes; ``windows`` 0 means that there is no such axis."""

    batch: int = 2
    windows: int = 0
    heads: int = 1
    group: int = 1
    queries: int = 2
    keys: int = 3
    width: int = 2
    value_width: int = 2

    def of(self, letter: str) -> int:
        return {"b": self.batch, "w": self.windows, "g": self.heads, "r": self.group, "i": self.queries, "j": self.keys,
                "d": self.width, "e": self.value_width}[letter]  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """How q, k and v come: a layout each, or ``packed`` in one tensor ("no", "chunk", "unbind", "split", "index", "same")."""

    query: str = "b h i d"
    key: str = "b h j d"
    value: str = "b h j e"
    packed: str = "no"


@dataclass(frozen=True)
class Scale:
    """``where``: none, scores, query, key, both, after (the mask), tensor (a 0-d constant), input (a learned number), heads (a
    learned number a head); ``how``: mul, div, root (by sqrt of head_dim)."""

    where: str = "none"
    how: str = "mul"
    value: float = 0.5


@dataclass(frozen=True)
class Scores:
    """``how``: matmul, einsum, bmm, baddbmm, mulsum, sdpa, mha; ``lead`` the axes before query and key; ``keys_first`` k.q^T."""

    how: str = "matmul"
    lead: str = "b h"
    keys_first: bool = False
    scale: Scale = field(default_factory=Scale)
    softcap: float = 0.0
    product: str = "own"  # or "float": q.float() @ k.float()
    repeat: str = "expand"  # of key heads where there are groups: expand, interleave, broadcast, native


@dataclass(frozen=True)
class Bias:
    """Something added. ``kind``: data, sliced, table, embedding, alibi, alibi_columns, alibi_absolute, t5, distance
    (of positions, or of points in space), points, constant; ``letters`` the axes that data has."""

    kind: str = "data"
    letters: str = "i j"
    learned: bool = True


@dataclass(frozen=True)
class Mask:
    """``kind``: data, causal, tril, triu, bottom, window, band, prefix, lengths, documents; ``letters`` the axes of data;
    ``fill``: -inf, min, -1e9, -1e4; ``how``: masked_fill, where, add, multiply; ``empty``: some query may have no keys."""

    kind: str = "causal"
    how: str = "masked_fill"
    fill: str = "-inf"
    letters: str = "i j"
    empty: bool = False


@dataclass(frozen=True)
class Softmax:
    """``how``: method, functional, torch, module, exp, exp_max, log; ``upcast``: none, dtype, float; ``dropout`` in evaluation."""

    how: str = "method"
    upcast: str = "none"
    dropout: bool = False


@dataclass(frozen=True)
class Output:
    """``how`` the values are contracted (matmul, einsum, bmm, mulsum), with which ``lead``; ``tail`` the layout of the result;
    ``linear`` after it; ``extra``: what else is returned (cache, scores, weights, sums, again)."""

    how: str = "matmul"
    lead: str = "b h"
    tail: str = "b h i e"
    linear: bool = False
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """One program. ``style`` seeds the small choices of spelling (0: always the plainest), ``inplace`` writes where it can,
    ``shapes`` reads sizes from tensors rather than naming numbers, ``mutation`` breaks the attention by one operation."""

    sizes: Sizes = field(default_factory=Sizes)
    dtype: str = "float32"
    storage: Storage = field(default_factory=Storage)
    scores: Scores = field(default_factory=Scores)
    terms: tuple[Bias | Mask, ...] = ()
    softmax: Softmax = field(default_factory=Softmax)
    output: Output = field(default_factory=Output)
    inplace: bool = False
    shapes: bool = False
    mutation: str = ""
    style: int = 0
    seed: int = 0

    def replace(self, **changes: object) -> Program:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def batch(self) -> str:
        """The letters of the batch axes."""
        return "bw" if self.sizes.windows else "b"

    @property
    def heads(self) -> str:
        """The letters of the query heads."""
        return "gr" if self.sizes.group > 1 else "g"


class Unspellable(Exception):
    """A tree that stands for no program, such as a group of heads in a call that has none."""
