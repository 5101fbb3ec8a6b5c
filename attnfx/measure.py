"""Verification of each rewritten attention: the original and the replacement run side by side on the inputs of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from attnfx.graphs.subgraphs import is_call
from attnfx.graphs.surroundings import undisturbed

if TYPE_CHECKING:
    from attnfx.report import SiteReport

#: The largest relative error, as a multiple of the dtype's epsilon, that verification of an exact rewrite accepts.
TOLERANCE = 64.0


@dataclass(frozen=True)
class Measured:
    """What the replacement of one attention gave beside the original on the same operands, by relative L2 norms.

    ``error``: ``|new - old| / |old|`` over the finite elements; infinite where NaNs or infinities are in different places.
    ``bound``: what an
    exact rewrite may differ by, or None where nothing is demanded: the policy asked for something else. ``note``: why nothing was
    measured (``error`` is NaN then).
    """

    error: float
    bound: float | None
    note: str = ""

    @property
    def beyond(self) -> bool:
        """Whether the replacement is not what the original is."""
        return self.bound is not None and not self.note and not self.error <= self.bound

    def __str__(self) -> str:
        if self.note:
            return f"not measured: {self.note}"
        return f"error {self.error:.2g}" + ("" if self.bound is None else f" (bound {self.bound:.2g})")


@dataclass
class Probe:
    """A graph in which originals and replacements stand side by side. ``pairs``: site, original and replacement by node name;
    ``inside``: the probes of its regions by attribute name."""

    gm: fx.GraphModule
    pairs: list[tuple[str, str, str]]
    inside: dict[str, Probe] = field(default_factory=dict)


def of_sites(probe: Probe, sites: Sequence[SiteReport], inputs: Sequence[Any]) -> dict[str, Measured]:
    """What each of ``sites`` measures on ``inputs``, by name."""
    try:
        found, why = measure(probe, inputs), "this call does not reach it, or not outside of a loop"
    except Unmeasurable as error:
        found, why = {}, str(error)
    return {site.name: _judged(site, found.get(site.name), why) for site in sites}


def _judged(site: SiteReport, error: float | None, why: str) -> Measured:
    if site.site.dropout:
        return Measured(float("nan"), None, f"it drops {site.site.dropout:g} at random")
    if error is None:
        return Measured(float("nan"), None, why)
    return Measured(error, bound(site.site.dtype) if site.exact else None)


def probe(gm: fx.GraphModule, pairs: Sequence[tuple[str, fx.Node, fx.Node]]) -> Probe:
    """A copy of ``gm``, spliced and not yet pruned, that computes with the originals; the replacements are computed beside them."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    for _, old, new in pairs:
        copies[new].replace_all_uses_with(copies[old])
    names = [(site, copies[old].name, copies[new].name) for site, old, new in pairs]
    return Probe(fx.GraphModule(gm, graph), names)


def measure(probe: Probe, inputs: Sequence[Any]) -> dict[str, float]:
    """The error of each site of ``probe`` on ``inputs``, which stay as they are, as do random number generators. Raises
    Unmeasurable where the inputs are not real tensors."""
    if any(isinstance(t, FakeTensor) or (isinstance(t, Tensor) and t.is_meta) for t in inputs):
        raise Unmeasurable("the compile was not given real tensors")
    found: dict[str, float] = {}
    with torch._guards.tracing(None), undisturbed(), random_numbers_kept(inputs), torch.no_grad():
        _Beside(probe, found).run(*copied(inputs))
    return found


@contextmanager
def random_numbers_kept(inputs: Sequence[Any]) -> Iterator[Callable[[], bool]]:
    """The random number generators of the CPU and of the devices of ``inputs`` are in the end as they were. Gives a function that
    tells whether numbers were drawn."""
    devices = sorted({t.device.index for t in inputs if isinstance(t, Tensor) and t.device.type == "cuda"})

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]

    with torch.random.fork_rng(devices):
        before = states()
        yield lambda: not all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))


class Unmeasurable(Exception):
    """Nothing can be measured; the message is the reason."""


def copied(inputs: Sequence[Any]) -> list[Any]:
    """The tensors of ``inputs`` with memory of their own; what shared memory shares it still."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        plain = t.detach()
        if type(plain) is not Tensor or plain.layout != torch.strided:
            return plain.clone()
        known = plain.untyped_storage()
        memory = storages.setdefault(known._cdata, known.clone())  # type: ignore[no-untyped-call]
        return plain.new_empty(0).set_(memory, plain.storage_offset(), plain.shape, plain.stride())

    return [copy(t) for t in inputs]


def difference(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` in L2 over what is finite; infinite where the rest is not the same."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    finite = b.isfinite()
    if not torch.equal(_signs(a[~finite]), _signs(b[~finite])):
        return float("inf")
    a, b = a[finite], b[finite]
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if a.numel() else 0.0


def _signs(t: Tensor) -> Tensor:
    """Infinities as signs, NaN as 0, anything finite as 2."""
    return torch.where(t.isfinite(), 2.0, t.sign().nan_to_num(0.0))


def bound(dtype: torch.dtype) -> float:
    """What an exact rewrite in ``dtype`` may differ from the original by."""
    return TOLERANCE * torch.finfo(dtype).eps


class _Beside(fx.Interpreter):
    """Runs a probe, comparing each pair as soon as both are known."""

    def __init__(self, probe: Probe, found: dict[str, float]) -> None:
        super().__init__(probe.gm)
        self.probe, self.found = probe, found
        self.pairs = {node: (site, old, new) for site, old, new in probe.pairs for node in (old, new)}
        self.waiting: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = self.region(n) if isinstance(n.target, torch._ops.HigherOrderOperator) else super().run_node(n)
        if n.name not in self.pairs:
            return result
        site, old, new = self.pairs[n.name]
        self.waiting[n.name] = result
        if old in self.waiting and new in self.waiting:
            error, known = difference(self.waiting.pop(new), self.waiting.pop(old)), self.found.get(site, 0.0)
            self.found[site] = known if error <= known else error
        return None if n.name == new else result

    def region(self, n: fx.Node) -> Any:
        """What a region returns; its own sites are compared on the way."""
        body, operands = self._body(n)
        inside = self.probe.inside.get(str(body.target)) if isinstance(body, fx.Node) else None
        if inside is None:
            return super().run_node(n)
        args: Any = self.map_nodes_to_values(operands, n)
        return _Beside(inside, self.found).run(*args)

    def _body(self, n: fx.Node) -> tuple[Any, Any]:
        """The graph that a higher-order operator runs once, and with what; (None, ...) for any other operator."""
        if is_call(n):
            return n.args[0], n.args[1:]
        if getattr(n.target, "_name", "") == "invoke_subgraph":
            return n.args[0], n.args[2:]
        if n.target is torch.ops.higher_order.cond and len(n.args) == 4:
            taken = self.map_nodes_to_values(n.args[0], n)
            return n.args[1 if taken else 2], n.args[3]
        return None, ()
