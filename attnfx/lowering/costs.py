"""What a formula costs inside of a tile, in issue slots for each score: the numbers by which a plan chooses a form.

A slot is one lane of one instruction. A multiplication with an addition (FMA) is one. A tile holds its scores in registers, and a
thread two to four rows of them, so that what depends on the key alone is computed once for these rows, and what depends on the
query alone once for all keys of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from attnfx import expr
from attnfx.algebra.integers import FloorDiv, Mod, PythonMod
from attnfx.expr import INDEX, Call, Expr, Int, Load, Score, children

TRANSCENDENTAL_OPS = frozenset(
    ("exp", "exp2", "log", "log2", "log1p", "sin", "cos", "sqrt", "rsqrt", "tanh", "erf", "sigmoid", "pow")
)


@dataclass(frozen=True)
class Costs:
    """Slots. ``near_byte``: of what many tiles share, which the caches hold; ``far_byte``: of what each tile reads of its own from
    device memory (3.35 TB/s against 132 multiprocessors of 128 lanes). ``matrix``: a multiplication with an addition in half
    precision on the tensor cores. ``per_key`` and ``per_query``: how often what depends on one side alone is computed, for each
    score."""

    fma: float = 1.0
    transcendental: float = 8.0
    division: float = 8.0
    rounding: float = 3.0
    convert: float = 1.0
    integer_division: float = 6.0
    near_byte: float = 1.0
    far_byte: float = 8.0
    per_key: float = 0.25
    matrix: float = 1 / 16
    per_query: float = 1 / 16


COSTS = Costs()
TABLE_BYTES = 4
_NEAR = ("", "h")


def share(e: Expr, costs: Costs = COSTS) -> float:
    """For how many of the scores of a tile ``e`` is computed: all, one for some rows, one for all keys, or none."""
    names = _sides(e)
    return {"ij": 1.0, "j": costs.per_key, "i": costs.per_query, "": 0.0}[names]


def in_tile(e: Expr, costs: Costs = COSTS) -> float:
    """Slots for each score of computing ``e`` in the tile, each distinct part once; the score itself is free."""
    return sum(_own(node, costs) * share(node, costs) for node in expr.walk(e))


def everywhere(e: Expr, costs: Costs = COSTS) -> float:
    """Slots for each element of computing ``e`` by itself, as a table is made."""
    return sum(_own(node, costs) for node in expr.walk(e))


def per_key_number(costs: Costs = COSTS) -> float:
    """Reading a number of the key and adding it to the score."""
    return costs.per_key * TABLE_BYTES * costs.near_byte + costs.fma


def product(costs: Costs = COSTS) -> float:
    """One product of a number of the query and one of the key, added to the score."""
    return (costs.per_key + costs.per_query) * TABLE_BYTES * costs.near_byte + costs.fma


def columns(count: int, padding: int, queries: int, keys: int, dtype: torch.dtype, costs: Costs = COSTS) -> float:
    """``count`` further columns of queries and keys, written and read once, by which padded head_dim grows by ``padding``."""
    each = costs.matrix if dtype.itemsize < 4 else costs.fma
    return padding * each + 2 * count * dtype.itemsize * costs.far_byte * (1 / queries + 1 / keys)


def tabulated(near: bool = True, costs: Costs = COSTS) -> float:
    """Reading a number of a table of distances, or of query and key, and adding it to the score."""
    return TABLE_BYTES * (costs.near_byte if near else costs.far_byte) + costs.fma


def band(width: int, costs: Costs = COSTS) -> float:
    """A second product of the scores: for each of them ``width`` multiplications, written and read askew."""
    return width * costs.matrix + 2 * TABLE_BYTES * costs.near_byte + costs.fma


def bytes_read(e: Expr, costs: Costs = COSTS) -> float:
    """Bytes for each score that ``e`` loads inside of a tile."""
    return sum(n.dtype.itemsize * share(n, costs) for n in expr.walk(e) if isinstance(n, Load))


def _sides(e: Expr) -> str:
    if any(isinstance(n, Score) for n in expr.walk(e)):
        return "ij"
    found = expr.symbols(e)
    return "".join(name for name in "ij" if INDEX[name] in found)


def _own(e: Expr, costs: Costs) -> float:
    """The slots of one node, without its children."""
    if isinstance(e, Int):
        return _integer(e.value, costs)
    if isinstance(e, Load):
        names = "".join(n for n in "bh" if expr.depends_on(e, n))
        near = names in _NEAR or _sides(e) != "ij"
        return e.dtype.itemsize * (costs.near_byte if near else costs.far_byte)
    if not isinstance(e, Call):
        return 0.0
    if e.op == "cast":
        half = e.dtype in (torch.float16, torch.bfloat16)
        return costs.rounding if half else costs.convert if not children(e)[0].dtype.is_floating_point else 0.0
    own = costs.fma
    if e.op in TRANSCENDENTAL_OPS and not (e.op == "pow" and expr.is_number(e.args[1], 2)):
        own = costs.transcendental
    elif e.op in ("div", "floordiv", "mod"):
        own = costs.division if e.dtype.is_floating_point else costs.integer_division
    return own + (costs.rounding if e.dtype in (torch.float16, torch.bfloat16) else 0.0)


def _integer(e: sympy.Expr, costs: Costs) -> float:
    total = 0.0
    for node in sympy.preorder_traversal(e):
        sides = node.free_symbols & {INDEX["i"], INDEX["j"]}
        whole = e.free_symbols & {INDEX["i"], INDEX["j"]}
        if not node.args or len(sides) < len(whole):
            continue  # computed for one side, and counted there as next to nothing
        each = costs.integer_division if isinstance(node, FloorDiv | Mod | PythonMod) else costs.fma
        total += each * max(1, len(node.args) - 1)
    return total
