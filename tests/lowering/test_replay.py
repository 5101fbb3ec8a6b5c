"""What is remembered of a call, and what is not: torch operations alone, without kernels."""

import gc
import weakref

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


def test_from_the_fourth_call_on_the_steps_are_repeated_on_other_tensors():
    inputs = [torch.randn(3, 4) for _ in range(6)]

    def compute(x):
        total = x.new_zeros(4)
        total += x.sum(0)
        low, high = x.t().unbind(1)[:2]
        return total, [low * 2, high], None

    found, ran = calls_of(compute, *inputs)
    assert ran == 3
    for x, (total, (low, high), nothing) in zip(inputs, found, strict=True):
        assert all(map(torch.equal, (total, low, high), (x.sum(0), x[0] * 2, x[1])))
        assert nothing is None


@pytest.mark.parametrize(
    "changed", [torch.randn(4, 4), torch.randn(4, 3).t(), torch.randn(3, 4, dtype=torch.float64), torch.randn(13)[1:].view(3, 4)]
)
def test_another_shape_layout_dtype_or_alignment_is_another_kind(changed):
    _, ran = calls_of(lambda x: x + 1, *(torch.randn(3, 4) for _ in range(3)), changed)
    assert ran == 4


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
    same = [torch.randn(3) for _ in range(5)]
    assert calls_of(lambda x: x + 1, *same)[1] == 3
    replay.forget()
    assert calls_of(lambda x: x + 1, *same)[1] == 3
    monkeypatch.setattr(replay, "REMEMBERED", 1)
    assert calls_of(lambda x: x + 1, torch.randn(5), *same)[1] == 4


def test_steps_that_give_another_result_are_given_up(caplog):
    counted = iter(range(100))
    found, ran = calls_of(lambda x: x + next(counted), *(torch.zeros(3) for _ in range(6)))
    assert ran == 6
    assert [int(y[0]) for y in found] == [0, 1, 2, 3, 4, 5]
    assert "another result" in caplog.text


def test_results_are_compared_bit_by_bit():
    nan, zero = torch.tensor([float("nan"), 0.0]), torch.tensor([0.0])
    assert replay._same_bits((nan, [zero]), (nan.clone(), [zero.clone()]))
    assert not replay._same_bits(zero, -zero)
    assert not replay._same_bits(torch.ones(2, 3), torch.ones(3, 2).t())


class Kernel:
    """What a `@triton.jit` function is to a launch on a GPU: it gives a compiled one, which is called with all arguments in order,
    over a grid of three axes."""

    arg_names = ("x", "out", "strides", "ADD", "NONE")

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        def launch(x, out, strides, ADD, NONE=None, num_warps=4):
            torch.add(x, ADD, out=out)
            return compiled

        class Compiled:
            def __getitem__(_, grid):
                first, second, third = grid[0], grid[1], grid[2]

                def again(x, out, strides, ADD, NONE):
                    assert strides == x.stride()
                    assert NONE is None
                    self.launched.append((first, second, third))
                    torch.add(x, ADD, out=out)

                return again

        compiled = Compiled()
        return launch


def test_compiled_kernels_are_launched_again_with_all_arguments():
    from attnfx.lowering.launch import run

    kernel = Kernel()

    def compute(x):
        out = x.new_empty(x.shape)
        run(kernel, (7,), x, out, x.stride(), ADD=3.0, NONE=None, num_warps=8)
        return out

    inputs = [torch.randn(4, 5) for _ in range(6)]
    found, ran = calls_of(compute, *inputs)
    assert ran == 3
    assert kernel.launched == [(7, 1, 1)] * 4
    assert all(torch.equal(x + 3, y) for x, y in zip(inputs, found, strict=True))


def test_a_tape_holds_no_tensor():
    made = []

    def compute(x):
        both = torch.cat([x, x + 1])
        made.extend(map(weakref.ref, (x, both)))
        return both * 2

    for _ in range(5):
        calls_of(compute, torch.randn(3, 4))
    gc.collect()
    assert len(made) == 6
    assert not any(tensor() is not None for tensor in made)
