"""What a compile that asks for a search does: it names the programs whose first calls are to be searched for."""

from __future__ import annotations

import torch
from torch import fx

from attnfx.lowering import ops  # noqa: F401 - registers the operators
from attnfx.lowering.plan import KernelPlan
from attnfx.report import Report


def request_searches(gm: fx.GraphModule, report: Report) -> bool:
    """Ask for a search at the first call of each attention of a rewritten graph, and compare the kernels of the plain ones now.

    Whether a comparison speaks for another kernel than the graph has: then it is to be rewritten again.
    """
    from attnfx.lowering import codegen
    from attnfx.lowering.tuning import calls, plain

    known = torch.ops.attnfx
    targets = (known.attention.default, known.attention_lse.default, known.attention_unnormalised.default)
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.target in targets and (plan := KernelPlan.from_json(node.args[5])).family == "flash":
                calls.request(codegen.program(plan).key)
    return plain.settle([site.site for site in report.sites if site.decision == "vendor"])
