"""Random torch programs that make masks and biases from positions: the text of a function, a few results each.

A value is a text with its kind ("int", "float", "bool") and a bound of its size, which keeps integers far from overflow.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

M, N, H = 6, 8, 3
LARGEST = 10_000
FLOATS = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")


@dataclass(frozen=True)
class Value:
    text: str
    kind: str
    bound: float = 1.0


#: What every program may read.
ARGUMENTS = "keys, rows, slopes, table"


def arguments(seed: int) -> tuple[Tensor, ...]:
    """An id for each key and each row, a number for each head, a table of numbers."""
    made = torch.Generator().manual_seed(seed)
    keys, rows = (torch.randint(0, 4, (n,), generator=made) for n in (N, M))
    return keys, rows, torch.rand(H, generator=made), torch.randn(32, generator=made)


class Writer:
    """Writes programs; equal seeds write equal programs. ``sizes``: (M, N) of the masks."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def function(self, results: int) -> str:
        """The text of a function that returns ``results`` tensors."""
        lines = []
        for k in range(results):
            kind = self.rng.choice(("bool", "bool", "int", "float"))
            lines.append(f"    r{k} = {self.spread(getattr(self, kind)(self.rng.randint(1, 4)).text)} ")
        names = ", ".join(f"r{k}" for k in range(results))
        return "\n".join([f"def program({ARGUMENTS}):", *lines, f"    return ({names},)"])

    def spread(self, text: str) -> str:
        """On the whole grid, copied so that each result has memory of its own."""
        return f"full({text})"

    # Leaves

    def index(self) -> Value:
        rng, size = self.rng, None
        axis = rng.choice("iijjjh")
        size = {"i": M, "j": N, "h": H}[axis]
        place = {"i": "[:, None]", "j": "", "h": "[:, None, None]"}[axis]
        start, step = rng.randint(-9, 9), rng.choice((1, 1, 1, 2, 3, -1))
        text = rng.choice(
            (
                f"torch.arange({size})",
                f"torch.arange({start}, {start + step * size}, {step})",
                f"torch.arange({size}).flip(0)",
                f"torch.arange({2 * size})[::2]",
                f"torch.arange({size}).roll({start})",
                f"torch.ones({size}, dtype=torch.long).cumsum(0)",
                f"torch.arange({size}, dtype=torch.int32)",
                f"torch.arange({size}).repeat_interleave(2)[1:{size + 1}]",
            )
        )
        return Value(f"{text}{place}", "int", 9.0 + 3 * size)

    def data(self) -> Value:
        text, bound = self.rng.choice((("keys", 4), ("rows[:, None]", 4)))
        return Value(text, "int", bound)

    def number(self) -> int:
        return self.rng.choice((-7, -3, -2, -1, 0, 1, 2, 3, 4, 5, 8))

    # Integers

    def int(self, depth: int) -> Value:
        if depth <= 0:
            return self.data() if self.rng.random() < 0.1 else self.index()
        made: Value = self.rng.choice(_INT)(self, depth - 1)
        return made if made.bound <= LARGEST else Value(f"({made.text}).clamp(-500, 400)", "int", 500)

    def distance(self, depth: int) -> Value:
        c = self.rng.choice((1, 1, 2))
        return Value(f"(torch.arange({M})[:, None] * {c} - torch.arange({N}) + {self.number()})", "int", 40)

    # Floats

    def float(self, depth: int) -> Value:
        if depth <= 0:
            return Value("slopes[:, None, None]", "float") if self.rng.random() < 0.1 else self.converted(depth)
        return self.rng.choice(_FLOAT)(self, depth - 1)  # type: ignore[no-any-return]

    def converted(self, depth: int) -> Value:
        return Value(f"({self.int(depth).text}).to({self.rng.choice(FLOATS)})", "float")

    # Booleans

    def bool(self, depth: int) -> Value:
        if depth <= 0:
            return Value(f"({self.index().text} {self.rng.choice(_COMPARE)} {self.index().text})", "bool")
        return self.rng.choice(_BOOL)(self, depth - 1)  # type: ignore[no-any-return]

    def matrix(self, value: Value) -> str:
        """A text of exactly (H, M, N)."""
        return f"full({value.text})"


#: Eight places of a grid.
_POINTS = "torch.stack([torch.arange(8) // {p}, torch.arange(8) % {p}], -1)"
_COMPARE = ("<", "<=", ">", ">=", "==", "!=")


def _pattern(kind: str, template: str, operands: str = "", bound: Any = None) -> Any:
    """A production: ``{0}``, ``{1}`` are operands of the kinds in ``operands`` (i, f, b; capitals: of the whole grid); ``{c}``
    is a small number, ``{p}`` a positive one, ``{op}`` a comparison, ``{d}`` an axis."""

    def make(writer: Writer, depth: int) -> Value:
        kinds = {"i": "int", "f": "float", "b": "bool"}
        values = [getattr(writer, kinds[x.lower()])(depth if k == 0 else max(depth - 1, 0)) for k, x in enumerate(operands)]
        texts = [writer.matrix(v) if x.isupper() else v.text for v, x in zip(values, operands, strict=True)]
        extra = {
            "c": writer.number(),
            "p": writer.rng.choice((1, 2, 3, 4, 5, 8)),
            "op": writer.rng.choice(_COMPARE),
            "d": writer.rng.choice((-1, -2)),
            "r": writer.rng.choice(("0.5", "-1.25", "0.1", "3.0", "7")),
            "s": writer.rng.randint(0, 3),
            "type": writer.rng.choice(FLOATS),
        }
        bounds = [v.bound for v in values]
        return Value(f"({template.format(*texts, **extra)})", kind, 1.0 if bound is None else bound(*bounds))

    return make


def _same(a: float, *rest: float) -> float:
    return max(a, *rest, 10.0)


def _sum(a: float, b: float = 10.0) -> float:
    return a + b


def _product(a: float, b: float = 10.0) -> float:
    return a * b


_INT = [
    lambda w, d: w.int(d),
    Writer.distance,
    Writer.distance,
    *(_pattern("int", t, "ii", _sum) for t in ("{0} + {1}", "{0} - {1}")),
    *(
        _pattern("int", t, "ii", _same)
        for t in (
            "torch.minimum({0}, {1})",
            "torch.maximum({0}, {1})",
            "torch.stack(torch.broadcast_tensors({0}, {1}), -1).amax(-1)",
            "torch.stack(torch.broadcast_tensors({0}, {1}), -1).min(-1).values",
            "torch.cat([full({0})[..., :3], full({1})[..., 3:]], -1)",
        )
    ),
    _pattern("int", "{0} * {1}", "ii", _product),
    *(_pattern("int", t, "i", _product) for t in ("{0} * {c}", "{0} << 2", "-({0})", "3 - {0}", "~({0})")),
    *(
        _pattern("int", t, "i", _same)
        for t in (
            "{0} // {p}",
            "{0} % {p}",
            "{0} // -{p}",
            "{0} % -{p}",
            "({0}).abs()",
            "({0}).clamp({c}, 9)",
            "({0}).clip(max={c})",
            "({0}).sign()",
            "({0}) >> 1",
            "torch.fmod({0}, {p})",
            "torch.fmod({0}, -{p})",
            "torch.div({0}, {p}, rounding_mode='trunc')",
            "torch.div({0}, -{p}, rounding_mode='trunc')",
            "torch.div({0}, {p}, rounding_mode='floor')",
            "({0}) & 3",
            "({0}) & 6",
            "({0}) | 5",
            "({0}) ^ 3",
            "torch.relu({0})",
            "({0}).int()",
            "({0}).long()",
            "torch.bucketize({0}, torch.tensor([-3, 0, 0, 5]).to(({0}).dtype))",
            "torch.bucketize({0}, torch.tensor([-3, 0, 2, 5]).to(({0}).dtype), right=True)",
            "torch.remainder({0}, {p})",
        )
    ),
    *(
        _pattern("int", t, "I", lambda a: 2 * a + 10)
        for t in (
            "({0}).roll({c}, {d})",
            "({0}).flip({d})",
            "F.pad({0}, (3, 0), value={c})[..., :8]",
            "({0}).tril({c})",
            "({0}).triu({c})",
            "({0}).roll({c})",
            "({0}).diff(dim=-1, prepend=({0})[..., :1])",
            "({0}).diff(dim=-2, append=({0})[..., :1, :])",
            "F.pad({0}, (-2, 2))",
            "({0}).transpose(-1, -2).reshape(3, 6, 8)",
            "F.pad({0}, (1, 0)).view(3, 9, 6)[:, 1:].reshape(3, 6, 8)",
            "({0}).gather(-1, (torch.arange(8) * 3 % 8).expand(3, 6, 8))",
            "torch.take_along_dim({0}, (torch.arange(8) % 3).expand(3, 6, 8), -1)",
            "({0})[..., torch.arange(7, -1, -1)]",
            "({0})[:, [5, 4, 3, 2, 1, 0]]",
        )
    ),
    _pattern("int", "full({0}).bool().long().cumsum({d})", "I", lambda a: 10.0),
    _pattern("int", "({0}).long()", "b", lambda a: 1.0),
    _pattern("int", "torch.where({0}, {1}, {c})", "bi", lambda a, b: b + 10),
    _pattern("int", "({0}).long().cumsum({d})", "B", lambda a: 10.0),
    _pattern("int", "torch.ones({0}.shape, dtype=torch.long).tril({c}).cumsum(-1)", "B", lambda a: 10.0),
    _pattern("int", "({0}).masked_fill({1}, {c})", "IB", lambda a, b: a + 10),
    _pattern("int", "({0}).round().nan_to_num(3.0).clamp(-99, 99).to(torch.int64)", "f", lambda a: 99.0),
    _pattern("int", "({0}).nan_to_num(3.0).clamp(-99, 99).int()", "f", lambda a: 99.0),
    _pattern("int", "((torch.stack([{0}, {1}], -1)[..., 0]) ** 2)", "II", lambda a, b: a * a),
    _pattern("int", "torch.stack(torch.broadcast_tensors({0}, {1}, {0}), -1).sum(-1)", "ii", lambda a, b: 2 * a + b),
    _pattern("int", "torch.stack([{0}, {1}], -1).prod(-1)", "II", lambda a, b: a * b),
    _pattern("int", "torch.arange(40).unfold(0, 8, 1)[:6] * {c}", "", lambda: 400.0),
    _pattern("int", "torch.arange(14).as_strided((6, 8), (1, 1)) + {c}", "", lambda: 24.0),
    _pattern("int", "(lambda p: ((p[:6, None] - p[None]) ** 2).sum(-1))(" + _POINTS + ")", "", lambda: 99.0),
    _pattern(
        "int", "(lambda g: g[0] * {c} - g[1])(torch.meshgrid(torch.arange(6), torch.arange(8), indexing='ij'))", "", lambda: 99.0
    ),
    _pattern("int", "F.one_hot(torch.arange(6) // {p}, 8) * {c}", "", lambda: 10.0),
    _pattern("int", "torch.stack([{0}, {1}], -1).count_nonzero(-1)", "II", lambda a, b: 2.0),
]

_FLOAT = [
    Writer.converted,
    Writer.converted,
    Writer.converted,
    *(
        _pattern("float", t, "ff")
        for t in (
            "{0} + {1}",
            "{0} - {1}",
            "{0} * {1}",
            "{0} / {1}",
            "torch.maximum({0}, {1})",
            "torch.minimum({0}, {1})",
            "torch.fmin({0}, {1})",
        )
    ),
    *(
        _pattern("float", t, "f")
        for t in (
            "{0} * {r}",
            "{0} + {r}",
            "{r} - {0}",
            "{0} / {r}",
            "{r} / ({0})",
            "torch.exp(-({0}).abs())",
            "torch.log(({0}).abs() + 1)",
            "torch.log1p(({0}).abs())",
            "torch.log2(({0}).abs() + 1)",
            "torch.sqrt({0})",
            "torch.rsqrt(({0}).abs())",
            "({0}) ** 2",
            "({0}) ** 3",
            "({0}).square()",
            "torch.sin({0})",
            "torch.cos({0})",
            "torch.tanh({0})",
            "torch.sigmoid({0})",
            "torch.erf({0})",
            "torch.floor({0})",
            "torch.ceil({0})",
            "torch.round({0})",
            "torch.trunc({0})",
            "({0}).sign()",
            "({0}).abs()",
            "({0}).reciprocal()",
            "-({0})",
            "torch.relu({0})",
            "F.hardtanh({0}, -2.0, 3.0)",
            "({0}).clamp(-2.5, 1e4)",
            "({0}).clip(min=0.3)",
            "({0}).nan_to_num(0.5)",
            "({0}).to({type})",
            "({0}).float()",
            "({0}) % 3",
            "({0}) // 2",
            "torch.div({0}, 3, rounding_mode='trunc')",
            "({0}).frac()",
            "2.0 ** ({0}).clamp(-20, 20)",
            "({0}).detach().contiguous()",
        )
    ),
    *(_pattern("float", t, "i") for t in ("{0} / {p}", "({0}).float() / 8", "({0}).float().log()", "({0}) * 0.1", "{0} + 0.5")),
    *(
        _pattern("float", t, "F")
        for t in (
            "({0}).roll({c}, {d})",
            "({0}).tril({c})",
            "({0}).flip({d})",
            "F.pad({0}, (2, 0), value={r})[..., :8]",
            "({0}).triu({c})",
            "({0}).transpose(-1, -2).reshape(3, 6, 8)",
        )
    ),
    _pattern("float", "torch.where({0}, {1}, float('-inf'))", "bf"),
    _pattern("float", "torch.where({0}, {1}, {2})", "bff"),
    _pattern("float", "({0}).masked_fill({1}, float('-inf'))", "FB"),
    _pattern("float", "({0}).float()", "b"),
    _pattern("float", "(1.0 - ({0}).to({type})) * -10000.0", "b"),
    _pattern("float", "table[({0}).clamp(0, 31)]", "i"),
    _pattern("float", "F.embedding(({0}).clamp(0, 31), table[:, None])[..., 0]", "i"),
    _pattern("float", "torch.stack([{0}, {0}], -1).sum(-1)", "F"),
    _pattern("float", "torch.stack([({0}).float()] * 3, -1).sum(-1)", "I"),
    _pattern("float", "torch.stack([({0}).float()] * 4, -1).mean(-1)", "I"),
    _pattern("float", "torch.ones(3, 6, 8).cumsum({d})", ""),
    _pattern("float", "torch.ones(3, 6, 8, dtype=torch.bfloat16).cumsum({d})", ""),
    _pattern("float", "torch.stack([({0}).float(), ({1}).float()], -1).norm(dim=-1)", "II"),
    _pattern("float", "(lambda p: torch.cdist(p[:6], p))(" + _POINTS + ".float())", ""),
    _pattern("float", "slopes[:, None, None] * {0}", "i"),
]

_BOOL = [
    *(_pattern("bool", "{0} {op} {1}", "ii") for _ in range(6)),
    _pattern("bool", "{0} {op} {c}", "i"),
    _pattern("bool", "{0} {op} {1}", "ff"),
    _pattern("bool", "{0} {op} {r}", "f"),
    _pattern("bool", "{0} {op} {r}", "i"),
    _pattern("bool", "{0} {op} {1}", "if"),
    *(
        _pattern("bool", t, "bb")
        for t in (
            "{0} & {1}",
            "{0} | {1}",
            "{0} ^ {1}",
            "torch.logical_and({0}, {1})",
            "torch.logical_xor({0}, {1})",
            "torch.logical_or({0}, ~{1})",
            "torch.where({0}, {1}, ~({0}))",
            "{0} == {1}",
        )
    ),
    _pattern("bool", "~({0})", "b"),
    _pattern("bool", "({0}).logical_not()", "i"),
    _pattern("bool", "({0}).bool()", "i"),
    _pattern("bool", "({0}).bool()", "f"),
    *(
        _pattern("bool", t, "B")
        for t in (
            "({0}).tril({c})",
            "({0}).triu({c})",
            "({0}).roll({c}, {d})",
            "({0}).flip({d})",
            "F.pad({0}, (1, 0), value=True)[..., :8]",
            "({0}).transpose(-1, -2).reshape(3, 6, 8)",
        )
    ),
    _pattern("bool", "torch.isin({0}, torch.tensor([0, 2, -3, 5]))", "i"),
    _pattern("bool", "torch.isin({0}, torch.tensor([1, 4]), invert=True)", "i"),
    _pattern("bool", "torch.stack([{0}, {1}], -1).any(-1)", "BB"),
    _pattern("bool", "torch.stack([{0}, {1}], -1).all(-1)", "BI"),
    _pattern("bool", "F.one_hot(torch.arange(6) % {p}, 8).bool()", ""),
    _pattern("bool", "({0}).isinf()", "f"),
    _pattern("bool", "({0}).isnan()", "f"),
    _pattern("bool", "({0}).isfinite()", "f"),
    _pattern("bool", "keys == rows[:, None]", ""),
    _pattern("bool", "torch.eye(6, 8, dtype=torch.bool)", ""),
    _pattern("bool", "torch.ones(6, 8, dtype=torch.bool).tril({c})", ""),
    _pattern("bool", "torch.block_diag(torch.ones(2, 3), torch.ones(4, 5)).bool()", ""),
    _pattern("bool", "torch.zeros(6, 8).scatter(1, (torch.arange(6) % 8)[:, None], 1.0).bool()", ""),
    _pattern("bool", "torch.arange(6)[:, None] // {p} == torch.arange(8) // {p}", ""),
]
