"""The pipeline on one page: capture, recognise, decide, splice, and hand the graph on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from attnfx import patterns
from attnfx.capture import Mirror, capture
from attnfx.composites import expand_composites
from attnfx.decide import Decision, decide
from attnfx.errors import AttnfxError, AttnfxWarning, UnknownOption
from attnfx.inner import compile_inner
from attnfx.lowering.plan import KernelPlan
from attnfx.options import Options
from attnfx.origin import origin_of
from attnfx.patterns.linear_site import LinearMatch
from attnfx.patterns.matcher import Match
from attnfx.readable import readable
from attnfx.report import Missed, Report, SiteReport
from attnfx.rewrite import Splicer

#: Where reports of compiles go while somebody is listening.
listeners: ContextVar[tuple[Callable[[Report], None], ...]] = ContextVar("attnfx_listeners", default=())


def attnfx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="attnfx", options={...})``: rewrite every attention of ``gm``, then compile the rest.

    Raises UnknownOption, PolicyError and Objection for what the caller asked; anything that goes wrong inside leaves the
    graph as it was
    and warns once, or raises with ``options={"strict": True}``.
    """
    parsed = Options.parse(mode, options)
    rewritten, report = rewrite(gm, parsed)
    for listen in listeners.get():
        listen(report)
    return compile_inner(rewritten, gm, example_inputs, parsed)


def rewrite(gm: fx.GraphModule, options: Options) -> tuple[fx.GraphModule, Report]:
    """``gm`` with its attentions replaced (``gm`` itself stays as it is), and what was found and decided."""
    try:
        return _rewrite(gm, options)
    except AttnfxError:
        raise
    except Exception as error:
        if options.strict:
            raise
        warnings.warn(f"attnfx left a graph as it was: {type(error).__name__}: {error}", AttnfxWarning, stacklevel=2)
        return gm, Report(sites=(), missed=(Missed("", f"internal error: {error}", ""),), before=readable(gm), after=readable(gm))


def _rewrite(gm: fx.GraphModule, options: Options) -> tuple[fx.GraphModule, Report]:
    work = fx.GraphModule(gm, _copied(gm.graph))
    mirror = capture(work)
    if expand_composites(work, mirror):
        mirror = capture(work)
    matches, missed = patterns.recognise(mirror)
    if mirror.reason and matches:
        refused = [Missed(origin_of(mirror, m.candidate.output).module, mirror.reason, m.candidate.output.name) for m in matches]
        return gm, Report(sites=(), missed=tuple(refused), before=readable(gm), after=readable(gm))
    linears, missed = patterns.recognise_linear(mirror, matches, missed)
    splicer = Splicer(work, mirror)
    sites: list[SiteReport] = []
    lost: list[Missed] = []
    for match in matches:
        entry = _serve(splicer, mirror, match, options)
        if isinstance(entry, SiteReport):
            sites.append(entry)
        else:
            lost.append(entry)
    kept = [_kept(mirror, linear, options) for linear in linears]
    splicer.prune()
    work.graph.lint()
    work.recompile()
    lost += [_missed(mirror, m) for m in missed]
    found = [*sites, *kept]
    report = Report(tuple(found), tuple(lost), readable(gm), readable(work), _policy_warnings(options, found))
    for text in report.policy_warnings:
        warnings.warn(text, AttnfxWarning, stacklevel=2)
    return (work if sites else gm), report


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, metadata included."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _serve(splicer: Splicer, mirror: Mirror, match: Match, options: Options) -> SiteReport | Missed:
    """Decide one match and splice the decision in."""
    origin = origin_of(mirror, match.candidate.output)
    site = match.site.replace(origin=origin)
    decision = decide(site, options.policy)
    if match.candidate.output not in mirror.dynamo_of:
        inside = f"it is inside another operation, {mirror.origin.get(match.candidate.output)}, which could not be taken apart"
        return Missed(origin.module, inside, match.candidate.output.name, origin.source)
    if decision.kernel is None:
        return Missed(origin.module, decision.reason, match.candidate.output.name, origin.source)
    try:
        splicer.splice(match, _caller(splicer, decision))
    except Exception as error:
        if options.strict:
            raise
        warnings.warn(f"attnfx left {origin.module} as it was: {type(error).__name__}: {error}", AttnfxWarning, stacklevel=2)
        return Missed(origin.module, f"internal error: {error}", match.candidate.output.name, origin.source)
    return SiteReport(
        name=origin.node, module=origin.module, pattern=match.candidate.pattern, site=decision.site, decision=decision.name,
        variant=decision.variant, reason=decision.reason, exact=decision.exact, kernel=_source(decision), source=origin.source,
    )  # fmt: skip


def _kept(mirror: Mirror, linear: LinearMatch, options: Options) -> SiteReport:
    """The entry of an attention that is described and left as it is."""
    origin = origin_of(mirror, linear.output)
    decision = decide(linear.site.replace(origin=origin), options.policy)
    return SiteReport(
        name=origin.node, module=origin.module, pattern=linear.pattern, site=decision.site, decision=decision.name,
        variant=None, reason=decision.reason, exact=True, source=origin.source,
    )  # fmt: skip


def _caller(splicer: Splicer, decision: Decision) -> Callable[..., fx.Node]:
    """What makes the attention node from canonical operands."""
    graph, kernel, site = splicer.graph, decision.kernel, decision.site
    import attnfx.lowering.ops  # noqa: F401 - registers the operators

    def call(query: fx.Node, key: fx.Node, value: fx.Node, loads: Sequence[fx.Node]) -> fx.Node:
        if isinstance(kernel, KernelPlan):
            sizes = [splicer.number(s) for s in kernel.symbols]
            return graph.call_function(
                torch.ops.attnfx.attention.default, (query, key, value, list(loads), sizes, kernel.to_json())
            )
        args = (query, key, value, site.facts.causal, site.scale, site.dropout)
        return graph.call_function(torch.ops.attnfx.vendor_attention.default, args)

    return call


def _source(decision: Decision) -> str | None:
    """The generated kernel source, where one is generated."""
    if not isinstance(decision.kernel, KernelPlan) or decision.kernel.family != "flash":
        return None
    from attnfx.lowering import codegen

    return codegen.source(decision.kernel)


def _missed(mirror: Mirror, miss: patterns.NearMiss) -> Missed:
    origin = origin_of(mirror, miss.node)
    return Missed(origin.module, miss.reason, miss.node.name, origin.source)


def _policy_warnings(options: Options, sites: Sequence[SiteReport]) -> tuple[str, ...]:
    modules = [s.module for s in sites]
    names = ", ".join(dict.fromkeys(modules)) or "none"
    return tuple(
        f"The policy's rule {rule} matches no attention of this graph; it has: {names}."
        for rule in options.policy.unmatched(modules)
    )


__all__ = ["UnknownOption", "attnfx", "listeners", "rewrite"]
