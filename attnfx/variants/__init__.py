"""The variants by name: every module of this package is walked, and every `Variant` defined there is registered."""

import functools
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from attnfx.errors import PolicyError, listing, nearest
from attnfx.variants.base import Variant

if TYPE_CHECKING:
    from attnfx.variants.a_shape import AShape as AShape
    from attnfx.variants.affine_scaled import AffineScaled as AffineScaled
    from attnfx.variants.agent_attention import AgentAttention as AgentAttention
    from attnfx.variants.anchor import Anchor as Anchor
    from attnfx.variants.based import Based as Based
    from attnfx.variants.bi_level_routing import BiLevelRouting as BiLevelRouting
    from attnfx.variants.block_sparse import BlockSparse as BlockSparse
    from attnfx.variants.block_top_k import BlockTopK as BlockTopK
    from attnfx.variants.combiner import Combiner as Combiner
    from attnfx.variants.core_context import CoreContext as CoreContext
    from attnfx.variants.dilated_window import DilatedWindow as DilatedWindow
    from attnfx.variants.documents import Documents as Documents
    from attnfx.variants.flowformer import Flowformer as Flowformer
    from attnfx.variants.gated_output import GatedOutput as GatedOutput
    from attnfx.variants.halo import Halo as Halo
    from attnfx.variants.hierarchical_top_k import HierarchicalTopK as HierarchicalTopK
    from attnfx.variants.hyper_attention import HyperAttention as HyperAttention
    from attnfx.variants.identity_mix import IdentityMix as IdentityMix
    from attnfx.variants.lightning import Lightning as Lightning
    from attnfx.variants.linear_attention import LinearAttention as LinearAttention
    from attnfx.variants.long_range_groups import LongRangeGroups as LongRangeGroups
    from attnfx.variants.low_rank_bias import LowRankBias as LowRankBias
    from attnfx.variants.mala import MALA as MALA
    from attnfx.variants.neighborhood_attention import NeighborhoodAttention as NeighborhoodAttention
    from attnfx.variants.neural_bias import NeuralBias as NeuralBias
    from attnfx.variants.per_head import PerHead as PerHead
    from attnfx.variants.per_head_spans import PerHeadSpans as PerHeadSpans
    from attnfx.variants.pooled_blocks import PooledBlocks as PooledBlocks
    from attnfx.variants.radial import Radial as Radial
    from attnfx.variants.region_attention import RegionAttention as RegionAttention
    from attnfx.variants.sharded import Sharded as Sharded
    from attnfx.variants.shifted_groups import ShiftedGroups as ShiftedGroups
    from attnfx.variants.sink_calibration import SinkCalibration as SinkCalibration
    from attnfx.variants.sink_redistribution import SinkRedistribution as SinkRedistribution
    from attnfx.variants.skip_softmax import SkipSoftmax as SkipSoftmax
    from attnfx.variants.sliding_window import SlidingWindow as SlidingWindow
    from attnfx.variants.streaming_heads import StreamingHeads as StreamingHeads
    from attnfx.variants.strided import Strided as Strided
    from attnfx.variants.taylor_window import TaylorWindow as TaylorWindow
    from attnfx.variants.temperature import Temperature as Temperature
    from attnfx.variants.vertical_slash import VerticalSlash as VerticalSlash
    from attnfx.variants.window_attention import WindowAttention as WindowAttention


@functools.cache
def _registry() -> dict[str, type[Variant]]:
    found: dict[str, type[Variant]] = {}
    for module_info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for name, value in vars(module).items():
            defined_here = inspect.isclass(value) and value.__module__ == module.__name__
            if defined_here and issubclass(value, Variant) and not inspect.isabstract(value):
                found[name] = value
    return found


def all() -> dict[str, type[Variant]]:
    """Every variant there is: class name -> class, in alphabetical order."""
    return dict(sorted(_registry().items()))


def named(name: str) -> type[Variant]:
    """The variant called `name`; PolicyError lists the known ones and the nearest spelling."""
    known = all()
    if name not in known:
        raise PolicyError(f'There is no variant "{name}"; known are {listing(known)}.{nearest(name, known)}')
    return known[name]


def __getattr__(name: str) -> Any:
    # modules of this package ask for one another while the registry is read
    if name[:1].isupper() and name in _registry():
        return _registry()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_registry()})
