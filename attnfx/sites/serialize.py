"""Expressions and sites as JSON and back: for bug reports, and for the text argument that carries a plan into a compiled graph.

Reading is safe for text from anybody: nothing is evaluated, names are checked, numbers and depth are bounded, and whatever is
not known is a :class:`FormatError` that says what was found and what would be read. Shared subexpressions are written once: an
expression is a number into one list of nodes, each of which refers only to nodes before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from typing import Any

import sympy
import torch

from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.errors import AttnfxError
from attnfx.expr import INDEX, OPERATIONS, Call, Const, Expr, Int, Load, Score, children
from attnfx.site import AttentionSite, SideTensor
from attnfx.sites.band import Band
from attnfx.sites.feature_maps import KINDS, FeatureMap
from attnfx.sites.ordering import Order
from attnfx.sites.skipping import TILES, Skip

Json = Any

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64,
    )
}  # fmt: skip
ASSUMPTIONS = ("integer", "nonnegative", "positive")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
DEPTH, NODES, LARGEST, EXPONENT = 100, 20_000, 2**63, 16


class FormatError(AttnfxError, ValueError):
    """Text that is not a plan or a site of this version; the message says what was found and what can be read."""


class Writer:
    """Collects the nodes of several expressions."""

    def __init__(self) -> None:
        self.nodes: list[Json] = []
        self.seen: dict[Expr, int] = {}

    def add(self, e: Expr) -> int:
        """The number of ``e`` in :attr:`nodes`."""
        if e not in self.seen:
            node = self._node(e)
            self.nodes.append(node)
            self.seen[e] = len(self.nodes) - 1
        return self.seen[e]

    def _node(self, e: Expr) -> Json:
        args = [self.add(c) for c in children(e)]
        if isinstance(e, Int):
            return ["int", write_integer(e.value)]
        if isinstance(e, Const):
            return ["const", write_number(e.value), write_dtype(e.dtype)]
        if isinstance(e, Load):
            if not isinstance(e.slot, int):
                raise FormatError(f"the slot of a load is {e.slot!r}; only numbered slots can be written")
            return ["load", e.slot, args, write_dtype(e.dtype)]
        if isinstance(e, Score):
            return ["score"]
        assert isinstance(e, Call)
        return ["call", e.op, args, write_dtype(e.dtype)]


class Reader:
    """The expressions of a list of nodes; ``slots`` bounds the tensors that they may load from."""

    def __init__(self, nodes: Json, slots: int) -> None:
        self.slots = slots
        self.made: list[Expr] = []
        for node in _list(nodes, "nodes", NODES):
            self.made.append(self._expr(node))

    def get(self, number: Json) -> Expr:
        if type(number) is not int or not 0 <= number < len(self.made):
            raise FormatError(f"the reference {number!r} is not one of the {len(self.made)} nodes before it")
        return self.made[number]

    def _expr(self, node: Json) -> Expr:
        match node:
            case ["int", value]:
                return Int(read_integer(value))
            case ["const", value, dtype]:
                return self._const(read_number(value), read_dtype(dtype))
            case ["load", slot, indices, dtype]:
                if type(slot) is not int or not 0 <= slot < self.slots:
                    raise FormatError(f"a load reads slot {slot!r}; there are {self.slots} tensors")
                return Load(slot, self._all(indices), read_dtype(dtype))
            case ["score"]:
                return Score()
            case ["call", op, args, dtype]:
                if op not in OPERATIONS:
                    raise FormatError(f"the operation is {op!r}; known: {', '.join(sorted(OPERATIONS))}")
                return Call(op, self._all(args), read_dtype(dtype))
        raise FormatError(f"a node is {node!r}; known: int, const, load, score, call, each with its fields")

    def _all(self, numbers: Json) -> tuple[Expr, ...]:
        return tuple(self.get(n) for n in _list(numbers, "operands", NODES))

    def _const(self, value: float | bool, dtype: torch.dtype) -> Const:
        if isinstance(value, bool) != (dtype == torch.bool) or not (dtype == torch.bool or dtype.is_floating_point):
            raise FormatError(f"a constant of {dtype} is {value!r}; a constant is a float, or a bool of dtype bool")
        return Const(value, dtype)


def write_dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise FormatError(f"the dtype is {name}; supported: {', '.join(DTYPES)}")
    return name


def read_dtype(name: Json) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise FormatError(f"the dtype is {name!r}; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def write_number(value: float | bool) -> Json:
    """A float or bool; infinities as text, since JSON has none."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def read_number(value: Json) -> float | bool:
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise FormatError(f'a number is {value!r}; supported: a finite float, "inf", "-inf", true, false')


def write_integer(e: sympy.Expr) -> Json:
    """A sympy integer expression as nested lists, ``["Add", x, y]``."""
    if e.is_Integer:
        return int(e)
    if e.is_Symbol:
        return write_symbol(e)
    kind = next((name for name, (cls, _) in _INTEGERS.items() if type(e) is cls), None)
    if kind is None:
        raise FormatError(f"the integer expression {e} is a {type(e).__name__}; supported: {', '.join(_INTEGERS)}")
    return [kind, *(write_integer(a) for a in e.args)]


def read_integer(value: Json, depth: int = 0) -> sympy.Expr:
    if depth > DEPTH:
        raise FormatError(f"an integer expression is nested deeper than {DEPTH}")
    if type(value) is int:
        if not -LARGEST <= value < LARGEST:
            raise FormatError("an integer does not fit 64 bits")
        return sympy.Integer(value)
    match value:
        case ["Symbol", *_]:
            return read_symbol(value)
        case [str(kind), *args] if kind in _INTEGERS and len(args) >= 2:
            return _INTEGERS[kind][1](*(read_integer(a, depth + 1) for a in args))
    raise FormatError(f"an integer expression is {value!r}; known: integers, Symbol, {', '.join(_INTEGERS)}")


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if not exponent.is_Integer or not 0 <= int(exponent) <= EXPONENT or base.is_Integer:
        raise FormatError(f"the power is ({base})**({exponent}); supported: a symbol to an integer from 0 to {EXPONENT}")
    return base**exponent


def _nonzero(make: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Callable[[sympy.Expr, sympy.Expr], sympy.Expr]:
    def checked(*args: sympy.Expr) -> sympy.Expr:
        if len(args) != 2 or args[1] == 0:
            raise FormatError(f"a division has the operands {args}; it takes two, and the second is not 0")
        return make(*args)

    return checked


_INTEGERS: dict[str, tuple[Any, Callable[..., sympy.Expr]]] = {
    "Add": (sympy.Add, sympy.Add),
    "Mul": (sympy.Mul, sympy.Mul),
    "Pow": (sympy.Pow, _power),
    "FloorDiv": (FloorDiv, _nonzero(FloorDiv)),
    "Mod": (Mod, _nonzero(Mod)),
    "PythonMod": (PythonMod, _nonzero(PythonMod)),
    "Max": (Max, Max),
    "Min": (Min, Min),
}


def write_symbol(s: sympy.Symbol) -> Json:
    flags = [flag for flag in ASSUMPTIONS if s.assumptions0.get(flag)]
    made = ["Symbol", s.name, *flags]
    if read_symbol(made) != s:
        raise FormatError(f"the symbol {s} has assumptions beyond {', '.join(ASSUMPTIONS)}")
    return made


def read_symbol(value: Json) -> sympy.Symbol:
    match value:
        case ["Symbol", str(name), *flags] if NAME.fullmatch(name) and all(f in ASSUMPTIONS for f in flags):
            made = sympy.Symbol(name, **dict.fromkeys(flags, True))
            if name in INDEX and made != INDEX[name]:
                raise FormatError(f"the index symbol {name} has the assumptions {flags}")
            return made
    raise FormatError(f"a symbol is {value!r}; it has an identifier for a name, and assumptions among {ASSUMPTIONS}")


_INTEGER_FIELDS = ("batch", "heads", "key_heads", "queries", "keys")
_RANGES = ("ranges_low", "ranges_high")
_EXPRESSIONS = ("score", "keep", "weight")
_PLAIN: dict[str, tuple[type, ...]] = {
    "head_dim": (int,), "value_dim": (int,), "device": (str,), "additive": (bool,), "empty_rows": (str,), "requires_grad": (bool,),
}  # fmt: skip


def site_to_data(site: AttentionSite, writer: Writer) -> dict[str, Json]:
    """``site`` without its origin, its expressions as numbers into ``writer``."""
    data: dict[str, Json] = {name: write_integer(getattr(site, name)) for name in _INTEGER_FIELDS}
    data |= {name: getattr(site, name) for name in _PLAIN}
    data |= {name: [[write_symbol(s), write_integer(e)] for s, e in getattr(site, name)] for name in _RANGES}
    data["dtype"] = write_dtype(site.dtype)
    data["fill"], data["dropout"] = write_number(float(site.fill)), write_number(float(site.dropout))
    data["side"] = [_side_to_data(t) for t in site.side]
    data |= {name: writer.add(getattr(site, name)) for name in _EXPRESSIONS}
    data["sink"] = None if site.sink is None else writer.add(site.sink)
    if site.literal is not None:
        data["literal"] = writer.add(site.literal)
    if (band := site.band) is not None:
        row, keep = writer.add(band.row), writer.add(band.keep)
        data["band"] = [band.left, band.right, row, band.width, keep, float(band.factor), write_dtype(band.dtype)]
    if site.skip is not None:
        data["skip"] = list(astuple(site.skip))
    if site.order is not None:
        data["order"] = [list(site.order.sizes), list(site.order.axes)]
    if site.normaliser == "max":
        data["normaliser"] = "max"
    elif site.normaliser != "softmax":
        maps = [[m.kind, writer.add(m.formula)] for m in (site.query_map, site.key_map)]
        data["linear"] = [site.normaliser, writer.add(site.divisor), site.divisor_detached, *maps]
    return data


def site_from_data(data: Json, reader: Reader) -> AttentionSite:
    known = {*_INTEGER_FIELDS, *_PLAIN, *_RANGES, *_EXPRESSIONS, "dtype", "fill", "dropout", "side", "sink"}
    optional = {"linear", "literal", "normaliser", "band", "skip", "order"} & set(data) if isinstance(data, dict) else set()
    fields(data, "site", known | optional)
    values: dict[str, Any] = {name: read_integer(data[name]) for name in _INTEGER_FIELDS}
    for name, types in _PLAIN.items():
        if type(data[name]) not in types:
            raise FormatError(f"{name} is {data[name]!r}; it is a {types[0].__name__}")
        values[name] = data[name]
    if values["empty_rows"] not in ("nan", "zero", "fill"):
        raise FormatError(f'empty_rows is {values["empty_rows"]!r}; known: "nan", "zero", "fill"')
    for name in _RANGES:
        values[name] = tuple(_bound(pair) for pair in _list(data[name], name))
    values["side"] = tuple(_side(t) for t in _list(data["side"], "side"))
    values |= {"dtype": read_dtype(data["dtype"]), "sink": None if data["sink"] is None else reader.get(data["sink"])}
    if "literal" in optional:
        values["literal"] = reader.get(data["literal"])
    if "band" in optional:
        values["band"] = _band(data["band"], reader)
    if "skip" in optional:
        values["skip"] = _skip(data["skip"])
    if "order" in optional:
        values["order"] = _order(data["order"])
    values |= {name: reader.get(data[name]) for name in _EXPRESSIONS}
    values |= {name: float(read_number(data[name])) for name in ("fill", "dropout")}
    if "normaliser" in optional:
        if data["normaliser"] != "max" or "linear" in optional:
            raise FormatError(f'normaliser is {data["normaliser"]!r}; known beside a linear one: "max"')
        values["normaliser"] = "max"
    if "linear" in optional:
        values |= _linear(data["linear"], reader)
    return AttentionSite(**values)


def _linear(data: Json, reader: Reader) -> dict[str, Any]:
    """The fields of a site without a softmax over keys."""
    match data:
        case [("sum" | "abs_sum" | "none") as normaliser, divisor, bool(detached), [q_kind, q], [k_kind, k]]:
            for kind in (q_kind, k_kind):
                if kind not in KINDS:
                    raise FormatError(f"the kind of a feature map is {kind!r}; known: {', '.join(KINDS)}")
            maps = FeatureMap(q_kind, reader.get(q)), FeatureMap(k_kind, reader.get(k))
            return {
                "normaliser": normaliser, "divisor": reader.get(divisor), "divisor_detached": detached,
                "query_map": maps[0], "key_map": maps[1],
            }  # fmt: skip
    raise FormatError(f'linear is {data!r}; it is ["sum", "abs_sum" or "none", divisor, detached, query map, key map]')


def _skip(data: Json) -> Skip:
    """Which tiles are left out."""
    match data:
        case [float(threshold), None | float() as factor, int(rows), int(keys), None | int() as chunk]:
            sizes = all(type(n) is int and n in TILES for n in (rows, keys))
            runs = chunk is None or (type(chunk) is int and chunk > 0 and chunk % keys == 0)
            if sizes and runs and 0.0 < threshold < 1.0 and (factor is None or 0.0 < factor < math.inf):
                return Skip(threshold, factor, rows, keys, chunk)
    raise FormatError(f"skip is {data!r}; it is [threshold, scale factor or null, rows, keys, chunk or null]")


def _order(data: Json) -> Order:
    """The order in which the tokens are counted."""
    match data:
        case [list(sizes), list(axes)] if all(type(n) is int for n in (*sizes, *axes)):
            if sizes and min(sizes) > 0 and sorted(axes) == list(range(len(sizes))):
                return Order(tuple(sizes), tuple(axes))
    raise FormatError(f"order is {data!r}; it is [sizes of the digits of a place, the digits in the order in which they count]")


def _band(data: Json, reader: Reader) -> Band:
    """A second product of the scores."""
    match data:
        case [None | int() as left, int(right), row, int(width), keep, float(factor), dtype] if width > 0 and math.isfinite(factor):
            for slot in (right,) if left is None else (left, right):
                if type(slot) is not int or not 0 <= slot < reader.slots:
                    raise FormatError(f"a band reads slot {slot!r}; there are {reader.slots} tensors")
            made = Band(left, right, reader.get(row), width, reader.get(keep), factor, read_dtype(dtype))
            if not made.objections:
                return made
            raise FormatError(made.objections[0])
    raise FormatError(f"a band is {data!r}; it is [left slot or null, right slot, row, width, keep, factor, dtype]")


def _bound(pair: Json) -> tuple[sympy.Symbol, sympy.Expr]:
    match pair:
        case [symbol, end]:
            return read_symbol(symbol), read_integer(end)
    raise FormatError(f"a range is {pair!r}; it is a symbol and its bound")


def _side_to_data(t: SideTensor) -> dict[str, Json]:
    shape = [write_integer(n) for n in t.shape]
    return {"shape": shape, "dtype": write_dtype(t.dtype), "requires_grad": t.requires_grad}


def _side(data: Json) -> SideTensor:
    fields(data, "side tensor", {"shape", "dtype", "requires_grad"})
    if not isinstance(data["requires_grad"], bool):
        raise FormatError(f"requires_grad is {data['requires_grad']!r}; it is a bool")
    shape = tuple(read_integer(n) for n in _list(data["shape"], "shape"))
    return SideTensor(shape, read_dtype(data["dtype"]), data["requires_grad"])


def fields(data: Json, what: str, known: Iterable[str]) -> Mapping[str, Json]:
    """``data`` if it is an object with exactly the ``known`` keys; else a FormatError that names the difference."""
    if not isinstance(data, dict):
        raise FormatError(f"a {what} is {type(data).__name__}; it is an object")
    extra, missing = sorted(set(data) - set(known)), sorted(set(known) - set(data))
    if extra or missing:
        raise FormatError(f"a {what} has unknown keys {extra} and lacks {missing}")
    return data


def _list(value: Json, what: str, limit: int = 1000) -> list[Json]:
    if not isinstance(value, list) or len(value) > limit:
        raise FormatError(f"{what} is {type(value).__name__}; it is a list of at most {limit}")
    return value
