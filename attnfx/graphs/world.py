"""The fake world that a mirror is traced in: its own fake mode, and symbols that mirror those of the user's ShapeEnv."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from attnfx.algebra.integers import Ranges
from attnfx.graphs.evident import evident


def example_of(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def storage_of(t: torch.Tensor) -> int:
    """Which memory a tensor lies in; under ``vmap`` that of the tensor behind."""
    while torch._C._functorch.is_batchedtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return int(t.untyped_storage()._cdata)


class World:
    """Fake inputs in a mode of our own, whose symbols mirror those of the user's ShapeEnv; those that are proved equal are one."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        # what is equal here is traced once anyway (`trace_memo.py`), and to remember the rest costs more than it saves
        self.mode.cache_enabled = False
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.user_env: ShapeEnv | None = None
        self.equal: dict[sympy.Symbol, sympy.Symbol] = {}
        self.ours: dict[sympy.Symbol, sympy.Symbol] = {}
        self.to_user: dict[sympy.Symbol, sympy.Symbol] = {}
        self.inputs = [self.convert(example_of(p)) for p in self.placeholders]

    def convert(self, value: Any) -> Any:
        """A value of the user's fake world as its twin in ours."""
        if isinstance(value, torch.SymInt):
            return self.symint(value)
        if isinstance(value, torch.SymFloat):
            return self.symfloat(value)
        if not isinstance(value, torch.Tensor):
            return value
        shape = [self.convert(s) for s in value.shape]
        stride = [self.convert(s) for s in value.stride()]
        with self.mode, torch.no_grad():
            twin = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return twin.requires_grad_(value.requires_grad) if value.requires_grad else twin

    def meet(self, env: ShapeEnv) -> None:
        if env is not self.user_env:
            self.user_env, self.equal = env, _equal(env)

    def symint(self, value: torch.SymInt) -> int | torch.SymInt:
        self.meet(value.node.shape_env)
        expression = value.node.expr.xreplace(self.equal)
        ours = expression.xreplace({s: self.symbol(s) for s in expression.free_symbols})
        return self.env.create_symintnode(ours, hint=value.node.hint) if ours.free_symbols else int(ours)

    def symfloat(self, value: torch.SymFloat) -> float | torch.SymFloat:
        self.meet(value.node.shape_env)
        expression = value.node.expr
        if not expression.is_Symbol:
            return value.node.hint if value.node.hint is not None else float("nan")
        return self.env.create_symfloatnode(self.symbol(expression), hint=value.node.hint)

    def symbol(self, s: sympy.Symbol) -> sympy.Symbol:
        if s not in self.ours:
            hint = _hints(self.user_env).get(s)
            if hint is None:
                raise ValueError(f"size {s} has no hint")
            source = ConstantSource(f"__attnfx_{s}")
            plain = float(hint) if hint.is_Float else int(hint)
            twin = self.env.create_symbol(
                plain, source, DimDynamic.DYNAMIC, positive=s.is_positive, do_not_specialize_zero_one=True
            )
            if self.user_env is not None and s in self.user_env.var_to_range and not isinstance(plain, float):
                self.env.var_to_range[twin] = self.user_env.var_to_range[s]
            self.ours[s], self.to_user[twin] = twin, s
        return self.ours[s]

    def shared(self) -> dict[int, int]:
        """For inputs that are views of one memory: the storage of each twin, and the one that stands for all of them."""
        first: dict[int, int] = {}
        pairs = zip(self.placeholders, self.inputs, strict=True)
        tensors = [(example_of(p), twin) for p, twin in pairs if isinstance(twin, torch.Tensor)]
        return {storage_of(twin): first.setdefault(storage_of(example), storage_of(twin)) for example, twin in tensors}

    def ranges(self) -> Ranges:
        """What the user's ShapeEnv promises of each size."""
        return known(self.env, self.to_user)

    def lowest(self, e: sympy.Expr) -> sympy.Integer | None:
        low = self.env.bound_sympy(e).lower
        return low if low.is_Integer else None

    def unproved(self) -> str:
        """Why the mirror holds for the traced sizes only; empty where it holds for all that the user's guards admit."""
        promised = _promised(self.user_env, self.equal)
        for guard in self.env.guards:
            expression = guard.expr.xreplace(self.to_user)
            if expression not in promised and not all(self._holds(part, promised) for part in sympy.And.make_args(guard.expr)):
                return f"reading the graph needs {expression}, which the compile does not guarantee"
        return ""

    def _holds(self, claim: sympy.Basic, promised: AbstractSet[sympy.Basic]) -> bool:
        """Whether a claim in our symbols follows from the user's guards."""
        expression = claim.xreplace(self.to_user)
        if expression in promised or expression == sympy.true:
            return True
        if self.user_env is not None and self.user_env._maybe_evaluate_static(expression) == sympy.true:
            return True
        return evident(claim, self.lowest)


def known(env: ShapeEnv, symbols: Iterable[sympy.Symbol]) -> Ranges:
    """What ``env`` promises of ``symbols``."""
    low, high = {}, {}
    for s in symbols:
        bound = env.var_to_range.get(s)
        if bound is not None and bound.lower.is_Integer:
            low[s] = bound.lower
        if bound is not None and bound.upper.is_Integer and bound.upper < 2**31:
            high[s] = bound.upper
    return Ranges(low, high)


def _equal(env: ShapeEnv) -> dict[sympy.Symbol, sympy.Symbol]:
    """Sizes that the guards of ``env`` make equal to another one, as in ``a + s == a + t``, which ShapeEnv does not solve."""
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for claim in (env.replace(g.expr) for g in env.guards):
        if not isinstance(claim, sympy.Eq):
            continue
        difference = sympy.expand(claim.lhs - claim.rhs).xreplace(found)
        pair = sorted(difference.free_symbols, key=str)
        if len(pair) == 2 and difference in (pair[0] - pair[1], pair[1] - pair[0]) and all(s in _hints(env) for s in pair):
            found = {s: t.xreplace({pair[1]: pair[0]}) for s, t in found.items()} | {pair[1]: pair[0]}
    return found


def _promised(env: ShapeEnv | None, equal: Mapping[sympy.Symbol, sympy.Symbol]) -> set[sympy.Basic]:
    """The guards of ``env`` and their conjuncts, also in the symbols by which later guards replace earlier ones."""
    if env is None:
        return set()
    guards = {e for g in env.guards for e in (g.expr, env.replace(g.expr), env.replace(g.expr).xreplace(equal))}
    return guards | {part for e in guards for part in sympy.And.make_args(e)}


def _hints(env: ShapeEnv | None) -> Mapping[sympy.Symbol, sympy.Expr]:
    if env is None:
        return {}
    hints = env.__dict__.get("backed_var_to_val")  # torch >= 2.12
    return hints if hints is not None else env.__dict__["var_to_val"]  # type: ignore[no-any-return]
