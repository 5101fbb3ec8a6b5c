"""Lists of tiles that are the same in every call: of masks that read constants of the graph and know their sizes.

They are built once, when the graph is written, and are constants of it like the tables that they were made from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnfx.lowering import blocks
from attnfx.lowering.plan import KernelPlan

#: Bytes of lists that a graph keeps of one attention; longer ones are built at each call.
LARGEST = 1 << 26


def fixed(plan: KernelPlan, tables: Sequence[Tensor | None]) -> list[Tensor]:
    """The lists of a plan by rows and, where it is trained, by keys; [] where they hang on the call.

    ``tables``: what is known of the tensors that its slots read, one for each, on the device that they will be on.
    """
    mask = blocks.mask_of(plan.to_json())
    if mask is None or not mask.slots or KernelPlan.from_json(mask.text).symbols:
        return []
    found = [tables[slot] for slot in mask.slots]
    loads = [t for t in found if t is not None]
    site = plan.site
    sizes = [site.batch if mask.per_batch else 1, site.heads if mask.per_head else 1, site.queries, site.keys]
    if len(loads) < len(found) or not all(isinstance(n, int) or n.is_Integer for n in sizes):
        return []
    batch, heads, queries, keys = map(int, sizes)
    device = loads[0].device
    if not blocks.worthwhile(queries, keys) or not _runs(device):
        return []
    ways = (False, True) if site.requires_grad else (False,)
    if sum(4 * torch.Size(blocks.shape(batch, heads, queries, keys, way)).numel() for way in ways) > LARGEST:
        return []
    with _disable_current_modes():
        return [blocks.build(loads, (), batch, heads, queries, keys, way, device, mask.text) for way in ways]


def _runs(device: torch.device) -> bool:
    """Whether Triton's kernels run there, now."""
    return blocks.kernels_run(device) and (device.type != "cuda" or torch.cuda.is_available())
