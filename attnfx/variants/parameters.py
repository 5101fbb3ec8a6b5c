"""Checks of the parameters that several variants have."""

from __future__ import annotations

import math

from attnfx.errors import PolicyError
from attnfx.variants.base import Variant


def real_number(variant: Variant, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse the parameter `name` of `variant` unless it is a finite number from `least` to `most`."""
    value = getattr(variant, name)
    if not _finite(value) or not least <= value <= most:
        above, below = (f" from {least:g} on" if least > -math.inf else ""), (f" up to {most:g}" if most < math.inf else "")
        raise PolicyError(f"{type(variant).__name__}.{name} is {value!r}; it must be a finite number{above}{below}.")


def real_numbers(variant: Variant, name: str) -> None:
    """Refuse the parameter `name` of `variant` unless it is a tuple of finite numbers, one or more."""
    value = getattr(variant, name)
    if not isinstance(value, tuple) or not value or not all(map(_finite, value)):
        raise PolicyError(f"{type(variant).__name__}.{name} is {value!r}; it must be a list of finite numbers, one or more.")


def positions_given(variant: Variant, name: str) -> None:
    """Refuse the parameter `name` of `variant` unless it is a tuple of different whole numbers from 0 on."""
    value = getattr(variant, name)
    whole = isinstance(value, tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    if not whole or len(set(value)) < len(value):
        raise PolicyError(f"{type(variant).__name__}.{name} is {value!r}; it must be a list of different whole numbers from 0 on.")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
