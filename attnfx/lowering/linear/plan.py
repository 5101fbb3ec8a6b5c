"""Attention without a softmax over keys as one call of linear attention: factors of queries and of keys, a decay, a divisor.

    w_ij = [j <= i + N - M] lam^(i + N - M - j) a_i b_j (f(q_i) . g(k_j))      O_i = sum_j w_ij v_j / divisor(sum_j w_ij)

Here a weight, the formula that a site has, is taken apart into such a product. Each part is the model's own: nothing is added to a
divisor, and a decay that depends on data, or a mask that is not causal, makes it another attention, which is a sentence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.expr import INDEX, Call, Const, Expr, Int, Load, Score
from attnfx.lowering.linear.decay import H, I, J, Refusal, Values, rate
from attnfx.lowering.linear.under_mask import simplified
from attnfx.site import AttentionSite
from attnfx.sites.facts import conjuncts, prove
from attnfx.sites.serialize import Reader, Writer, fields, read_symbol, write_symbol

#: What a factor of a key alone may be made of: it multiplies a key by itself, and must not overflow where the weight does not.
_BOUNDED = frozenset(("add", "sub", "mul", "neg", "abs", "cast", "cos", "sin", "tanh", "sigmoid", "where", "min", "max",
                      "lt", "le", "eq", "ne", "and", "or", "not"))  # fmt: skip


@dataclass(frozen=True)
class LinearPlan:
    """How a site runs. ``rows``: the factor a of queries, in b, h and i; ``columns``: that of keys, in b, h and j, h the key head;
    ``decay``: log lam, in h; ``divisor``: one of :data:`attnfx.lowering.linear.portable.DIVISORS`, with ``eps``, or empty;
    ``symbols``: the sizes that the formulas mention; ``given``: how many side tensors there are."""

    rows: Expr
    columns: Expr
    causal: bool
    decay: Expr | None = None
    divisor: str = ""
    eps: float = 0.0
    symbols: tuple[sympy.Symbol, ...] = ()
    given: int = 0

    def to_json(self) -> str:
        """The plan as text, which a cached graph keeps."""
        writer = Writer()
        decay = None if self.decay is None else writer.add(self.decay)
        data = {
            "rows": writer.add(self.rows), "columns": writer.add(self.columns), "causal": self.causal, "decay": decay,
            "divisor": self.divisor, "eps": self.eps, "symbols": [write_symbol(s) for s in self.symbols], "given": self.given,
            "nodes": writer.nodes,
        }  # fmt: skip
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_json(text: str) -> LinearPlan:
        """The plan of :meth:`to_json`. Raises FormatError for text that is none."""
        names = ("rows", "columns", "causal", "decay", "divisor", "eps", "symbols", "given", "nodes")
        data = fields(json.loads(text), "plan of linear attention", names)
        reader, decay = Reader(data["nodes"], data["given"]), data["decay"]
        return LinearPlan(
            reader.get(data["rows"]), reader.get(data["columns"]), data["causal"],
            None if decay is None else reader.get(decay), data["divisor"], data["eps"],
            tuple(map(read_symbol, data["symbols"])), data["given"],
        )  # fmt: skip


def linear_plan(site: AttentionSite, values: Values | None = None) -> tuple[LinearPlan, AttentionSite] | str:
    """How linear attention computes ``site``, and the site as that reads it, or why it does not. ``values``: of side tensors,
    where they may be read."""
    made = simplified(site, values)
    try:
        return _planned(made, values), made
    except Refusal as refusal:
        return str(refusal)


def _planned(site: AttentionSite, values: Values | None) -> LinearPlan:
    rows, columns, pairs = _masks(site)
    causal = _causal(site, pairs)
    above, below = _factors(site.score)
    of_rows: Expr = expr.ONE
    of_columns: Expr = expr.ONE
    decays: list[tuple[Expr, bool]] = []
    for atom, inverse in [*((a, False) for a in above), *((b, True) for b in below)]:
        used = expr.symbols(atom)
        join = expr.div if inverse else expr.mul
        if J not in used:
            of_rows = join(of_rows, atom, _float(atom))
        elif I not in used:
            of_columns = join(of_columns, _bounded(atom, inverse), _float(atom))
        else:
            decays.append((atom, inverse))
    if H in expr.symbols(of_columns) | expr.symbols(columns) and site.heads != site.key_heads:
        raise Refusal("A factor of the keys differs from query head to query head, and the heads share keys.")
    divisor, eps = _divisor(site)
    decay = _decay(site, decays, causal, values)
    zero = expr.constant(0.0, torch.float32)
    a, b = (expr.where(kept, x, zero, _float(x)) for kept, x in ((rows, of_rows), (columns, of_columns)))
    formulas = [e for e in (a, b, decay) if e is not None]
    used = frozenset().union(*map(expr.symbols, formulas)) - set(INDEX.values())
    return LinearPlan(a, b, causal, decay, divisor, eps, tuple(sorted(used, key=str)), len(site.side))


def _float(e: Expr) -> torch.dtype:
    return torch.float64 if e.dtype == torch.float64 and not isinstance(e, Const) else torch.float32


def _masks(site: AttentionSite) -> tuple[Expr, Expr, Expr]:
    """The terms of the mask that hold for whole queries, those for whole keys, and those for pairs."""
    found: tuple[list[Expr], list[Expr], list[Expr]] = [], [], []
    for term in conjuncts(site.keep):
        used = expr.symbols(term)
        found[0 if J not in used else 1 if I not in used else 2].append(term)
    rows, columns, pairs = (expr.logical_and(*terms) for terms in found)
    return rows, columns, pairs


def _causal(site: AttentionSite, pairs: Expr) -> bool:
    facts = prove(pairs, site.queries, site.keys, site.ranges)
    ahead = sympy.expand(site.keys - site.queries)
    if facts.full:
        return False
    if facts.causal_offset is None or sympy.expand(facts.causal_offset - ahead) != 0:
        raise Refusal(
            "The mask is not plainly causal with the last query at the last key; a state is for causal or full attention."
        )
    if ahead != 0 and not (ahead.is_Integer and ahead > 0):
        raise Refusal(f"There are {site.queries} queries and {site.keys} keys; a state needs as many, or a known number more.")
    return True


def _factors(w: Expr) -> tuple[list[Expr], list[Expr]]:
    """What multiplies and what divides the score in a weight, which must be a product with the score in it once."""
    if isinstance(w, Score):
        return [], []
    if isinstance(w, Call) and w.op == "cast" and has_score(w):
        return _factors(w.args[0])
    if isinstance(w, Call) and w.op == "neg":
        above, below = _factors(w.args[0])
        return [*above, expr.constant(-1.0, torch.float32)], below
    if isinstance(w, Call) and w.op in ("mul", "div"):
        a, b = w.args
        if w.op == "mul" and has_score(b):
            a, b = b, a
        if has_score(a) and not has_score(b):
            above, below = _factors(a)
            more = _split(b)
            return ([*above, *more[0]], [*below, *more[1]]) if w.op == "mul" else ([*above, *more[1]], [*below, *more[0]])
    raise Refusal("Its weights are no multiple of the product of queries and keys.")


def _split(e: Expr) -> tuple[list[Expr], list[Expr]]:
    """A factor without a score as factors of its own, above and below."""
    if isinstance(e, Call) and e.dtype.is_floating_point:
        if e.op == "cast" and e.args[0].dtype.is_floating_point:
            return _split(e.args[0])
        if e.op in ("mul", "div"):
            a, b = _split(e.args[0]), _split(e.args[1])
            b = b if e.op == "mul" else b[::-1]
            return [*a[0], *b[0]], [*a[1], *b[1]]
    return [e], []


def _bounded(e: Expr, inverse: bool) -> Expr:
    """A factor of a key alone, if it is a number of about the size of what it is made of."""
    wild = any(isinstance(n, Call) and n.op not in _BOUNDED and not _constant_divisor(n) for n in expr.walk(e))
    if wild or (inverse and any(isinstance(n, Load) for n in expr.walk(e))):
        raise Refusal("A factor of the keys alone may overflow where the weights do not.")
    return e


def _constant_divisor(e: Call) -> bool:
    return e.op == "div" and not any(isinstance(n, Load | Call) for n in expr.walk(e.args[1]))


def _divisor(site: AttentionSite) -> tuple[str, float]:
    """The kind of the divisor and its number."""
    if site.normaliser == "none":
        return "", 0.0
    if site.normaliser == "abs_sum":
        raise Refusal("What divides is the sum of the magnitudes of the weights, which no state keeps.")
    held, d = " held" if site.divisor_detached else "", site.divisor
    if isinstance(d, Score):
        return f"add{held}", 0.0
    if isinstance(d, Call) and len(d.args) == 2 and d.op in ("add", "max"):
        l, eps = d.args if has_score(d.args[0]) else d.args[::-1]
        if isinstance(eps, Const | Int) and not expr.symbols(eps):
            number = float(eps.value)
            if isinstance(l, Score):
                return f"{d.op}{held}", number
            if d.op == "max" and isinstance(l, Call) and l.op == "abs" and isinstance(l.args[0], Score):
                return f"max_abs{held}", number
    raise Refusal("What divides is another formula of the sum of the weights than the sum, plus or at least a number.")


def _decay(site: AttentionSite, atoms: list[tuple[Expr, bool]], causal: bool, values: Values | None) -> Expr | None:
    """The logarithm of what a weight loses with each step between query and key."""
    if not atoms:
        return None
    total: Expr | None = None
    for atom, inverse in atoms:
        found = rate(site, atom, values)
        found = expr.call("neg", found, dtype=torch.float64) if inverse else found
        total = found if total is None else expr.call("add", total, found, dtype=torch.float64)
    if not causal:
        raise Refusal("Its weights decay with the distance to both sides; a state is for causal decay.")
    assert total is not None
    slots = {n.slot for n in expr.walk(total) if isinstance(n, Load)}
    if any(site.side[s].requires_grad for s in slots if isinstance(s, int)):
        raise Refusal("Its decay is learned, and a state has no gradient for it.")
    return total
