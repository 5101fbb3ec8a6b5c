"""What a search knows of a call, and the key under which its result is remembered: sizes in buckets of powers of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def bucket(size: int) -> int:
    """The least power of two that is not below a size; 0 for 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a call, its dtype, whether its kernels walk lists of tiles, drop at random, and read by tensor descriptors."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    lists: bool = False
    dropout: bool = False
    dense: bool = True

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, lists: bool = False, dropout: bool = False) -> Shape:
        """Of q (B,H,M,D), k (B,HK,N,D), v (B,HK,N,DV)."""
        dense = all(x.stride(3) == 1 and x.stride(2) * x.element_size() % 16 == 0 for x in (q, k, v))
        (batch, heads, queries, head_dim), (_, key_heads, keys, value_dim) = q.shape, v.shape
        return Shape(batch, heads, key_heads, queries, keys, head_dim, value_dim, q.dtype, lists, dropout, dense)

    @property
    def group(self) -> int:
        return self.heads // max(self.key_heads, 1)

    def key(self, program: str, kernel: str) -> str:
        """The name of the entry of a kernel for a program (`Program.key`); calls that differ in nothing else share it."""
        parts = [
            program, kernel, str(self.dtype).removeprefix("torch."), f"d{self.head_dim}", f"dv{self.value_dim}",
            f"m{bucket(self.queries)}", f"n{bucket(self.keys)}", f"bh{bucket(self.batch * self.heads)}", f"group{self.group}",
        ]  # fmt: skip
        flags = {"lists": self.lists, "dropout": self.dropout, "strided": not self.dense}
        return " ".join([*parts, *(name for name, is_set in flags.items() if is_set)])

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"H={self.heads}" if self.group == 1 else f"H={self.heads}/{self.key_heads}"
        width = f"D={self.head_dim}" if self.head_dim == self.value_dim else f"D={self.head_dim}/{self.value_dim}"
        return f"{dtype} B={self.batch} {heads} M={self.queries} N={self.keys} {width}"
