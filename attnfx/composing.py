"""Compositions of variants: planned on a graph of their own, run on tensors, and written into a model's graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx

from attnfx.algebra.evaluate import integer
from attnfx.algebra.nodes import Load, walk
from attnfx.biases.beside import Known
from attnfx.biases.laid_beside import CONSTANT, held
from attnfx.graphs.model_inputs import placeholder
from attnfx.graphs.rewrite import Splicer
from attnfx.lowering.fixed_lists import fixed
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants.attend import Attend
from attnfx.variants.base import Variant
from attnfx.variants.standing import Standing

Family = Literal["flash", "portable"]


class Unplannable(Exception):
    """An attention of a composition has no plan; ``reasons`` are sentences."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(" ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Composition:
    """A variant made of several operations; ``plans`` of the attentions among them, in order. ``stood``: its single query stands
    where the model's mask says, by :mod:`attnfx.variants.standing`."""

    variant: Variant
    family: Family
    plans: tuple[KernelPlan, ...]
    stood: AttentionSite | None = None

    def compose(self, attend: Attend, *operands: Any) -> Any:
        """The output, of tensors or of proxies."""
        return self.variant.compose(attend if self.stood is None else Standing(attend, self.stood), *operands)


def composed(
    variant: Variant, site: AttentionSite, family: Family, stood: AttentionSite | None = None, known: Known | None = None,
    device: str = "",
) -> Composition | tuple[str, ...]:  # fmt: skip
    """What ``variant`` composes in place of ``site``, or why it cannot. ``known``: what the graph tells, its inputs by name;
    ``device``: where tables are made that are only looked at here, the site's by default."""
    graph = fx.Graph()
    tracer = _Tracer(graph, lambda tensor: graph.create_node("get_attr", "held"))
    operands: list[Any] = [fx.Proxy(graph.placeholder(name), tracer) for name in ("query", "key", "value")]
    loads = [fx.Proxy(graph.placeholder(f"load_{k}"), tracer) for k in range(len(site.side))]
    planned: list[KernelPlan] = []

    def core(site: AttentionSite, plan: KernelPlan, lse: bool, *tensors: Any) -> Any:
        planned.append(plan)
        return tracer.create_proxy("call_function", torch.ops.attnfx.attention.default, (), {})

    def number(size: sympy.Expr) -> Any:
        return int(size) if size.is_Integer else tracer.create_proxy("placeholder", str(size), (), {})

    def given(name: str) -> Any:
        found = "The inputs of the model are not known here." if known is None or known.given is None else known.given(name)
        if isinstance(found, str) or (found := _misfit(site, found, name)):
            raise Unplannable((str(found),))
        return tracer.create_proxy("placeholder", name, (), {})

    made = Composition(variant, family, (), stood)
    try:
        where = torch.device(device or site.device)
        made.compose(_Traced(tracer, site, loads, where, family, number, core, given), *operands)
    except Unplannable as failure:
        return failure.reasons
    return replace(made, plans=tuple(planned))


def written(splicer: Splicer, made: Composition, site: AttentionSite, device: torch.device) -> Callable[..., fx.Node]:
    """What writes a composition into a graph, from the nodes of canonical operands and of the side tensors of ``site``."""

    def call(query: fx.Node, key: fx.Node, value: fx.Node, loads: Sequence[fx.Node]) -> fx.Node:
        tracer = _Tracer(splicer.graph, lambda tensor: held(splicer, tensor.to(device), shared=True), splicer.made)

        def core(site: AttentionSite, plan: KernelPlan, lse: bool, *tensors: Any) -> Any:
            query, key, value, *loads = (tracer.hold(t) if isinstance(t, Tensor) else t.node for t in tensors)
            return fx.Proxy(attention_node(splicer, plan, site, query, key, value, loads, lse), tracer)

        def number(size: sympy.Expr) -> Any:
            found = splicer.number(size)
            return found if isinstance(found, int) else fx.Proxy(found, tracer)

        def given(name: str) -> Any:
            node = placeholder(splicer.graph, name)
            assert isinstance(node, fx.Node), node
            value = splicer.mirror.value[node]
            return fx.Proxy(splicer.held(value, value), tracer)

        proxies: list[Any] = [fx.Proxy(node, tracer) for node in (query, key, value)]
        side = [fx.Proxy(node, tracer) for node in loads]
        before = len(splicer.made)
        out: Any = made.compose(_Traced(tracer, site, side, device, made.family, number, core, given), *proxies)
        for node in splicer.made[before:]:
            if str(node.target).startswith("attnfx.linear_attention"):
                node.kwargs = {**node.kwargs, "site": site.origin.module or site.origin.node}
        return out.node  # type: ignore[no-any-return]

    return call


def attention_node(
    splicer: Splicer, plan: KernelPlan, site: AttentionSite, query: fx.Node, key: fx.Node, value: fx.Node,
    loads: Sequence[fx.Node], lse: bool = False,
) -> fx.Node:  # fmt: skip
    """A call of the operator that runs ``plan``; its caller records the node."""
    sizes = [splicer.number(s) for s in plan.symbols]
    # torch's own operations around the kernel
    apart = (site.sink, site.weight, plan.shift, *(t.recipe for t in plan.tables))
    rows = [n for e in apart if e is not None for n in walk(e)]
    planned = {g.slot for g in plan.gradients} | {n.slot for n in rows if isinstance(n, Load)}
    planned |= set() if site.band is None else set(site.band.slots)
    given = [  # what is only compared with something gets no gradient, as in the model
        splicer.call(torch.ops.aten.detach.default, load) if side.requires_grad and slot not in planned else load
        for slot, (side, load) in enumerate(zip(site.side, loads, strict=True))
    ]
    ops = torch.ops.attnfx
    whole = ops.attention_lse.default if lse else ops.attention.default
    target = whole if site.normaliser == "softmax" else ops.attention_unnormalised.default
    lists = [held(splicer, t, shared=True) for t in fixed(plan, [_constant(splicer, load) for load in loads])]
    return splicer.graph.call_function(
        target, (query, key, value, given, sizes, plan.to_json(), site.origin.module or site.origin.node, *lists)
    )


def _constant(splicer: Splicer, node: fx.Node) -> Tensor | None:
    """The tensor that a variant computed and the graph holds; None for what a call brings."""
    return splicer.gm.get_buffer(str(node.target)) if node.op == "get_attr" and str(node.target).startswith(CONSTANT) else None


class OnTensors(Attend):
    """Runs a composition at once, for tests and for comparing; ``values`` of the size symbols of ``site``."""

    def __init__(
        self, site: AttentionSite, loads: Sequence[Tensor], device: torch.device, family: Family,
        values: dict[sympy.Symbol, int] | None = None, inputs: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        import attnfx.lowering.ops  # noqa: F401 - registers the operators

        self.site, self.loads, self.device, self.family, self.values = site, tuple(loads), device, family, values or {}
        self.inputs = inputs or {}

    def __call__(self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        return self._run(torch.ops.attnfx.attention, site, query, key, value, more)  # type: ignore[no-any-return]

    def with_lse(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        return self._run(torch.ops.attnfx.attention_lse, site, query, key, value, more)  # type: ignore[no-any-return]

    def _run(self, operator: Any, site: AttentionSite, *operands: Any) -> Any:
        query, key, value, more = operands
        plan = _plan(site, self.family)
        sizes = [self.values[s] for s in plan.symbols]
        return operator(query, key, value, [*self.loads, *(t.to(self.device) for t in more)], sizes, plan.to_json())

    def given(self, name: str) -> Tensor:
        return self.inputs[name]

    def number(self, size: sympy.Expr | int) -> int:
        return int(integer(sympy.sympify(size), self.values))

    def arange(self, end: int) -> Tensor:
        return torch.arange(end, device=self.device)

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


class _Traced(Attend):
    """``number`` of a size, ``core``, a proxy of an attention, and what is ``given`` are the graph's own business."""

    def __init__(
        self, tracer: _Tracer, site: AttentionSite, loads: Sequence[Any], device: torch.device, family: Family,
        number: Callable[[sympy.Expr], Any], core: Callable[..., Any], given: Callable[[str], Any],
    ) -> None:  # fmt: skip
        self.tracer, self.site, self.loads, self.device = tracer, site, tuple(loads), device
        self.family, self._number, self._core, self._given = family, number, core, given

    def __call__(self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()) -> Tensor:
        core: Tensor = self._core(site, _plan(site, self.family), False, query, key, value, *self.loads, *more)
        return core

    def with_lse(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        both = self._core(site, _plan(site, self.family), True, query, key, value, *self.loads, *more)
        return operator.getitem(both, 0), operator.getitem(both, 1)

    def given(self, name: str) -> Tensor:
        made: Tensor = self._given(name)
        return made

    def number(self, size: sympy.Expr | int) -> int:
        found: int = self._number(sympy.sympify(size))
        return found

    def arange(self, end: int) -> Tensor:
        made: Any = self.tracer.create_proxy("call_function", torch.arange, (end,), {"device": self.device})
        return made  # type: ignore[no-any-return]

    def constant(self, tensor: Tensor) -> Tensor:
        made: Any = fx.Proxy(self.tracer.hold(tensor), self.tracer)
        return made  # type: ignore[no-any-return]

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        made: Any = self.tracer.create_proxy("call_function", torch.zeros, (shape,), {"dtype": dtype, "device": self.device})
        return made  # type: ignore[no-any-return]


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Records what proxies are asked for; ``hold`` makes a node of a tensor, ``made`` notes every other node."""

    def __init__(self, graph: fx.Graph, hold: Callable[[Tensor], fx.Node], made: list[fx.Node] | None = None) -> None:
        super().__init__(graph)
        self.hold, self.made = hold, made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self.made is not None:
            self.made.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        return self.hold(a) if isinstance(a, Tensor) else super().create_arg(a)


def _misfit(site: AttentionSite, found: SideTensor, name: str) -> str:
    """Why an input is no number for each key of each sequence; empty where it is."""
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        return f'The input "{name}" is {found.dtype}; whole numbers are supported.'
    *rows, keys = found.shape or (sympy.Integer(1),)
    if len(rows) <= 1 and sympy.expand(keys - site.keys) == 0 and all(n in (1, site.batch) for n in rows):
        return ""
    return (
        f'The input "{name}" has the sizes {tuple(found.shape)}; the site has {site.batch} sequences of {site.keys} keys, and '
        "needs a number for each key."
    )


def _plan(site: AttentionSite, family: Family) -> KernelPlan:
    plan = make_plan(site, family)
    if not isinstance(plan, KernelPlan):
        raise Unplannable(plan)
    return plan
