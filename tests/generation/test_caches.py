"""Hand-written key-value caches: every attention is rewritten, the numbers are eager's, and lengths cost no compiles."""

from __future__ import annotations

import pytest
import torch

from generation.caches import HEAD_DIM, KEY_HEADS, WIDTH, Assigned, Attention, Concatenated, Indexed, Windowed, decode, made
from generation.watch import Watched, watched

KINDS = (Concatenated, Indexed, Assigned, Windowed)


@pytest.mark.parametrize("spelled", ["sdpa", "softmax"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.lower())
def test_handwritten_cache(kind: type[Attention], spelled: str) -> None:
    module = made(kind, spelled)
    expected = decode(module, module, 29, 32)
    plain = watched(
        lambda backend, options: decode(module, torch.compile(module, backend=backend, options=options), 29, 32), "eager"
    )
    mine: Watched = watched(
        lambda backend, options: decode(module, torch.compile(module, backend=backend, options=options), 29, 32)
    )
    torch.testing.assert_close(mine.result, expected, rtol=1e-5, atol=1e-5)
    assert mine.missed == set()
    assert mine.sites > 0
    assert mine.compiles <= plain.compiles


@pytest.mark.parametrize("spelled", ["sdpa", "softmax"])
def test_one_compile_serves_all_lengths(spelled: str) -> None:
    module = made(Concatenated, spelled)
    x = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    states = {n: tuple(torch.randn(2, 2, KEY_HEADS, n, HEAD_DIM).unbind()) for n in (31, 96, 1000, 3, 2, 1, 4095)}

    def every_length(backend: object, options: object) -> dict[int, torch.Tensor]:
        call = torch.compile(module, backend=backend, options=options, dynamic=True)
        with torch.no_grad():
            return {n: call(x, state)[0] for n, state in states.items()}

    plain, mine = watched(every_length, "eager"), watched(every_length)
    assert mine.missed == set()
    assert mine.compiles <= plain.compiles <= 2  # a cache of one key has a graph of its own
    with torch.no_grad():
        for n, state in states.items():
            torch.testing.assert_close(mine.result[n], module(x, state)[0], rtol=1e-5, atol=1e-5)
