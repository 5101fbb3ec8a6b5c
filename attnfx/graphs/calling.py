"""The nodes that take the place of an attention in the model's graph, and what the report says of what they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from attnfx.biases.laid_beside import laid_beside
from attnfx.composing import Composition, attention_node, written
from attnfx.decide import Decision
from attnfx.graphs.rewrite import Splicer
from attnfx.lowering import form_text
from attnfx.lowering.linear.plan import LinearPlan
from attnfx.lowering.plan import KernelPlan, choices
from attnfx.lowering.timeline import NOTE


def caller(splicer: Splicer, decision: Decision, device: torch.device) -> Callable[..., fx.Node]:
    """What makes the attention node from canonical operands."""
    graph, kernel, site = splicer.graph, decision.kernel, decision.site
    import attnfx.lowering.ops  # noqa: F401 - registers the operators

    if isinstance(kernel, Composition):
        return written(splicer, kernel, site, device)

    def call(query: fx.Node, key: fx.Node, value: fx.Node, loads: Sequence[fx.Node]) -> fx.Node:
        if decision.beside is not None:
            query, key, loads = laid_beside(splicer, decision.beside, query, key, loads)
        if isinstance(kernel, KernelPlan):
            return attention_node(splicer, kernel, site, query, key, value, loads)
        name = site.origin.module or site.origin.node
        args = (query, key, value, site.facts.causal, site.scale, site.dropout, name)
        node = graph.call_function(torch.ops.attnfx.vendor_attention.default, args)
        node.meta["custom"] = {NOTE: name}
        return node

    return call


def bias_forms(decision: Decision) -> tuple[str, ...]:
    """In which form the kernel meets each term that is added to the scores, as sentences."""
    if not isinstance(decision.kernel, KernelPlan):
        return ()
    notes = () if decision.beside is None else decision.beside.notes
    return tuple(dict.fromkeys((*notes, *(form_text.sentence(choice) for choice in choices(decision.site)))))


def kernel_source(decision: Decision) -> str | None:
    """The generated kernel source, where one is generated."""
    kernel = decision.kernel
    plans = kernel.plans if isinstance(kernel, Composition) else (kernel,)
    generated = [p for p in plans if isinstance(p, KernelPlan) and p.family == "flash"]
    if not generated:
        return None
    from attnfx.lowering import codegen

    return "\n\n".join(dict.fromkeys(codegen.source(p) for p in generated))


def linear_caller(splicer: Splicer, plan: LinearPlan, site: str) -> Callable[..., fx.Node]:
    """What makes the node of linear attention from canonical operands; ``site`` names it in a timeline."""
    import attnfx.lowering.ops  # noqa: F401 - registers the operators

    def call(query: fx.Node, key: fx.Node, value: fx.Node, loads: Sequence[fx.Node]) -> fx.Node:
        args = (query, key, value, list(loads), [splicer.number(s) for s in plan.symbols], plan.to_json(), site)
        return splicer.graph.call_function(torch.ops.attnfx.linear_site.default, args)

    return call
