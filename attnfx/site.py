"""AttentionSite: what one attention of a model is, exactly and without reference to the graph it was found in.

    z(b,h,i,j) = score(q_i . k_j)                       the score program, float32; a band stands beside q_i . k_j
    z          = keep ? z : fill   (or z + fill)        the mask, as the model spells it
    p          = exp(z) / (exp(sink) + sum_j exp(z))    the softmax; without a sink its term is absent
    O(b,h,i)   = sum_j weight * dropout(p) * v_j

Without a softmax over keys (``normaliser`` is not "softmax"; linear attention, arXiv 2006.16236, and its quadratic forms):

    w(b,h,i,j) = keep ? score(f(q_i) . g(k_j)) : 0      f, g: ``query_map``, ``key_map``
    O(b,h,i)   = sum_j w v_j / divisor(l),  l = sum_j w

Letters: b batch, h query head, i query, j key, d head_dim; sizes B, H (Hk key heads), M queries, N keys, D, Dv.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import sympy
import torch

from attnfx import expr
from attnfx.algebra.integer_functions import foreign
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, Int
from attnfx.sites.band import Band
from attnfx.sites.facts import Facts, prove
from attnfx.sites.feature_maps import IDENTITY, FeatureMap
from attnfx.sites.ordering import Order
from attnfx.sites.skipping import Skip


@dataclass(frozen=True)
class SideTensor:
    """A tensor that the expressions load from: its sizes, dtype, and whether a gradient of it is wanted."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    requires_grad: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a site was found; it does not count in equality, so that equal layers share one plan.

    ``pattern``: how the model spells it; ``relation``: "self" or "cross" as :mod:`attnfx.patterns.relation` tells, or "";
    ``kinds``: what it was before a variant changed it.
    """

    module: str = ""
    source: str = ""
    node: str = ""
    pattern: str = ""
    relation: str = ""
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AttentionSite:
    """One attention. Sizes are sympy integers or expressions of the graph's size symbols.

    ``score``: natural-unit logits from :class:`attnfx.expr.Score`; ``keep``: the mask predicate; ``fill`` with
    ``additive``: what the
    model puts (or adds) where keep is false; ``empty_rows``: what a query without keys gives: ``"nan"`` (plain softmax of -inf),
    ``"zero"`` (torch's scaled_dot_product_attention), or ``"fill"`` (a finite fill: the softmax over all keys).

    ``sink``: the logit, in b, h and i, of one key more that has no value (gpt-oss; arXiv:2309.17453): a row whose other keys
    are all -inf then gives 0. ``literal``: the filled logits with the model's own half-precision steps, where it adds in half
    precision: the meaning of rows that have nothing but fills, where such steps are wide. Score and fill say the same in
    float32; who replaces one of them forgets it. ``weight``: a finite factor of the probabilities after
    the softmax, in b, h, i and j, without :class:`attnfx.expr.Score`: what a head mask or a second mask does; the denominator
    does not know it. ``band``: a product of each query with a vector of each distance; :class:`attnfx.expr.Score` is q.k and
    this product. ``skip``: tiles of scores that are taken for -inf because they lie far below what their rows have met.
    ``order``: the order in which i and j count the tokens, queries and keys alike, where that is not the one in which they lie.
    ``normaliser``: ``"softmax"``; ``"max"``, exponentials that only their row's largest divides (a constant to gradients), which
    give their row sums and maxima too; or without exponentials ``"sum"``, ``"abs_sum"`` (what divides a row is ``divisor``, in
    which :class:`attnfx.expr.Score` stands for the sum of the row's weights, or of their magnitudes) or ``"none"``;
    ``divisor_detached``: the model lets no gradient through it. Maps, divisor and normaliser belong together: with
    ``"softmax"`` and ``"max"`` the first two are the identity.
    """

    batch: sympy.Expr
    heads: sympy.Expr
    key_heads: sympy.Expr
    queries: sympy.Expr
    keys: sympy.Expr
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    score: Expr
    keep: Expr = expr.TRUE
    fill: float = float("-inf")
    additive: bool = False
    empty_rows: str = "nan"
    dropout: float = 0.0
    sink: Expr | None = None
    literal: Expr | None = None
    weight: Expr = expr.ONE
    side: tuple[SideTensor, ...] = ()
    requires_grad: bool = False
    ranges_low: tuple[tuple[sympy.Symbol, sympy.Expr], ...] = ()
    ranges_high: tuple[tuple[sympy.Symbol, sympy.Expr], ...] = ()
    origin: Origin = field(default_factory=Origin, compare=False)
    normaliser: str = "softmax"
    divisor: Expr = IDENTITY.formula
    divisor_detached: bool = False
    query_map: FeatureMap = IDENTITY
    key_map: FeatureMap = IDENTITY
    band: Band | None = None
    skip: Skip | None = None
    order: Order | None = None

    def replace(self, **changes: object) -> AttentionSite:
        if "literal" not in changes and not changes.keys().isdisjoint(("score", "keep", "fill", "additive", "empty_rows")):
            changes["literal"] = None
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def exponential(self) -> bool:
        """Whether the weights are exponentials of the scores, divided by their sum or not."""
        return self.normaliser in ("softmax", "max")

    @property
    def ranges(self) -> Ranges:
        """What is known of the size symbols."""
        return Ranges(dict(self.ranges_low), dict(self.ranges_high))

    @cached_property
    def facts(self) -> Facts:
        return prove(self.keep, self.queries, self.keys, self.ranges)

    @property
    def query_length(self) -> Expr:
        return Int(self.queries)

    @property
    def key_length(self) -> Expr:
        return Int(self.keys)

    @property
    def is_causal(self) -> bool:
        """Whether no query is proved to see keys after its own position (up to a constant offset)."""
        return self.facts.causal

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The size symbols that the expressions mention, sorted by name: the numbers a kernel needs at run time."""
        used = frozenset().union(*map(expr.symbols, self.expressions))
        return tuple(sorted(used - set(expr.INDEX.values()), key=str))

    @property
    def expressions(self) -> tuple[Expr, ...]:
        """Everything that may load or mention a size: score, keep, sink and literal where there are any, weight, divisor."""
        optional = [e for e in (self.sink, self.literal) if e is not None]
        band = () if self.band is None else (self.band.row, self.band.keep)
        return (self.score, self.keep, *optional, self.weight, self.divisor, *band)

    @property
    def uncomputable(self) -> tuple[str, ...]:
        """Sentences on the sizes and integers with functions that neither a graph nor a kernel can be asked for."""
        plain = (self.batch, self.heads, self.key_heads, self.queries, self.keys, *(n for t in self.side for n in t.shape))
        held = (n.value for e in self.expressions for n in expr.walk(e) if isinstance(n, Int))
        found = {e: name for e in (*plain, *held) if (name := foreign(e))}
        return tuple(f"The size {e} has the function {name}, which has no form here." for e, name in found.items())

    @property
    def scale(self) -> float | None:
        """The factor ``c`` where the score program is exactly ``c * (q . k)``, else None."""
        if isinstance(self.score, expr.Score):
            return 1.0
        if isinstance(self.score, expr.Call) and self.score.op in ("mul", "div"):
            a, b = self.score.args
            if self.score.op == "mul" and isinstance(b, expr.Score):
                a, b = b, a
            if isinstance(a, expr.Score) and isinstance(b, expr.Const) and (self.score.op == "mul" or b.value):
                return float(b.value) if self.score.op == "mul" else 1.0 / float(b.value)
        return None

    def __str__(self) -> str:
        from attnfx.sites.notation import line

        return line(self)

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *loads: torch.Tensor, sizes: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """The plain meaning in the dtype of ``q``: q (B,H,M,D), k (B,Hk,N,D), v (B,Hk,N,Dv) -> (B,H,M,Dv). Forms S x S tensors.

        ``sizes`` are the values of :attr:`symbols`. No dropout. The oracle of the tests.
        """
        if not self.exponential:
            from attnfx.sites import linear_reference

            return linear_reference.attention(self, q, k, v, loads, sizes)
        return self.reference_lse(q, k, v, *loads, sizes=sizes)[0]

    def reference_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *loads: torch.Tensor, sizes: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`reference`, and the natural log of each row's softmax denominator, the sink included: (B,H,M)."""
        from attnfx.sites.reference import attention

        return attention(self, q, k, v, loads, sizes)
