"""Linear attention: the operator against its formula, in torch operations and through the kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import rows
from linear_cases import CASES, SMALL, Case, distances, operands, oracle
from torch import Tensor
from torch.library import opcheck

OPS: Any = torch.ops.attnfx


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_results_and_gradients_are_the_formula(case: Case) -> None:
    far = {name: d for name, d in distances(case, torch.float64).items() if not d < 1e-12}
    assert not far, far


@pytest.mark.parametrize("case", [c for c in CASES if c.keys], ids=lambda c: c.name)
def test_half_precision_is_summed_in_float32(case: Case) -> None:
    far = {name: d for name, d in distances(case, torch.bfloat16).items() if not d < 0.03}
    assert not far, far


@pytest.mark.interpreter
def test_kernels_are_the_formula() -> None:
    (found,) = rows(Path(__file__).parent / "linear_script.py")
    assert set(found) == {case.name for case in SMALL} | {f"{case.name}, walked" for case in SMALL if case.causal}
    far = {name: distances for name, distances in found.items() if not max(distances.values()) < 1e-5}
    assert not far, far


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_operators_are_registered_as_torch_wants(case: Case) -> None:
    given = operands(case, torch.float64)
    ahead = case.keys - case.queries
    if not case.causal or not ahead:
        first = [given[n] for n in ("query", "key", "value")] + [given.get(n) for n in ("decay", "state", "state_sums")]
        options = (case.causal, case.normalize, given["eps"], case.divisor, case.scale, "")
        opcheck(OPS.linear.default, (*first, *options), test_utils=KINDS)
    got = torch.compile(lambda **g: OPS.linear_attention(**g), backend="aot_eager", dynamic=True)(**given)
    torch.testing.assert_close(got, OPS.linear_attention(**given))


KINDS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("divisor", ["", "add", "max_abs"])
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives(causal: bool, divisor: str) -> None:
    normalize = bool(divisor)
    case = Case("", 5, 5, 3, 2, 2, 1, causal=causal, normalize=normalize, begun=True, batch=1, divisor=divisor or "add")
    given = operands(case, torch.float64)
    names = [n for n, t in given.items() if isinstance(t, Tensor)]

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = OPS.linear_attention_states(**(given | dict(zip(names, tensors, strict=True))))
        return tuple(t for t in found if t.numel())

    assert torch.autograd.gradgradcheck(attend, [given[n] for n in names])


def test_a_state_continues_a_sequence() -> None:
    """The tokens of one attention in three calls, each of which begins with the state of the one before."""
    given = operands(Case("", decays=True, normalize=True), torch.float64)
    whole = OPS.linear_attention(**given)
    rest = {n: t for n, t in given.items() if n not in ("query", "key", "value")}
    parts, state, sums = [], None, None
    for start, end in ((0, 130), (130, 131), (131, 300)):
        tokens = (given[n][:, :, start:end] for n in ("query", "key", "value"))
        out, _, state, sums = OPS.linear_attention_states(*tokens, **rest, state=state, state_sums=sums)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-11, atol=1e-11)


def test_vmap_is_a_loop() -> None:
    given = operands(Case("", 40, 40, begun=True), torch.float64)
    stacked = torch.stack([given["value"], 2 * given["value"]])
    rest = {n: t for n, t in given.items() if n != "value"}
    got = torch.vmap(lambda v: OPS.linear_attention(value=v, **rest))(stacked)
    for mine, value in zip(got, stacked, strict=True):
        torch.testing.assert_close(mine, oracle(value=value, **rest)[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"key": torch.ones(2, 3, 300, 16).double()}, "shapes do not fit"),
        ({"query": torch.ones(2, 4, 301, 16).double()}, "no more queries than keys"),
        ({"decay": torch.zeros(3)}, "one number a head, causal"),
        ({"decay": torch.zeros(4), "causal": False}, "one number a head, causal"),
        ({"decay": torch.zeros(4, requires_grad=True)}, "requires a gradient"),
        ({"state": torch.zeros(2, 4, 16, 7)}, "state has the shape"),
        ({"state": torch.zeros(2, 4, 16, 8), "normalize": True}, "one of the two is missing"),
        ({"state_sums": torch.zeros(2, 4, 16)}, "nothing is normalised"),
        ({"value": torch.zeros(2, 2, 300, 8)}, "one floating type"),
        ({"divisor": "mean"}, 'the divisor is "mean"'),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str) -> None:
    given = operands(Case(""), torch.float64) | changes
    with pytest.raises(ValueError, match=sentence):
        OPS.linear_attention(**given)


@pytest.mark.parametrize(
    ("width", "value_width", "walks", "half"), [(128, 64, True, True), (153, 40, False, False), (24, 136, False, False)]
)
def test_rows_of_odd_widths_are_widened_on_a_gpu(width: int, value_width: int, walks: bool, half: bool) -> None:
    pytest.importorskip("triton")
    from attnfx.lowering import launch
    from attnfx.lowering.linear import kernels

    q, v = (torch.empty(1, 2, 200, n, dtype=torch.bfloat16, device="meta") for n in (width, value_width))
    with launch.recording("sm90") as recording:
        kernels.forward(q, q, v, None, None, None, True, False, 0.0)
    names = {call.kernel.__name__ for call in recording.calls}
    assert ("linear_walk" in names) == walks
    assert {call.keywords["HALF"] for call in recording.calls if "HALF" in call.keywords} == {half}
