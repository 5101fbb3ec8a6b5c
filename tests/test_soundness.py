"""Never silently wrong: functions that look like attention and are not quite, run through the backend and compared with
eager.

Each case has a number of attentions that must be rewritten (None: any) and is compared in outputs, NaN, gradients and
written inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from attnfx.backend import attnfx, listeners
from attnfx.report import Report

INF = float("inf")
NAN = float("nan")
LOWEST = torch.finfo(torch.float32).min
Case = tuple[int | None, Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Case] = {}
FORWARD_ONLY: set[str] = set()

torch.manual_seed(0)
T = torch.randn
A = torch.arange
SDPA = F.scaled_dot_product_attention


def qkv(
    b: int = 2, h: int = 3, m: int = 5, n: int | None = None, d: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    n = m if n is None else n
    return T(b, h, m, d, dtype=dtype), T(b, h, n, d, dtype=dtype), T(b, h, n, d, dtype=dtype)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k) * 0.5).softmax(-1) @ v


def later(m: int, n: int) -> Tensor:
    return A(n)[None, :] > A(m)[:, None]


def case(sites: int | None, *args: Any, grad: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        add(f.__name__, sites, f, *args, grad=grad)
        return f

    return register


def add(name: str, sites: int | None, f: Callable[..., Any], *args: Any, grad: bool = True) -> None:
    assert name not in CASES
    CASES[name] = sites, f, args
    if not grad:
        FORWARD_ONLY.add(name)


def masked(f: Callable[[Tensor, Tensor], Tensor], fill: float = -3.0) -> Callable[..., Tensor]:
    return lambda q, k, v: scores(q, k).masked_fill(f(A(5)[:, None], A(5)[None, :]), fill).softmax(-1) @ v


def biased(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """The bias is computed by ``f`` from everything after q, k and v."""
    return lambda q, k, v, *more: (scores(q, k) + f(*more)).softmax(-1) @ v


def distance(*_: Any) -> Tensor:
    return A(5)[None, :] - A(5)[:, None]


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
    add(f"probabilities through {_name}", 0, lambda q, k, v, f=_f: f((scores(q, k) * 2).softmax(-1)) @ v, *qkv())
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


def masked_by(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return scores(q, k).masked_fill(m, -9.0).softmax(-1) @ v


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


# Memory that is written, and strides that are read -----------------------------------------------------------------------


@case(0, *qkv(), grad=False)
def queries_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    q.zero_()
    return s.softmax(-1) @ v


@case(None, *qkv(), grad=False)
def keys_written_through_a_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = k.transpose(-1, -2)
    k[:, :, 0] = 0
    return (q @ t).softmax(-1) @ v


@case(None, *qkv(), grad=False)
def keys_copied_then_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    copy = k.clone()
    k.zero_()
    return plain(q, copy, v)


@case(1, *qkv(), grad=False)
def values_written_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = plain(q, k, v)
    v.mul_(2)
    return o


@case(None, *qkv(), T(4, 5, 5), grad=False)
def mask_written_between(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k) + m[0]
    m.zero_()
    return s.softmax(-1) @ v


@case(None, *qkv(), grad=False)
def scores_written_through_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s.view(6, 5, 5).add_(A(5))
    s[..., 3:] = -5.0
    return s.softmax(-1) @ v


@case(None, *qkv(), grad=False)
def probabilities_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    p[..., 0] = 0
    return p @ v


@case(1, *qkv())
def output_written(q: Tensor, k: Tensor, v: Tensor) -> Any:
    o = plain(q, k, v)
    t = o.transpose(1, 2)
    t[:, 0] = 0
    return o.add_(1.0), t


@case(1, *qkv(), T(5, 5))
def bias_written_after(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    m = m * 1
    o = (scores(q, k) + m).softmax(-1) @ v
    m.zero_()
    return o


@case(1, *qkv())
def strides_of_the_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = einsum("bhij,bhjd->bihd", scores(q, k).softmax(-1), v)
    return o.permute(0, 2, 1, 3).view(6, 5, 4)


# Axes ------------------------------------------------------------------------------------------------------------------

for _name, _args in {
    "B=1": qkv(1), "H=1": qkv(2, 1), "M=1": qkv(m=1, n=5), "N=1": qkv(m=5, n=1), "D=1": qkv(d=1), "all 1": qkv(1, 1, 1, 1, 1),
    "B=0": qkv(0), "M=0": qkv(m=0, n=5), "N=0": qkv(m=5, n=0), "H=0": qkv(2, 0),
}.items():  # fmt: skip
    add(f"{_name} plain", None, plain, *_args)
    add(f"{_name} causal", None, lambda q, k, v: SDPA(q, k, v, is_causal=True), *_args)
    add(f"{_name} einsum", None, lambda q, k, v: einsum("bhij,bhjd->bihd", einsum("bhid,bhjd->bhij", q, k).softmax(-1), v), *_args)
    add(
        f"{_name} bias", None, lambda q, k, v: (scores(q, k) + A(k.shape[2]) * A(q.shape[2])[:, None] * 0.1).softmax(-1) @ v, *_args
    )


def both(first: str, second: str) -> Callable[..., Tensor]:
    return lambda q, k, v: einsum(second, einsum(first, q, k).softmax(-1), v)


for _dim in (0, 1, 2):
    add(f"softmax over {_dim}", 0, lambda q, k, v, d=_dim: scores(q, k).softmax(d) @ v, T(4, 4, 4, 4), T(4, 4, 4, 4), T(4, 4, 4, 4))
add("keys first", 1, lambda q, k, v: (k @ q.transpose(-1, -2)).softmax(-2).transpose(-1, -2) @ v, *qkv(m=5, n=7))
add(
    "values first",
    1,
    lambda q, k, v: (v.transpose(-1, -2) @ (k @ q.transpose(-1, -2)).softmax(-2)).transpose(-1, -2),
    *qkv(m=5, n=7),
)
add(
    "channels",
    None,
    lambda q, k, v: (q.transpose(-1, -2) @ k).softmax(-1) @ v.transpose(-1, -2),
    T(2, 3, 6, 6),
    T(2, 3, 6, 6),
    T(2, 3, 6, 6),
)
add(
    "keys with batch and heads swapped",
    None,
    lambda q, k, v: (q @ k.permute(1, 0, 3, 2)).softmax(-1) @ v,
    T(3, 3, 5, 4),
    T(3, 3, 5, 4),
    T(3, 3, 5, 4),
)
add("square keys not transposed", None, lambda q, k, v: (q @ k).softmax(-1) @ v, T(4, 4, 4, 4), T(4, 4, 4, 4), T(4, 4, 4, 4))
add("some probabilities", 0, lambda q, k, v: scores(q, k).softmax(-1)[..., :4] @ v[:, :, :4], *qkv())
add("probabilities repeated", 0, lambda q, k, v: scores(q, k).softmax(-1).repeat(1, 1, 1, 2) @ torch.cat([v, v], 2), *qkv())
add("probabilities returned", 0, lambda q, k, v: (lambda p: (p @ v, p))(scores(q, k).softmax(-1)), *qkv())
add("probabilities squared", 0, lambda q, k, v: (lambda p: p @ p @ v)(scores(q, k).softmax(-1)), *qkv())
add("scores returned", 1, lambda q, k, v: (lambda s: (s.softmax(-1) @ v, s))(scores(q, k)), *qkv())
add("scores and their transpose", None, lambda q, k, v: (lambda s: (s + s.transpose(-1, -2)).softmax(-1) @ v)(scores(q, k)), *qkv())
add("scores squared", None, lambda q, k, v: (scores(q, k) ** 2).softmax(-1) @ v, *qkv())
add("two products", None, lambda q, k, v, r: (scores(q, k) + scores(q, r)).softmax(-1) @ v, *qkv(), T(2, 3, 5, 4))
add("relative shift", None, biased(lambda s: F.pad(s, (1, 0)).view(2, 3, 6, 5)[:, :, 1:]), *qkv(), T(2, 3, 5, 5))
add("five axes", 1, both("nbqhd,nbkhd->nbhqk", "nbhqk,nbkhd->nbqhd"), T(2, 2, 5, 3, 4), T(2, 2, 7, 3, 4), T(2, 2, 7, 3, 4))
add(
    "six axes",
    1,
    both("anbqhd,anbkhd->anbhqk", "anbhqk,anbkhd->anbqhd"),
    T(1, 2, 2, 5, 3, 4),
    T(1, 2, 2, 7, 3, 4),
    T(1, 2, 2, 7, 3, 4),
)
add(
    "implicit einsum",
    None,
    lambda q, k, v: einsum("bij,bjd", einsum("bid,bjd->bij", q, k).softmax(-1), v),
    T(2, 5, 4),
    T(2, 7, 4),
    T(2, 7, 4),
)
add("repeated letter", 0, both("bid,bjd->bij", "bij,bjj->bij"), T(2, 5, 4), T(2, 7, 4), T(2, 7, 7))
add("einsum broadcasts", None, both("bhid,bhjd->bhij", "bhij,bhjd->bhid"), T(2, 3, 5, 4), T(1, 3, 7, 4), T(2, 1, 7, 4))
add("einsum broadcasts the sum", None, both("bhid,bhjd->bhij", "bhij,bhjd->bhid"), T(2, 3, 5, 4), T(2, 3, 7, 1), T(2, 3, 1, 4))
add("keys of each query", None, both("bhid,bhijd->bhij", "bhij,bhjd->bhid"), T(2, 3, 5, 4), T(2, 3, 5, 7, 4), T(2, 3, 7, 4))
add("values of each query", None, both("bhid,bhjd->bhij", "bhij,bhijd->bhid"), T(2, 3, 5, 4), T(2, 3, 7, 4), T(2, 3, 5, 7, 4))
add("queries of two axes", None, both("bhxyd,bhjd->bhxyj", "bhxyj,bhjd->bhxyd"), T(2, 3, 4, 5, 4), T(2, 3, 7, 4), T(2, 3, 7, 4))
add("slices of all three", 1, lambda q, k, v: plain(q[:, :, 1:3], k[:, :, ::2], v[:, :, ::2, 1:]), *qkv())
add("keys flipped", None, lambda q, k, v: plain(q, k.flip(2), v), *qkv())
add("one after the other", 2, lambda q, k, v: plain(plain(q, k, v), k, v), *qkv())
for _name, _f in {
    "interleaved": lambda x: x.repeat_interleave(3, 1), "tiled": lambda x: x.repeat(1, 3, 1, 1), "first": lambda x: x[:, :1],
    "expanded": lambda x: x[:, :, None].expand(2, 2, 3, 7, 4).reshape(2, 6, 7, 4),
    "flipped": lambda x: x.repeat_interleave(3, 1).flip(1),
}.items():  # fmt: skip
    add(f"key heads {_name}", 1, lambda q, k, v, f=_f: plain(q, f(k), f(v)), T(2, 6, 5, 4), T(2, 2, 7, 4), T(2, 2, 7, 4))
add(
    "key heads of two kinds",
    None,
    lambda q, k, v: plain(q, k.repeat(1, 3, 1, 1), v.repeat_interleave(3, 1)),
    T(2, 6, 5, 4),
    T(2, 2, 7, 4),
    T(2, 2, 7, 4),
)

# What biases are made of -------------------------------------------------------------------------------------------------

add("table from the end", 1, biased(lambda t: t[:, distance()]), *qkv(), T(3, 9))
add("table clamped from the end", None, biased(lambda t: t[distance().clamp(-2, 2)]), *qkv(), T(3))
add("table by data", None, biased(lambda t, ids: t[ids]), *qkv(), T(9), torch.randint(-9, 9, (5, 5)))
add("heads by data", None, biased(lambda t, ids: t[ids]), *qkv(), T(3, 5, 5), torch.tensor([2, 0, 1]))
add(
    "two indices",
    None,
    biased(lambda t, a, b: t[a[:, None], b][:, None]),
    *qkv(),
    T(4, 7, 5),
    torch.tensor([2, 0]),
    torch.tensor([1, -1, 3, 0, 6]),
)
add(
    "index in the last axis",
    None,
    biased(lambda t, a: t[:, :, :, a].permute(1, 3, 0, 2)),
    *qkv(),
    T(5, 2, 5, 3),
    torch.tensor([2, 0, 1]),
)
add("gather", None, biased(lambda t: torch.gather(t, 3, (distance() + 4).expand(2, 3, 5, 5))), *qkv(), T(2, 3, 5, 9))
add("cat", None, biased(lambda a, b: torch.cat([a, b], -1)), *qkv(), T(5, 3), T(5, 2))
add("cat with nothing", None, biased(lambda a: torch.cat([a, a[:, :0], torch.zeros(0), a[:, :2]], -1)), *qkv(), T(5, 3))
add("cat of two types", 1, biased(lambda: torch.cat([A(5)[:, None] > 2, A(20).view(5, 4)], 1)), *qkv())
add("pad", None, biased(lambda a: F.pad(a, (1, 1), value=-2.5)), *qkv(), T(5, 3))
add("pad off", None, biased(lambda a: F.pad(a, (-1, -1, 1, -2))), *qkv(), T(6, 7))
add("narrow from the end", None, biased(lambda: A(12).narrow(0, -7, 5) * 0.1), *qkv())
add("last of unbind", None, biased(lambda t: t.unbind(0)[-1] * A(5)[:, None]), *qkv(), T(4, 5))
add("flip and roll", None, biased(lambda a: a.flip(-1) + a.roll(1, -1)), *qkv(), T(5, 5))
add(
    "shared table",
    2,
    lambda q, k, v, t: biased(lambda: t[:, distance() + 4])(q, k, biased(lambda: t[:, distance() + 4])(k, q, v)),
    *qkv(),
    T(3, 9),
)
add("bias and its transpose", None, biased(lambda m: m + m.transpose(-1, -2)), *qkv(), T(3, 5, 5))
add("slopes", None, biased(lambda s: s[:, None, None] * distance()), *qkv(), T(3))
add("learned scale", None, lambda q, k, v, s: (scores(q, k) * s).softmax(-1) @ v, *qkv(), torch.tensor(0.4))
add("learned scales", None, lambda q, k, v, s: (scores(q, k) * s.exp().clamp(max=3.0)).softmax(-1) @ v, *qkv(), T(3, 1, 1))
add("learned divisor", None, lambda q, k, v, s: (scores(q, k) / s).softmax(-1) @ v, *qkv(), torch.tensor(2.0))

# scaled_dot_product_attention ------------------------------------------------------------------------------------------

_bools = T(2, 1, 5, 7) > 0
_bools[0, 0, 2] = False
for _name, _mask in {
    "[M,N]": _bools[0, 0], "[B,1,1,N]": _bools[:, :, :1], "[B,1,M,N]": _bools, "[1,N]": T(1, 7), "[M,1]": T(5, 1),
    "[]": torch.tensor(0.5),
    "nothing kept": torch.zeros(5, 7, dtype=torch.bool), "floats": T(2, 3, 5, 7),
}.items():  # fmt: skip
    add(f"sdpa mask {_name}", 1, lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), *qkv(m=5, n=7), _mask)
for _m, _n in ((5, 7), (7, 5), (1, 5), (5, 1)):
    add(f"sdpa causal {_m} {_n}", 1, lambda q, k, v: SDPA(query=q, key=k, value=v, is_causal=True), *qkv(m=_m, n=_n))
add("sdpa of two axes", None, lambda q, k, v, m: SDPA(q, k, v, m), T(5, 4), T(7, 4), T(7, 4), _bools[0, 0])
add("sdpa of three axes", 1, lambda q, k, v: SDPA(q, k, v, scale=-0.7), T(6, 5, 4), T(6, 7, 4), T(6, 7, 3))
add("sdpa broadcasts", None, SDPA, T(1, 3, 5, 4), T(2, 1, 7, 4), T(7, 4))
add("sdpa grouped", 1, lambda q, k, v: SDPA(q, k, v, enable_gqa=True), T(2, 6, 5, 4), T(2, 2, 7, 4), T(2, 2, 7, 4))
add("sdpa grouped twice", None, lambda q, k, v: SDPA(q, k, v, enable_gqa=True), T(2, 6, 5, 4), T(2, 2, 7, 4), T(2, 3, 7, 4))
add("sdpa drops all", None, lambda q, k, v: SDPA(q, k, v, dropout_p=1.0), *qkv())
add("sdpa of one tensor", 1, lambda x: SDPA(x, x, x, is_causal=True), T(2, 3, 5, 4))
add("heads dropped as a whole", None, lambda q, k, v: F.dropout2d(scores(q, k).softmax(-1), 0.5, True) @ torch.ones_like(v), *qkv())
for _dtype in (torch.float64, torch.float16, torch.bfloat16):
    add(f"{_dtype} causal", 1, lambda q, k, v: masked_by(q, k, v, later(5, 5)), *qkv(dtype=_dtype))
    add(f"{_dtype} bias", 1, biased(lambda b: b), *qkv(dtype=_dtype), T(3, 5, 5, dtype=_dtype))


@case(1, *(x.bfloat16().float() for x in qkv()), T(3, 5, 5).bfloat16())
def autocast(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        o = (scores(q, k) + b).masked_fill(later(5, 5), -INF).softmax(-1) @ v
    return o.float() * 2


# Masks that hide in data and cover whole rows. --------------------------------------------------------------------------

_rows = torch.tensor([[0.0, 0, 1, 1, 1]] * 4 + [[1.0] * 5])  # the last query keeps nothing
add("gradient of a row at -1e9 in data", 1, biased(lambda m: (m * -1e9).detach()), *qkv(), _rows, grad=True)
_wider = torch.cat([_rows, _rows[:, :1]], 1) * -1e38 * 1e38
add("rows at -inf in sliced data", 1, biased(lambda m: m[:, 1:]), *qkv(), _wider, grad=False)
add(
    "rows at -inf in one number a query", 1, biased(lambda m: m.log()), *qkv(), torch.tensor([1.0, 0, 1, 1, 0])[:, None], grad=False
)
add(
    "lowest twice",
    1,
    biased(lambda m: torch.zeros(5).masked_fill(m, LOWEST) + torch.full((5, 5), LOWEST).triu(1)),
    *qkv(),
    A(5) % 3 != 1,
)


# Running them ------------------------------------------------------------------------------------------------------------


def outcome(f: Callable[..., Any], args: tuple[Any, ...], grad: bool) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Outputs, gradients and what became of the inputs."""
    given = [a.detach().clone().requires_grad_(grad and a.is_floating_point()) if isinstance(a, Tensor) else a for a in args]
    torch.manual_seed(0)
    outputs = [o for o in torch.utils._pytree.tree_leaves(f(*given)) if isinstance(o, Tensor)]
    inputs = [a for a in given if isinstance(a, Tensor)]
    wanted = [a for a in inputs if a.requires_grad]
    differentiable = [o for o in outputs if o.requires_grad]
    if not (wanted and differentiable):
        return outputs, [], inputs
    weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).reshape(o.shape) for o in differentiable]
    loss = sum(((o.double() * w).sum() for o, w in zip(differentiable, weights, strict=True)), torch.zeros(()))
    return outputs, list(torch.autograd.grad(loss, wanted, allow_unused=True)), inputs


def agree(ours: Tensor | None, eager: Tensor | None, tolerance: float, what: str) -> None:
    assert (ours is None) == (eager is None), f"{what}: eager has {'no' if eager is None else 'a'} gradient"
    if ours is None or eager is None:
        return
    assert (ours.shape, ours.dtype, ours.requires_grad) == (eager.shape, eager.dtype, eager.requires_grad), what
    scale = float(eager.detach().double().nan_to_num(0, 0, 0).abs().max()) if eager.numel() else 0.0
    torch.testing.assert_close(
        ours.detach(), eager.detach(), rtol=0, atol=tolerance * (1 + scale), equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def compiled(f: Callable[..., Any], reports: list[Report], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    listeners.set((reports.append,))
    return torch.compile(f, backend=attnfx, options={"inner": "eager", "strict": True}, **options)


@pytest.fixture(autouse=True)
def _own_listeners() -> Any:
    before = listeners.get()
    yield
    listeners.set(before)


def tolerance_of(args: tuple[Any, ...]) -> float:
    sizes = [a.dtype.itemsize for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    return {2: 3e-2, 4: 2e-5, 8: 1e-11}[min(sizes)]


@pytest.mark.parametrize("name", CASES)
def test_same_as_eager(name: str) -> None:
    sites, f, args = CASES[name]
    grad, reports = name not in FORWARD_ONLY, list[Report]()
    eager = outcome(f, args, grad)
    ours = outcome(compiled(f, reports), args, grad)
    for part, mine, theirs in zip(("output", "gradient", "input"), ours, eager, strict=True):
        assert len(mine) == len(theirs)
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            agree(a, b, tolerance_of(args) * (5 if part == "gradient" else 1), f"{part} {k}")
    if sites is not None:
        assert sum(len(r.sites) for r in reports) == sites, [m.reason for r in reports for m in r.missed]


_x, _causal, _pad = T(2, 6, 8), later(6, 6), A(6)[None] >= torch.tensor([[6], [4]])
MASKS = {
    "none": {}, "causal": {"mask": _causal}, "float": {"mask": torch.zeros(6, 6).masked_fill(_causal, -INF)},
    "padding": {"padding": _pad},
    "both": {"mask": _causal, "padding": _pad}, "nothing kept": {"padding": _pad | (A(2)[:, None] == 1)}, "bias": {"mask": T(6, 6)},
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_torch_modules(mask: str, training: bool) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=mask == "both")
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu" if mask == "both" else "relu", batch_first=True, norm_first=n)
        for n in (True, False)
    ]
    m, p = MASKS[mask].get("mask"), MASKS[mask].get("padding")

    def run(x: Tensor) -> Any:
        y = mha(x, x, x, attn_mask=m, key_padding_mask=p, need_weights=False)[0]
        return y, [layer(x, src_mask=m, src_key_padding_mask=p) for layer in layers]

    for module in (mha, *layers):
        module.train(training).requires_grad_(training)
    reports: list[Report] = []
    eager, ours = (outcome(f, (_x,), training) for f in (run, compiled(run, reports)))
    for a, b in zip((*ours[0], *ours[1]), (*eager[0], *eager[1]), strict=True):
        agree(a, b, 1e-4, mask)
    assert sum(len(r.sites) for r in reports) == 3


_linear = nn.Linear(8, 8)


def heads(x: Tensor) -> Tensor:
    return _linear(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)


def window(x: Tensor) -> Tensor:
    i = A(x.shape[1])
    return scores(heads(x), heads(x)).masked_fill((i[:, None] - i >= x.shape[1] // 2) | (i > i[:, None]), -INF).softmax(-1) @ heads(
        x
    )


def folded(x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = heads(x).reshape(b * 2, n, 4)
    s = torch.bmm(q, q.transpose(1, 2)).view(b, 2, n, n) + torch.where(torch.ones(n, n, dtype=torch.bool).tril(), 0.0, -1e9)
    return torch.bmm(s.view(b * 2, n, n).softmax(-1), q).view(b, 2, n, 4)


def appended(x: Tensor) -> Tensor:
    q = heads(x)
    k = torch.cat([q, q[:, :, :3]], 2)
    return (scores(q, k) + torch.cat([A(q.shape[2]), A(q.shape[2])[:3]]) * 0.1).softmax(-1) @ k


def last_half(x: Tensor) -> Tensor:
    n = x.shape[1]
    return (scores(heads(x), heads(x)[:, :, -(n // 2) :]) + A(n)[-(n // 2) :] * 0.1).softmax(-1) @ heads(x)[:, :, -(n // 2) :]


def number(x: Tensor, c: float = 0.3) -> Tensor:
    return (scores(heads(x), heads(x)) * c).softmax(-1) @ heads(x)


def number_twice(x: Tensor, c: float = 0.3) -> Tensor:
    s = scores(heads(x), heads(x))
    return (s * c + s).softmax(-1) @ heads(x)


def number_to_sdpa(x: Tensor, c: float = 0.3) -> Tensor:
    return SDPA(heads(x), heads(x), heads(x), scale=c)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("f", [window, folded, appended, last_half, number, number_twice, number_to_sdpa])
def test_sizes_known_at_run_time(f: Callable[..., Tensor], dynamic: bool | None) -> None:
    """The values of eager at every size, and as many compiles as with the eager backend."""
    calls: list[tuple[Any, ...]] = [(T(2, 6, 8),), (T(3, 9, 8),), (T(2, 7, 8),), (T(1, 1, 8),)]
    if f.__name__.startswith("number"):
        calls = [(*call, c) for call, c in zip(calls, (0.3, 0.7, 0.9, 0.2), strict=True)]
    counter, reports = torch._dynamo.testing.CompileCounter(), list[Report]()
    torch._dynamo.reset()
    plainly = torch.compile(f, backend=counter, dynamic=dynamic)
    for call in calls:
        plainly(*call)
    ours = compiled(f, reports, dynamic=dynamic)
    for call in calls:
        agree(ours(*call), f(*call), 2e-5, f"{[*call[0].shape]}")
    assert len(reports) == counter.frame_count
