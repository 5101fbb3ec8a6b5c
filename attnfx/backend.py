"""The pipeline on one page: capture, recognise, decide, splice, and hand the graph on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.utils import dynamo_timed

from attnfx import counting, logs, patterns
from attnfx import measure as measuring
from attnfx.algebra.nodes import Load
from attnfx.biases.beside import Known
from attnfx.biases.pair_bias import PairNodes, pair_behind
from attnfx.decide import Decision, decide
from attnfx.errors import AttnfxError, Objection, UnknownOption, VerificationError
from attnfx.graphs import buffers, live
from attnfx.graphs.breaks import break_of
from attnfx.graphs.calling import bias_forms, caller, kernel_source, linear_caller
from attnfx.graphs.capture import capture
from attnfx.graphs.composites import expand_composites
from attnfx.graphs.constants import Constants
from attnfx.graphs.guarded import guarded
from attnfx.graphs.inner import compile_inner
from attnfx.graphs.levels import closed, forward_mode, mapped
from attnfx.graphs.mirror import Mirror
from attnfx.graphs.model_inputs import described
from attnfx.graphs.origin import module_path, origin_of, source_line
from attnfx.graphs.readable import readable
from attnfx.graphs.rewrite import Splicer
from attnfx.graphs.searching import request_searches
from attnfx.graphs.subgraphs import autocast_at, drop_unread, regions, sink_masks, unnamed
from attnfx.lowering.linear.plan import LinearPlan
from attnfx.options import Options
from attnfx.patterns.linear_site import LinearMatch
from attnfx.patterns.linear_splice import as_match
from attnfx.patterns.matcher import Match
from attnfx.patterns.near import NearMiss
from attnfx.patterns.relation import relation
from attnfx.policies.policy_warnings import policy_warnings
from attnfx.policy import Policy
from attnfx.report import Missed, Report, SiteReport
from attnfx.reports.graph_view import view
from attnfx.site import Origin, SideTensor

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
    started = time.perf_counter()
    with dynamo_timed("attnfx"):
        rewritten, report = rewrite(gm, parsed, example_inputs)
        if parsed.searches and request_searches(rewritten, report):
            rewritten, report = rewrite(gm, parsed, example_inputs)
            request_searches(rewritten, report)
    seconds = time.perf_counter() - started
    logs.tell(report, seconds)
    live.keep(report, seconds)
    for listen in listeners.get():
        listen(report)
    if parsed.strict_sites is not None:
        counting.count(parsed.strict_sites, report, gm, options)
    return compile_inner(rewritten, gm, example_inputs, parsed)


def rewrite(gm: fx.GraphModule, options: Options, inputs: Sequence[Any] = ()) -> tuple[fx.GraphModule, Report]:
    """``gm`` with its attentions replaced (``gm`` itself stays as it is), and what was found and decided.

    With ``options.verify`` each replacement is compared with its original on ``inputs``, and taken back where it differs.
    """
    try:
        given = buffers.given(gm) if options.buffers == "read" else []
        done = _rewrite(gm, options, {}, "", given)
        if options.verify and done.report.sites:
            done = _verified(gm, options, inputs, done, given)
        if done.gm is not gm:
            buffers.guard(given)
        for text in (warned := policy_warnings(options.policy, done.report)):
            logs.warn(text)
        return done.gm, replace(done.report, policy_warnings=warned, breaks=break_of(gm))
    except AttnfxError:
        raise
    except Exception as error:
        if options.strict:
            raise
        logs.warn(f"attnfx left a graph as it was: {type(error).__name__}: {error}")
        return gm, Report(sites=(), missed=(Missed("", f"internal error: {error}", ""),), before=readable(gm), after=readable(gm))


@dataclass(frozen=True)
class _Rewritten:
    gm: fx.GraphModule
    report: Report
    probe: measuring.Probe


def _rewrite(
    gm: fx.GraphModule, options: Options, refused: Mapping[str, str], prefix: str, given: buffers.Given = ()
) -> _Rewritten:
    """``gm`` and the graphs inside it rewritten. ``refused``: sites by name that stay, and why; ``prefix``: of the names
    in ``gm``; ``given``: the buffers behind its inputs."""
    work = fx.GraphModule(gm, _copied(gm.graph))
    mirror = capture(work)
    if expand_composites(work, mirror):
        mirror = capture(work)
    if sink_masks(work, mirror):
        mirror = capture(work)
    mirror.tables = tables = buffers.readable(work, mirror, given)
    matches, near = patterns.recognise(mirror)
    linears, near = patterns.recognise_linear(mirror, matches, near)
    lost = [_missed(mirror, m) for m in near] + _shut(work)
    if (reason := mirror.reason or forward_mode()) and matches:
        lost += [_lost(mirror, m, reason) for m in matches]
        matches = []
    splicer = Splicer(work, mirror)
    constants = Constants(work, mirror, tables if any(given) and not prefix else None)
    sites: list[SiteReport] = []
    pairs: list[tuple[str, fx.Node, fx.Node]] = []
    for match in matches:
        old = mirror.dynamo_of.get(match.candidate.output)
        entry = _serve(splicer, mirror, match, options, refused, prefix, constants)
        if isinstance(entry, SiteReport):
            assert old is not None
            sites.append(replace(entry, buffers=tuple(sorted({*entry.buffers, *_read(match, tables)}))))
            pairs.append((entry.name, old, mirror.dynamo_of[match.candidate.output]))
            pairs += [(entry.name, before, after) for before, after in splicer.rows]
        else:
            lost.append(entry)
    kept: list[SiteReport] = []
    for linear in linears:
        old = mirror.dynamo_of.get(linear.output)
        entry = _serve_linear(splicer, mirror, linear, options, refused, prefix, constants)
        (sites if entry.rewritten else kept).append(entry)
        if entry.rewritten and old is not None:
            pairs.append((entry.name, old, mirror.dynamo_of[linear.output]))
    probe = measuring.probe(work, pairs if options.verify else ())
    ours = set()
    for region in regions(work):
        with autocast_at(region.node):
            inside = buffers.inside(region, mirror, tables)
            inner = _rewrite(region.module, options, refused, f"{prefix}{region.name}.", inside)
        setattr(work, region.name, inner.gm)
        if inner.gm is not getattr(gm, region.name, None):
            unnamed(work, region.name, inner.gm)
            ours.add(region.name)
        setattr(probe.gm, region.name, inner.probe.gm)
        probe.inside[region.name] = inner.probe
        sites += inner.report.sites
        lost += inner.report.missed
    splicer.prune()
    drop_unread(work, ours)
    work.graph.lint()
    work.recompile()
    report = Report((*sites, *kept), tuple(lost), readable(gm), readable(work), graphs=() if prefix else (view(gm, work),))
    return _Rewritten(work if sites else gm, report, probe)


def _verified(gm: fx.GraphModule, options: Options, inputs: Sequence[Any], done: _Rewritten, given: buffers.Given) -> _Rewritten:
    """``done`` with what each site gave beside its original; sites beyond the bound are put back, with a warning or an error."""
    measured = measuring.of_sites(done.probe, done.report.sites, inputs)
    bad = {name: f"verification: its rewrite differs from the original, {m}" for name, m in measured.items() if m.beyond}
    for site in done.report.sites:
        if site.name in bad:
            text = f"{site.name} in {site.module or 'the model itself'} ({site.source}): {bad[site.name]}; it stays as it was."
            if options.strict:
                raise VerificationError(text)
            logs.warn(text, stacklevel=3)
    if bad:
        done = _rewrite(gm, options, bad, "", given)
    sites = tuple(replace(site, measured=measured.get(site.name)) for site in done.report.sites)
    return replace(done, report=replace(done.report, sites=sites))


def _read(match: Match, tables: dict[fx.Node, buffers.Buffer]) -> tuple[str, ...]:
    """The buffers that the formula of an attention was read from."""
    operands = (match.query.node, match.key.node, match.value.node, *(past.node for past in match.loads))
    return buffers.behind(match.candidate.output, operands, tables)


def _shut(gm: fx.GraphModule) -> list[Missed]:
    """What looks like an attention where a graph cannot be looked into."""
    named = ("softmax", "scaled_dot_product_attention")
    shut = {node: why for node, why in closed(gm.graph).items() if getattr(node.target, "__name__", node.target) in named}
    return [Missed(module_path(node), why, node.name, source_line(node)) for node, why in shut.items()]


def _lost(mirror: Mirror, match: Match, reason: str) -> Missed:
    origin = origin_of(mirror, match.candidate.output)
    return Missed(origin.module, reason, match.candidate.output.name, origin.source)


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, metadata included."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    copy.set_codegen(graph._codegen)  # an exported graph's says how its inputs are nested
    return copy


def _serve(
    splicer: Splicer, mirror: Mirror, match: Match, options: Options, refused: Mapping[str, str], prefix: str, constants: Constants
) -> SiteReport | Missed:
    """Decide one match and splice the decision in."""
    origin = origin_of(mirror, match.candidate.output)
    name = prefix + origin.node
    origin = replace(origin, pattern=match.candidate.pattern, relation=_relation(mirror, match, options.policy))
    match, decision, read = _decided(mirror, match, origin, options.policy, constants, bool(prefix))
    site = match.site
    if any(node not in mirror.dynamo_of for node in (match.candidate.output, *(row.node for _, row in match.rows))):
        inside = f"it is inside another operation, {mirror.origin.get(match.candidate.output)}, which could not be taken apart"
        return _lost(mirror, match, inside)
    if site.dropout and mirror.dynamo_of[match.candidate.output] in mapped(splicer.graph):
        return _lost(mirror, match, "it drops at random inside torch.func's vmap, which has rules of its own for randomness")
    also = match.candidate.also and f"its probabilities are also used by {match.candidate.also}"
    if also and not decision.exact:
        return _lost(mirror, match, f"{also}: a variant would not fit them")
    if name in refused or decision.kernel is None:
        return _lost(mirror, match, refused.get(name, decision.reason))
    try:
        splicer.splice(match, caller(splicer, decision, match.query.node.meta["val"].device))
    except Exception as error:
        if options.strict:
            raise
        logs.warn(f"attnfx left {origin.module} as it was: {type(error).__name__}: {error}")
        return _lost(mirror, match, f"internal error: {error}")
    return SiteReport(
        name=name, module=origin.module, pattern=match.candidate.pattern, site=decision.site, decision=decision.name,
        variant=decision.variant, reason=f"{decision.reason}; {also}, and computed for it" if also else decision.reason,
        exact=decision.exact, kernel=kernel_source(decision), source=origin.source, buffers=read, biases=bias_forms(decision),
        considered=decision.considered, original=match.site if decision.site != match.site else None,
    )  # fmt: skip


def _decided(
    mirror: Mirror, match: Match, origin: Origin, policy: Policy, constants: Constants, inside: bool
) -> tuple[Match, Decision, tuple[str, ...]]:
    """What runs a match, and the buffers and parameters whose values were read for it; where nothing has the gradient of a
    learned bias's formula, the bias is read as the model computed it. ``inside``: of a region.

    Raises Objection as :func:`decide` does.
    """
    read: set[str] = set()

    def decided(match: Match) -> Decision:
        values = _values(constants, match, read)

        def pair(load: Load) -> PairNodes | str:
            return "it is in a region of its own" if inside else pair_behind(mirror, match, load)

        def size(e: sympy.Expr) -> Any:
            return guarded(mirror, constants.gm.graph, e)

        def given(name: str) -> SideTensor | str:
            return "It is in a region of its own, which knows no names." if inside else described(constants.gm.graph, mirror, name)

        known = Known(values if constants.tables is not None else None, pair, size, given)
        return decide(match.site.replace(origin=origin), policy, known)

    try:
        decision, objection = decided(match), None
    except Objection as raised:
        decision, objection = None, raised
    plainer = match.band is not None or any(t.requires_grad for t in match.site.side)
    if (decision is None or decision.kernel is None) and plainer:
        for other in patterns.plainer(mirror, match):
            try:
                found = decided(other)
            except Objection:
                continue
            if found.kernel is not None:
                reason = f"{found.reason}; its learned bias is read as the model computed it"
                return other, replace(found, reason=reason), tuple(sorted(read))
    if objection is not None:
        raise objection
    assert decision is not None
    return match, decision, tuple(sorted(read))


def _serve_linear(
    splicer: Splicer, mirror: Mirror, linear: LinearMatch, options: Options, refused: Mapping[str, str], prefix: str,
    constants: Constants,
) -> SiteReport:  # fmt: skip
    """Decide an attention without a softmax over keys, and splice the decision in; it is reported where it stays as it is, too."""
    kind = _relation(mirror, linear, options.policy)
    origin = replace(origin_of(mirror, linear.output), pattern=linear.pattern, relation=kind)
    if constants.tables is None:
        constants = Constants(constants.gm, mirror, {}, held=False)  # what is computed from nothing is known everywhere
    for match in map(as_match, linear.readings):
        read: set[str] = set()
        values = _values(constants, match, read)
        known = Known(values, lambda load: "it is not looked for", lambda e: guarded(mirror, constants.gm.graph, e))
        decision = decide(match.site.replace(origin=origin), options.policy, known, linear.form)
        if decision.kernel is not None:
            break
    name, kernel = prefix + origin.node, decision.kernel
    told, reason = decision.name, decision.reason
    if isinstance(kernel, LinearPlan):
        inside = "" if linear.output in mirror.dynamo_of else "it is inside another operation, which could not be taken apart"
        why = mirror.reason or forward_mode() or inside or refused.get(name)
        try:
            if not why:
                splicer.splice(match, linear_caller(splicer, kernel, origin.module or origin.node))
        except Exception as error:
            if options.strict:
                raise
            logs.warn(f"attnfx left {origin.module} as it was: {type(error).__name__}: {error}")
            why = f"internal error: {error}"
        if why:
            told, reason = "kept", f"left as the model computes it: {why}"
    return SiteReport(
        name=name, module=origin.module, pattern=linear.pattern, site=decision.site, decision=told, variant=None, reason=reason,
        exact=True, source=origin.source, buffers=tuple(sorted(read)), considered=decision.considered,
    )  # fmt: skip


def _values(constants: Constants, match: Match, read: set[str]) -> Callable[[int], torch.Tensor | str]:
    """The values of the side tensors of ``match`` by slot; the names of the buffers that they come from go into ``read``."""

    def values(slot: int) -> torch.Tensor | str:
        found = constants.of(match.loads[slot])
        read.update(constants.read(match.loads[slot]) if isinstance(found, torch.Tensor) else ())
        return found

    return values


def _relation(mirror: Mirror, match: Match | LinearMatch, policy: Policy) -> str:
    """Of what the keys are made, where a rule asks for it."""
    return relation(mirror, match.query.node, match.key.node) if policy.asks_for_kinds else ""


def _missed(mirror: Mirror, miss: NearMiss) -> Missed:
    origin = origin_of(mirror, miss.node)
    return Missed(origin.module, miss.reason, miss.node.name, origin.source)


__all__ = ["UnknownOption", "attnfx", "listeners", "rewrite"]
