"""The variants by name: every module of this package is walked, and every `Variant` defined there is registered."""

import functools
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from attnfx.errors import PolicyError, listing, nearest
from attnfx.variants.base import Variant

if TYPE_CHECKING:
    from attnfx.variants.bi_level_routing import BiLevelRouting as BiLevelRouting
    from attnfx.variants.halo import Halo as Halo
    from attnfx.variants.long_range_groups import LongRangeGroups as LongRangeGroups
    from attnfx.variants.low_rank_bias import LowRankBias as LowRankBias
    from attnfx.variants.neighborhood_attention import NeighborhoodAttention as NeighborhoodAttention
    from attnfx.variants.neural_bias import NeuralBias as NeuralBias
    from attnfx.variants.radial import Radial as Radial
    from attnfx.variants.sliding_window import SlidingWindow as SlidingWindow
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
    if not name.startswith("_") and name in _registry():
        return _registry()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_registry()})
