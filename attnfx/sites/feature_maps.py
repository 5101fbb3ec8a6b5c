"""Feature maps of linear attention: what is done to queries and keys before their product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnfx.expr import Expr, Load, Score, rebuild

#: The raw operand element, or the raw score.
RAW = Score()
KINDS = ("elementwise", "softmax_features", "softmax_tokens")


@dataclass(frozen=True)
class FeatureMap:
    """``f(x)`` of queries or keys ``x`` (.., tokens, head_dim); the width stays.

    ``formula`` is elementwise, :class:`attnfx.expr.Score` standing for an element of x. ``kind`` is what follows it: nothing
    (``"elementwise"``), a softmax over head_dim (``"softmax_features"``, arXiv 1812.01243), or one over the tokens
    (``"softmax_tokens"``). A map that has no such form (random features, a Taylor feature vector) is none: its result is the
    operand. Raises ValueError for another kind.
    """

    kind: str = "elementwise"
    formula: Expr = RAW

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a feature map is {self.kind!r}; known: {', '.join(KINDS)}")

    @property
    def identity(self) -> bool:
        return self.kind == "elementwise" and isinstance(self.formula, Score)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``f(x)`` in the dtype of ``x``."""
        from attnfx.algebra.evaluate import evaluate

        if not isinstance(self.formula, Score):
            grid = {"i": torch.zeros((), dtype=torch.int64, device=x.device)}
            x = evaluate(self.formula, grid, (), {}, score=x, dtype=x.dtype)
        return x if self.kind == "elementwise" else x.softmax(-1 if self.kind == "softmax_features" else -2)

    def notation(self, letter: str) -> str:
        """``max(q, 0)``, ``softmax_d(k)``: the map in the letters of the site, ``letter`` standing for x."""
        from attnfx.sites.notation import formula

        inner = formula(rebuild(self.formula, lambda n: Load(letter, (), n.dtype) if isinstance(n, Score) else None))
        inner = inner.replace(f"{letter}[]", letter)
        elu = f"0 < {letter} ? {letter} : exp(min({letter}, 0)) - 1"
        inner = inner.replace(f"({elu})", f"elu({letter})").replace(elu, f"elu({letter})")
        return {"elementwise": inner, "softmax_features": f"softmax_d({inner})", "softmax_tokens": f"softmax_j({inner})"}[self.kind]


IDENTITY = FeatureMap()
