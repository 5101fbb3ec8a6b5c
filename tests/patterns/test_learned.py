"""Learned biases of every spelling train: by their formula where a kernel has its gradient, else as the model computed them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import assert_same, compiled
from torch import Tensor

from attnfx.policy import Rule
from attnfx.report import Report
from attnfx.variants import SlidingWindow

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 7, 9, 8
AS_COMPUTED = "its learned bias is read as the model computed it"

Bias = Callable[[Tensor, Tensor], Tensor]


def learned(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def distance() -> Tensor:
    return torch.arange(QUERIES)[:, None] - torch.arange(KEYS)


def places() -> Tensor:
    """Neither distances nor a product of indices."""
    return (torch.arange(QUERIES)[:, None] * torch.arange(KEYS)) % 5


def kept() -> Tensor:
    return distance() >= -3


def trained(logits_of: Bias, *parameters: Tensor) -> Report:
    """The report of the compiled attention; its output and every gradient are eager's."""
    q, k, v = learned(BATCH, HEADS, QUERIES, WIDTH), learned(BATCH, HEADS, KEYS, WIDTH), learned(BATCH, HEADS, KEYS, WIDTH)

    def attention(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        return logits_of(q @ k.transpose(-1, -2) * 0.3, *parameters).softmax(-1) @ v

    return compared(attention, q, k, v, *parameters)


def compared(attention: Callable[..., Tensor], *leaves: Tensor, **options: Any) -> Report:
    got, report = compiled(attention, *leaves, **options)
    want = attention(*leaves)
    grad = torch.randn(want.shape, dtype=torch.float64)
    assert_same(got, want, 1e-11)
    assert_same(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), 1e-11)
    assert len(report.sites) == 1, [m.reason for m in report.missed]
    return report


@pytest.mark.parametrize(
    ("logits", "shape"),
    [
        (lambda s, t: (s + t) * 0.5, (HEADS, QUERIES, KEYS)),
        (lambda s, t: s - t / 3, (BATCH, 1, 1, KEYS)),
        (lambda s, t: s + (-t).float().double() * 0.1, (1, HEADS, 1, KEYS)),
        (lambda s, t: s + t + t, (HEADS, QUERIES, KEYS)),
        (lambda s, t: (s + t[distance().clamp(-3, 3) + 3].permute(2, 0, 1)) * 0.25, (7, HEADS)),
        (lambda s, t: (s.flatten(0, 1) + t).view_as(s), (BATCH * HEADS, 1, KEYS)),
        (lambda s, t: torch.tanh((s + t * 2)[None] / 5)[0] * 5, (HEADS, QUERIES, KEYS)),
        (lambda s, t: torch.tanh((s + t) / 5).masked_fill(~kept(), -1e9) * 5, (HEADS, QUERIES, 1)),
        (lambda s, t: torch.where(kept(), s + t, -1e4).where(kept().T[:1, :1], -1e5), (HEADS, 1, KEYS)),
        (lambda s, t: (s.view(BATCH, 2, 2, QUERIES, KEYS) + t[:, None]).view_as(s), (2, QUERIES, KEYS)),
        (lambda s, t: (s + t[places()]).masked_fill(~kept(), -1e9), (5,)),
    ],
    ids=[
        "scaled with the scores",
        "subtracted",
        "negated",
        "twice",
        "table",
        "folded heads",
        "softcap",
        "rows in a softcap",
        "in a mask",
        "shared by groups",
        "small table",
    ],
)
def test_a_bias_times_a_number_is_a_formula(logits: Bias, shape: tuple[int, ...]) -> None:
    report = trained(logits, learned(*shape))
    assert AS_COMPUTED not in report.sites[0].reason


@pytest.mark.parametrize(
    ("logits", "shape"),
    [
        (lambda s, t: s + t[:, 1 : QUERIES + 1, 2 : KEYS + 2], (HEADS, QUERIES + 3, KEYS + 2)),
        (lambda s, t: s + t[:, None, None] * distance().abs().sqrt() * torch.arange(KEYS), (HEADS,)),
        (lambda s, t: s + t.tanh() * 2, (HEADS, QUERIES, KEYS)),
        (lambda s, t: s + t[:, :QUERIES, None] * t[:, None], (HEADS, KEYS)),
        (lambda s, t: s + t[:, :QUERIES] + t[:, 1 : QUERIES + 1], (HEADS, QUERIES + 1, KEYS)),
        (lambda s, t: (s + t[:, places()]).masked_fill(~kept(), -1e9), (HEADS, 5)),
        (lambda s, t: s + torch.where(kept(), t * t, -torch.inf), (HEADS, QUERIES, KEYS)),
        (lambda s, t: s + torch.where(kept(), t, 0.5), (HEADS, QUERIES, KEYS)),
    ],
    ids=["slice", "slope", "tanh", "product", "overlap", "table", "masked", "chosen"],
)
def test_a_formula_without_a_gradient_is_read_as_computed(logits: Bias, shape: tuple[int, ...]) -> None:
    report = trained(logits, learned(*shape))
    assert AS_COMPUTED in report.sites[0].reason
    assert report.sites[0].exact


def test_a_mask_around_a_learned_bias_stays_a_formula() -> None:
    report = trained(lambda s, t: s + torch.where(kept(), t.exp(), -torch.inf), learned(HEADS, QUERIES, KEYS))
    assert report.sites[0].site is not None
    assert report.sites[0].site.facts.bounded


def test_a_second_product_that_is_gathered_keeps_its_gradient() -> None:
    """Positions that the keys meet: (r k)[.., i - j, j], from one more product."""
    relative, k2 = learned(HEADS, QUERIES + KEYS - 1, WIDTH), learned(BATCH, HEADS, WIDTH, KEYS)

    def gathered(s: Tensor, k2: Tensor, relative: Tensor) -> Tensor:
        at = (distance() + KEYS - 1).expand(BATCH, HEADS, QUERIES, KEYS)
        return s + (relative @ k2).gather(-2, at)

    report = trained(gathered, k2, relative)
    assert AS_COMPUTED in report.sites[0].reason


def test_without_gradients_the_formula_stays() -> None:
    table = torch.randn(HEADS, QUERIES + 3, KEYS, dtype=torch.float64)
    report = trained(lambda s, t: s + t[:, 1 : QUERIES + 1], table.requires_grad_())
    assert AS_COMPUTED in report.sites[0].reason
    q, k, v = (torch.randn(BATCH, HEADS, n, WIDTH) for n in (QUERIES, KEYS, KEYS))

    def attention(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) + t[:, 1 : QUERIES + 1]).softmax(-1) @ v

    _, report = compiled(attention, q, k, v, table.detach().float())
    assert AS_COMPUTED not in report.sites[0].reason


def test_the_beta_of_baddbmm() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, q, k.transpose(1, 2), beta=-0.5, alpha=0.3).softmax(-1) @ v

    report = compared(attention, learned(6, QUERIES, WIDTH), learned(6, KEYS, WIDTH), learned(6, KEYS, WIDTH), learned(6, 1, KEYS))
    assert AS_COMPUTED not in report.sites[0].reason


def test_a_variant_that_a_rule_names_reads_the_bias_as_computed_too() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            logits = (x @ x.transpose(-1, -2) + t[:, 1:]).masked_fill(~(distance()[:, :QUERIES] >= 0), -torch.inf)
            return logits.softmax(-1) @ x

    inputs = learned(BATCH, HEADS, QUERIES, WIDTH), learned(HEADS, QUERIES + 1, QUERIES)
    _, report = compiled(torch.nn.ModuleList([Attention()])[0], *inputs)
    assert AS_COMPUTED in report.sites[0].reason

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x, t) * 1.0

    (got, report) = compiled(Outer(), *inputs, policy=[Rule("inner", SlidingWindow(window=QUERIES))])
    assert not report.sites[0].exact
    assert AS_COMPUTED in report.sites[0].reason
    assert_same(got, Outer()(*inputs), 1e-11)  # a window of everything


@pytest.mark.parametrize("fill", [-1.0, -9.0, -1e4, torch.finfo(torch.float64).min, float("-inf")])
@pytest.mark.parametrize("shape", [(QUERIES, 1), (HEADS, 1, 1)], ids=["rows", "heads"])
def test_a_bias_that_masked_keys_lack_has_its_gradient(fill: float, shape: tuple[int, ...]) -> None:
    """A fill that is put in place of a score is without the bias of its row: what the softmax sees of the bias is not nothing."""
    trained(lambda s, t: (s + t).masked_fill(~kept(), fill), learned(*shape))


def test_a_hidden_row_under_two_masks_keeps_the_gradient_of_its_bias() -> None:
    hidden = torch.tensor([0.0, *[-1e4] * (KEYS - 1)], dtype=torch.float64)
    trained(lambda s, t: (s + hidden + t).masked_fill(distance().abs() > 1, -1e4), learned(QUERIES, 1))


def test_torchs_attention_gives_zero_where_data_hides_a_row_beside_a_finite_mask() -> None:
    data = torch.zeros(BATCH, 1, 1, KEYS, dtype=torch.float64)
    data[1] = float("-inf")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.where(kept(), 0.0, -1e4).double() + data
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    leaves = learned(BATCH, HEADS, QUERIES, WIDTH), learned(BATCH, HEADS, KEYS, WIDTH), learned(BATCH, HEADS, KEYS, WIDTH)
    got, report = compiled(attention, *leaves)
    assert len(report.sites) == 1
    assert_same(got, attention(*leaves), 1e-11)
    assert not got[1].any()
