"""How the model tests judge a backend: by its distance from float64, next to eager's own in the same dtype."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Tensors = dict[str, Tensor]
FACTOR = 1.5  # what attnfx promises: no farther from float64 than this many times eager's own distance
FLOOR = 1e-7  # relative; float32 cannot tell results closer than this apart
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def compiled(model: nn.Module, dynamic: bool | None = None, **options: object) -> Callable[..., Any]:
    """`model` under attnfx. The tests compile nowhere else."""
    return torch.compile(model, backend="attnfx", dynamic=dynamic, options={"strict": True, **options})


class InFloat64(TorchFunctionMode):
    """Runs model code in float64 throughout: where it asks for another float type (norms, rotations), it gets that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_wider, (tuple(args), dict(kwargs or {})))
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*args, **kwargs)


def _wider(value: object) -> object:
    return torch.float64 if value in FLOATS else value


def in_float64(model: nn.Module, kwargs: Mapping[str, object]) -> tuple[nn.Module, dict[str, object]]:
    """The same weights and inputs as float64; the model's state is copied, never changed."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    return copy.deepcopy(model).double(), wide


def outputs(call: Callable[..., Any], kwargs: Mapping[str, object]) -> Tensors:
    """The floating tensors that a forward returns, by name."""
    result = call(**kwargs)
    named = {"output": result} if isinstance(result, Tensor) else dict(result.items())
    return {name: value for name, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()}


def reference(model: nn.Module, kwargs: Mapping[str, object]) -> Tensors:
    """The outputs of the model in float64, without gradients."""
    wide_model, wide_kwargs = in_float64(model, kwargs)
    with torch.no_grad(), InFloat64():
        return outputs(wide_model, wide_kwargs)


def gradients(model: nn.Module, call: Callable[..., Any], kwargs: Mapping[str, object], seed: int = 11) -> Tensors:
    """Gradients of all parameters of `model` for seeded random gradients of the outputs, by parameter name."""
    model.zero_grad()
    results = outputs(call, kwargs)
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(value.shape, generator=draw).to(value) for value in results.values()]
    torch.autograd.backward(list(results.values()), weights)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module, call: Callable[..., Any], draws: Sequence[Mapping[str, object]]) -> Tensors:
    """Gradients for several inputs of one shape, stacked: a bias of 24 elements is too few to tell luck from error."""
    each = [gradients(model, call, kwargs, seed) for seed, kwargs in enumerate(draws)]
    return {name: torch.stack([found[name] for found in each]) for name in each[0]}


def reference_gradients(model: nn.Module, draws: Sequence[Mapping[str, object]]) -> Tensors:
    """The same gradients in float64."""
    wide_model, _ = in_float64(model, {})
    wide_draws = [in_float64(nn.Module(), kwargs)[1] for kwargs in draws]
    with InFloat64():
        return gradients_of(wide_model, wide_model, wide_draws)


def assert_as_good(ours: Tensors, eager: Tensors, exact: Tensors, what: str, eps: float = 0.0) -> None:
    """Each tensor of `ours` is at most FACTOR times as far from `exact` as eager's, and is NaN where eager is NaN.

    A tensor that is zero in exact arithmetic (the gradient of a key bias: softmax does not see it) is all rounding
    and has no relative error; it is held to `eps` of the typical size of the other tensors instead.
    """
    assert ours.keys() == eager.keys() == exact.keys(), f"{what}: not eager's tensors: {ours.keys() ^ eager.keys()}"
    typical = _typical(exact)
    failures = []
    for name, truth in exact.items():
        assert ours[name].dtype == eager[name].dtype, f"{what}: {name} is {ours[name].dtype}, not {eager[name].dtype}"
        assert ours[name].shape == eager[name].shape, f"{what}: {name} has shape {tuple(ours[name].shape)}"
        if not torch.equal(ours[name].isnan(), eager[name].isnan()):
            failures.append(f"{name}: NaN in {_nans(ours[name])}, eager in {_nans(eager[name])} elements")
            continue
        scale, floor = float(truth.nan_to_num().norm()), FLOOR
        if scale < 1e-6 * typical * math.sqrt(truth.numel()):
            scale, floor = typical * math.sqrt(truth.numel()), eps
        mine, theirs = (_distance(value[name], truth) / max(scale, 1e-300) for value in (ours, eager))
        if not mine <= FACTOR * theirs + floor:
            failures.append(f"{name}: error {mine:.3e}, eager's {theirs:.3e} ({mine / max(theirs, 1e-300):.2f} times)")
    assert not failures, "\n  ".join([f"{what}: {len(failures)} of {len(exact)} tensors too far from float64", *failures])


def _distance(value: Tensor, truth: Tensor) -> float:
    there = ~truth.isnan() & ~value.isnan()
    return float((value.double() - truth)[there].norm())


def _nans(value: Tensor) -> str:
    return f"{int(value.isnan().sum())} of {value.numel()}"


def _typical(tensors: Tensors) -> float:
    """Root mean square over all elements."""
    total = sum(float(value.nan_to_num().square().sum()) for value in tensors.values())
    return math.sqrt(total / sum(value.numel() for value in tensors.values()))
