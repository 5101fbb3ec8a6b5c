"""Soundness cases: memory that is written, strides, axes of every kind, biases, SDPA, masks that hide in data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from soundness_kit import INF, LOWEST, SDPA, A, T, add, biased, case, distance, later, masked_by, plain, qkv, scores
from torch import Tensor, einsum

# Memory that is written, and strides that are read -----------------------------------------------------------------------


@case(1, *qkv(), grad=False)
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
add("probabilities returned", 1, lambda q, k, v: (lambda p: (p @ v, p))(scores(q, k).softmax(-1)), *qkv())
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
