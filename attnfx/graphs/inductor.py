"""Inductor as the inner compiler, without its own pass that fuses attention: what we leave alone must mean what it meant.

Inductor matches attention by the form of its ATen graph and takes a softmax over another axis, keys whose batch and head axes are
exchanged, a mask that leaves a row without keys, or a scale that is a tensor for plain attention (pytorch#196468, #195320,
`torch/_inductor/fx_passes/fuse_attention.py`). A site that attnfx refuses for such a reason would be fused behind its back.

The pass cannot be switched off by itself. Each of its patterns holds a softmax taken apart, whose exponentials are read by one
sum and
one division and by nothing in between. So a pass that runs before it sets an identity there, and one that runs after it takes
the identity away again. Both belong to this compile alone and have a uuid, so that Inductor's caches tell its graphs from others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from attnfx.graphs.vendor_names import Named, Noted, names

_BARRIER = operator.pos
_MADE = "attnfx_barrier"


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], mode: str, timeline: bool = False) -> Callable[..., Any]:
    """``gm`` compiled by Inductor in ``mode``; every attention in it stays as it is written. ``timeline``: those that run
    as torch's own kernels bear their names there."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=patches(mode, names(gm) if timeline else ())))


def patches(mode: str = "default", sites: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a compile in ``mode`` changes of Inductor's configuration, for itself; ``sites`` are names for a timeline."""
    from torch._inductor import list_mode_options

    changed: dict[str, Any] = dict(list_mode_options(mode)) if mode != "default" else {}
    changed["joint_custom_pre_pass"] = Passes(_listed(config.joint_custom_pre_pass), Guard())
    changed["joint_custom_post_pass"] = Passes(
        Release(), *([Noted(sites)] if sites else []), _listed(config.joint_custom_post_pass)
    )
    if sites:
        import attnfx.lowering.vendor_names  # noqa: F401 - registers the operators, which a graph from a cache calls

        changed["post_grad_custom_post_pass"] = Passes(_listed(config.post_grad_custom_post_pass), Named(sites))
    return changed


class Guard(CustomGraphPass):
    """Sets an identity behind the exponentials of every softmax that is taken apart."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default):
            if not any(user.target is torch.ops.aten.sum.dim_IntList for user in node.users):
                continue
            with graph.inserting_after(node):
                barrier = graph.call_function(_BARRIER, (node,))
            barrier.meta = {**node.meta, _MADE: True}
            node.replace_all_uses_with(barrier, delete_user_cb=lambda user, barrier=barrier: user is not barrier)

    def uuid(self) -> Any:
        return "attnfx guard", _hash()


class Release(CustomGraphPass):
    """Takes the identities of :class:`Guard` away."""

    def __call__(self, graph: fx.Graph) -> None:
        for barrier in graph.find_nodes(op="call_function", target=_BARRIER):
            if barrier.meta.get(_MADE):
                barrier.replace_all_uses_with(barrier.args[0])
                graph.erase_node(barrier)

    def uuid(self) -> Any:
        return "attnfx release", _hash()


class Passes(CustomGraphPass):
    """Passes in order, ours and the caller's; without a uuid where one of them has none, so that nothing is cached then."""

    def __init__(self, *passes: Any) -> None:
        self.passes = tuple(p for given in passes for p in _listed(given))

    def __call__(self, graph: fx.Graph) -> None:
        for run in self.passes:
            run(graph)

    def uuid(self) -> Any:
        found = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in found else tuple(found)


def _listed(given: Any) -> tuple[Any, ...]:
    return () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)


def _hash() -> Any:
    return get_hash_for_files((__file__,))
