"""What is remembered of a call, and what is not: torch operations alone, without kernels."""

import pytest
import torch

pytest.importorskip("triton")
replay = pytest.importorskip("attnfx.lowering.replay")
KNOWN = torch.ones(4)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    replay.forget()
    yield
    replay.forget()


def calls_of(compute, *inputs):
    """What ``compute`` gives for each of the inputs, and how often it ran."""
    ran = []

    def call(x):
        ran.append(x)
        return compute(x)

    return [replay.repeated(lambda x=x: call(x), ("test",), (x,)) for x in inputs], len(ran)


def test_from_the_third_call_on_the_steps_are_repeated_on_other_tensors():
    inputs = [torch.randn(3, 4) for _ in range(4)]

    def compute(x):
        total = x.new_zeros(4)
        total += x.sum(0)
        low, high = x.t().unbind(1)[:2]
        return total, [low * 2, high], None

    found, ran = calls_of(compute, *inputs)
    assert ran == 2
    for x, (total, (low, high), nothing) in zip(inputs, found, strict=True):
        assert all(map(torch.equal, (total, low, high), (x.sum(0), x[0] * 2, x[1])))
        assert nothing is None


@pytest.mark.parametrize(
    "changed", [torch.randn(4, 4), torch.randn(4, 3).t(), torch.randn(3, 4, dtype=torch.float64), torch.randn(13)[1:].view(3, 4)]
)
def test_another_shape_layout_dtype_or_alignment_is_another_kind(changed):
    _, ran = calls_of(lambda x: x + 1, torch.randn(3, 4), torch.randn(3, 4), changed)
    assert ran == 3


@pytest.mark.parametrize(
    "compute",
    [lambda x: x + float(x.sum()), lambda x: x + KNOWN],
    ids=["a number on the host", "a tensor from elsewhere"],
)
def test_what_hangs_on_more_than_its_tensors_is_called_each_time(compute):
    inputs = [torch.randn(3, 4) for _ in range(5)]
    found, ran = calls_of(compute, *inputs)
    assert ran == 5
    assert all(torch.equal(compute(x), y) for x, y in zip(inputs, found, strict=True))


def test_forgetting_and_too_many_kinds_start_anew(monkeypatch):
    same = [torch.randn(3) for _ in range(3)]
    assert calls_of(lambda x: x + 1, *same)[1] == 2
    replay.forget()
    assert calls_of(lambda x: x + 1, *same)[1] == 2
    monkeypatch.setattr(replay, "REMEMBERED", 1)
    assert calls_of(lambda x: x + 1, torch.randn(5), *same)[1] == 3
