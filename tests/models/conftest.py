"""Each model test starts from an empty Dynamo, and needs transformers."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers", reason="the model tests need the test extra: pip install attnfx[test]")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, no recompile limit and no counts left over from another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
