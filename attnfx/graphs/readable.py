"""Graphs as readable Python, with plans shown as the formula that they carry."""

from __future__ import annotations

from torch import fx

#: Operators whose sixth argument is a plan.
_CARRIERS = tuple(f"attnfx.{name}.default" for name in ("attention", "attention_lse", "attention_unnormalised"))


def readable(gm: fx.GraphModule) -> str:
    """The graph's code; the JSON text of a plan is replaced by the formula of its site."""
    from attnfx.lowering.plan import KernelPlan

    code = gm.print_readable(print_output=False)
    for node in gm.graph.nodes:
        if node.op == "call_function" and str(node.target) in _CARRIERS:
            text = node.args[5]
            code = code.replace(repr(text), f"plan({str(KernelPlan.from_json(text).site)!r})")
    return str(code)
