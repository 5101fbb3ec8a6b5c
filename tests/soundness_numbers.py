"""Soundness cases: gradients that the model stops, and numbers too large or too narrow for a formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from soundness_kit import INF, LOWEST, NAN, A, T, add, biased, case, distance, later, masked, masked_by, plain, qkv, scores
from torch import Tensor

# Gradients that the model stops ----------------------------------------------------------------------------------------

add("detached keys", 1, lambda q, k, v: plain(q, k.detach(), v), *qkv())
add("detached data of keys", None, lambda q, k, v: plain(q, k.data, v), *qkv())
add("detached probabilities", 0, lambda q, k, v: scores(q, k).softmax(-1).detach() @ v, *qkv())
add("detached scores", 0, lambda q, k, v: scores(q, k).detach().softmax(-1) @ v, *qkv())
add("detached bias", 1, biased(lambda b: b.detach()), *qkv(), T(3, 5, 5))
add("detached table", 1, biased(lambda t: t.detach()[:, distance() + 4]), *qkv(), T(3, 9))
add("detached lookup", 1, biased(lambda t: t[:, distance() + 4].detach()), *qkv(), T(3, 9))
add(
    "table with padding row",
    None,
    biased(lambda w: F.embedding(distance() + 4, w, padding_idx=4).permute(2, 0, 1)),
    *qkv(),
    T(9, 3),
)


@case(1, *qkv(), T(3, 9))
def lookup_without_grad(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        b = t[:, distance() + 4]
    return (scores(q, k) + b).softmax(-1) @ v


@case(0, *qkv())
def scores_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = scores(q, k) * 0.3
    return s.softmax(-1) @ v


@case(1, *qkv())
def view_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        t = k.transpose(-1, -2)
    return (q @ t).softmax(-1) @ v


@case(1, *qkv())
def scale_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k * 0.3
    return scores(q, k).softmax(-1) @ v


@case(1, *qkv())
def all_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        o = plain(q, k, v)
    return o + q


@case(0, *qkv())
def write_without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    with torch.no_grad():
        s.mul_(2.0)
    return s.softmax(-1) @ v


# Numbers: types that are too narrow, constants that are too large or none ------------------------------------------------

for _name, _f in {
    "bool": lambda p: p.to(torch.bool).float(), "int": lambda p: p.int().float(),
    "fp8": lambda p: p.to(torch.float8_e4m3fn).float(),
    "mask": lambda p: p * torch.ones(5, 5).tril(), "offset": lambda p: p + 0.1,
    "half": lambda p: p[..., :4].repeat(1, 1, 1, 2)[..., :5],
}.items():  # fmt: skip
    add(f"probabilities through {_name}", int(_name == "mask"), lambda q, k, v, f=_f: f((scores(q, k) * 2).softmax(-1)) @ v, *qkv())
add("scores through int", 0, lambda q, k, v: (scores(q, k) * 2).int().float().softmax(-1) @ v, *qkv())
add("scores through fp8", 0, lambda q, k, v: (scores(q, k) * 2).to(torch.float8_e4m3fn).float().softmax(-1) @ v, *qkv())
add("uint8 positions wrap", 1, lambda q, k, v: masked_by(q, k, v, later_of(A(300).to(torch.uint8))), *qkv(1, 1, 300))
add("uint8 differences wrap", 1, masked(lambda i, j: i.to(torch.uint8) - j.to(torch.uint8) > 3), *qkv())
add("int8 products wrap", 1, masked(lambda i, j: (i * 30).to(torch.int8) * j.to(torch.int8) < 0), *qkv())
add("int32 products wrap", 1, masked(lambda i, j: i.int() * 1000000007 + j.int() < 0), *qkv())
add("uint8 complement", 1, masked(lambda i, j: (~j.to(torch.uint8) < 252) & (i > 0)), *qkv())
add("uint8 negation", 1, masked(lambda i, j: (-j.to(torch.uint8) < 253) & (i > 0)), *qkv())
add("logical not of integers", 1, biased(lambda: A(5)[None].logical_not_()), *qkv())
add(
    "bool equals position",
    1,
    lambda q, k, v, m: scores(q, k).masked_fill(m == A(5), -3.0).softmax(-1) @ v,
    *qkv(),
    T(2, 1, 1, 5) > 0,
)
add("int unequal position", 1, lambda q, k, v, m: scores(q, k).masked_fill(m.int() != A(5), -3.0).softmax(-1) @ v, *qkv(), T(5) > 0)
add("bools added", 1, masked(lambda i, j: (j > i) + (j == 0)), *qkv())
add("bools xored", 1, masked(lambda i, j: (j > i) ^ (j == 0)), *qkv())
add("bools compared", 1, masked(lambda i, j: (j > i) < (j == 0)), *qkv())
add(
    "segments",
    1,
    lambda q, k, v, s: masked_by(q, k, v, s[:, None, None] != s[:, None, :, None]),
    *qkv(),
    torch.tensor([[0, 0, 1, 1, 1]] * 2),
)
for _d in (2, -3):
    for _name, _f in {
        "//": lambda x, d: x // d, "%": lambda x, d: x % d, "fmod": torch.fmod, "/": lambda x, d: x / d,
        "trunc": lambda x, d: torch.div(x, d, rounding_mode="trunc"), "both": lambda x, d: x // d >= x % d,
    }.items():  # fmt: skip
        add(f"integer {_name} {_d}", 1, biased(lambda f=_f, d=_d: f(A(5)[None] - A(5)[:, None] * 2, d)), *qkv(), grad=False)
add("NaN added", None, biased(lambda: NAN), *qkv())
add("NaN filled", None, masked(lambda i, j: j > i + 2, NAN), *qkv())
add("NaN selected", None, lambda q, k, v: torch.where(later(5, 5), NAN, scores(q, k)).softmax(-1) @ v, *qkv())
for _c in (0.0, -1.5, INF):
    add(f"times {_c}", None, lambda q, k, v, c=_c: (scores(q, k) * c).softmax(-1) @ v, *qkv())
    add(f"divided by {_c}", None, lambda q, k, v, c=_c: (scores(q, k) / c).softmax(-1) @ v, *qkv())
for _fill in (-INF, INF, LOWEST, -1e4, 3.0, 1e9):
    _name = f"fill {_fill:g}"
    _exact = _fill != -INF  # a NaN row spreads over the whole gradient
    add(f"{_name} put", None, masked(lambda i, j: (j > i) | (i == 2), _fill), *qkv(), grad=_exact)
    add(
        f"{_name} added",
        None,
        biased(lambda c=_fill: torch.zeros(5, 5).masked_fill(later(5, 5) | (A(5) == 2)[:, None], c)),
        *qkv(),
        grad=_exact,
    )
    add(
        f"{_name} where not",
        None,
        lambda q, k, v, c=_fill: torch.where(later(5, 5), scores(q, k), c).softmax(-1) @ v,
        *qkv(),
        grad=_exact,
    )
    add(
        f"{_name} twice",
        None,
        lambda q, k, v, c=_fill: refilled(q, k, c).softmax(-1) @ v,
        *qkv(),
        grad=False,
    )
    add(f"{_name} added twice", None, biased(lambda c=_fill: 2 * torch.zeros(5, 5).masked_fill(later(5, 5), c)), *qkv(), grad=False)
    add(f"{_name} scaled", None, lambda q, k, v, c=_fill: doubled(q, k, c).softmax(-1) @ v,
        *qkv(), grad=False)  # fmt: skip
add("two fills", 1, lambda q, k, v: masked_scores(q, k, -1e4).masked_fill(A(5) == 1, -INF).softmax(-1) @ v, *qkv())
add("exp over sum", 0, lambda q, k, v: over_sum(masked_scores(q, k, -1e9).exp()) @ v, *qkv())
add("exp over sum and one", 0, lambda q, k, v: (lambda e: e / (e.sum(-1, keepdim=True) + 1))(scores(q, k).exp()) @ v, *qkv())
add("exp over another sum", 0, lambda q, k, v: (lambda e: e / e.sum(-2, keepdim=True))(scores(q, k).exp()) @ v, *qkv())
add("float64 scale", 1, lambda q, k, v: (scores(q, k) * 0.1).softmax(-1) @ v, *qkv(dtype=torch.float64))
add("float64 comparison", 1, lambda q, k, v, x: scores(q, k).masked_fill(x == 0.1, -9.0).softmax(-1) @ v, *qkv(dtype=torch.float64),
    torch.tensor([0.1, 0.3, 0.1, 0.2, 0.5], dtype=torch.float64))  # fmt: skip


def later_of(i: Tensor) -> Tensor:
    return i[None, :] > i[:, None]


def masked_scores(q: Tensor, k: Tensor, fill: float) -> Tensor:
    return scores(q, k).masked_fill(later(5, 5) | (A(5) == 2)[:, None], fill)


def refilled(q: Tensor, k: Tensor, fill: float) -> Tensor:
    return masked_scores(q, k, fill).masked_fill(A(5) == 1, fill) * 1.5


def doubled(q: Tensor, k: Tensor, fill: float) -> Tensor:
    return (scores(q, k) + torch.zeros(5, 5).masked_fill(later(5, 5), fill)) * 2


def over_sum(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)
