"""Names of attentions in a profiler's timeline: a range "attnfx: model.layers.3.self_attn" around what runs a call.

While no profiler listens, a call pays for one question. Inductor hides the modules of a graph, so that the name is an argument of
the operator; equal layers still share plan and kernel, which do not know it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

#: The note of a node that is one of our sites, under torch's own "custom", which is copied wherever a node is traced again.
NOTE = "attnfx_site"
_NOTHING = nullcontext()


def runs(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` compute something, and no compiler is tracing them."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()


def named(site: str, backward: bool = False) -> AbstractContextManager[object]:
    """A range with the name of ``site``, a module path, in the trace of ``torch.profiler`` or in NVTX, where one is being taken."""
    if not site or not torch._C._autograd._profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(f"attnfx: {site}{' (backward)' if backward else ''}")
