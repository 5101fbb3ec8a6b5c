"""Torch's own attention kernels under the name of a site: `attnfx::named_<kernel>` is the kernel within a range of the timeline.

`attnfx::vendor_attention` becomes one of torch's kernels while a compiler traces it, so that the choice of the kernel, its gradient
and its memory stay torch's. The names come in last, on the graph that Inductor lowers (:mod:`attnfx.graphs.inductor`): same
operands, same results, same demands on strides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from attnfx.lowering import timeline
from attnfx.lowering.ops import LIBRARY

_KERNELS = (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
_SCALE = ", *, float? scale=None)"
_MASKED = ", *, Tensor? attn_mask=None, float? scale=None)"

#: Torch's kernel -> the same with a keyword `site`.
NAMED: dict[Any, Any] = {}


def _run(kernel: Any, backward: bool, *args: Any, site: str = "", **kwargs: Any) -> Any:
    with timeline.named(site, backward):
        return kernel(*args, **kwargs)


def _unnamed(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, site: str = "", **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return called


def _define(kernel: Any, backward: bool) -> None:
    schema, name = str(kernel._schema), f"named{kernel._schema.name.partition('::')[2]}"
    ending = next((end for end in (_SCALE, _MASKED) if end in schema), None)
    if ending is None:
        return  # a kernel with other keywords stays as it is, without a name
    arguments = schema[schema.index("(") :].replace(ending, f"{ending[:-1]}, str site='')")
    LIBRARY.define(f"{name}{arguments}", tags=tuple(kernel.tags))
    LIBRARY.impl(name, partial(_run, kernel, backward), "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnfx::{name}", _unnamed(kernel), lib=LIBRARY)
    made = getattr(torch.ops.attnfx, name)
    NAMED[kernel] = made.default
    if (formula := flop_registry.get(kernel.overloadpacket)) is not None:
        register_flop_formula(made, get_raw=True)(_unnamed(formula))


for _name in _KERNELS:
    for _suffix in ("", "_backward"):
        if hasattr(torch.ops.aten, _name + _suffix):
            _define(getattr(torch.ops.aten, _name + _suffix).default, bool(_suffix))
