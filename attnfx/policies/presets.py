"""Policies with names, for models in general: where to begin, and what to copy into a file of one's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from attnfx import variants
from attnfx.errors import PolicyError, listing, nearest
from attnfx.policies.rule import Rule
from attnfx.policy import Policy


@dataclass(frozen=True)
class Preset:
    """A policy, and in a sentence what it does."""

    summary: str
    policy: Policy


_GRIDS = (14, 16, 24, 28, 32, 56, 64)
"""Tokens along the sides of the square images of vision transformers and diffusion models."""


@functools.cache
def presets() -> dict[str, Preset]:
    """The presets by name."""
    return {
        "exact": Preset("Every attention exact, whatever a policy behind it says.", Policy([Rule("*", None)])),
        "streaming": Preset(
            "Causal attention, in decoding too, to the first 4 keys and the nearest 2048 (StreamingLLM, arXiv:2309.17453); "
            "cross-attention exact.",
            Policy([
                Rule(kind="cross"),
                Rule(kind=("causal", "decode"), variant=(variants.SlidingWindow(2048, sinks=4), None)),
            ]),
        ),
        "long-prefill": Preset(
            "Causal prefills of 8192 tokens or more: the best pages of keys for each block of queries, or where lengths change an "
            "A-shape (MInference, arXiv:2407.02490). The first two layers, short prompts, decoding and training exact.",
            Policy([
                Rule(layers="0-1"),
                Rule(
                    kind="causal", phase="prefill", when="kv_len >= 8192",
                    variant=(
                        variants.BlockTopK(top=256, page=16, sinks=64, window=1024),
                        variants.AShape(n_init=1024, n_local=4096), None,
                    ),
                ),
            ]),
        ),
        "vision-neighborhood": Preset(
            "Self-attention of square images to the 7 x 7 neighbourhood of each token (arXiv:2204.07143), with a class token in "
            f"front or without; sides of {', '.join(map(str, _GRIDS))} tokens. Causal and cross-attention exact.",
            Policy([
                Rule(kind=("causal", "cross", "decode")),
                Rule(kind="self", variant=(*_neighborhoods(), None)),
            ]),
        ),
    }  # fmt: skip


def named(name: str) -> Preset:
    """The preset of this name; PolicyError lists the known ones."""
    found = presets().get(name)
    if found is None:
        known = presets()
        raise PolicyError(
            f'There is no preset "{name}"; known are {listing(known)}.{nearest(name, known)} (The path of a policy file has '
            "a suffix.)"
        )
    return found


def _neighborhoods() -> tuple[variants.base.Variant, ...]:
    sides = [(n, extra) for n in _GRIDS for extra in (0, 1)]
    return tuple(variants.NeighborhoodAttention((n, n), 7, extra=extra, extra_first=extra > 0) for n, extra in sides)
