"""Mutations: one operation that makes an attention another program, some of them still an attention of another kind.

A mutated program may be rewritten only if the results stay the same. Each mutation acts at one place of the program on a tensor
whose axes are all apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnfx.testing.program import Program, Sizes, Unspellable
from attnfx.testing.writer import Axes, Var, Writer

Change = Callable[[Writer, Var], str]


@dataclass(frozen=True)
class Mutation:
    """``place``: query, key, value, scores, logits, weights, output (an expression in {x} of the same axes), axis (of the
    softmax) or values (the contraction). ``fits`` the sizes that it needs."""

    place: str
    change: Change | str
    fits: Callable[[Sizes], bool] = lambda sizes: True


def _square(sizes: Sizes) -> bool:
    return sizes.queries == sizes.keys


def _plain_square(sizes: Sizes) -> bool:
    return _square(sizes) and sizes.group == 1


def _roll(letter: str, shift: int = 1) -> Change:
    return lambda w, x: f"{x.name}.roll({shift}, {x.axis(letter)})"


def _flip(letter: str) -> Change:
    return lambda w, x: f"{x.name}.flip({x.axis(letter)})"


def _swap(a: str, b: str) -> Change:
    return lambda w, x: f"{x.name}.transpose({x.axis(a)}, {x.axis(b)})"


def _gate(letters: str, operation: str = "*", made: str = "torch.randn({shape}).to(dtype).requires_grad_()") -> Change:
    def change(w: Writer, x: Var) -> str:
        axes: Axes = tuple((letter,) for letter in letters.replace("h", w.program.heads))
        gate = w.input("gate", axes, made)
        return f"{x.name} {operation} {w.fitted(gate, x.axes).name}"

    return change


def _mixed(w: Writer, x: Var) -> str:
    """Heads mixed by a matrix (talking heads)."""
    at, n = x.axis("g"), w.number("g")
    mix = w.input("mix", (), f"torch.randn({n}, {n}).to(dtype).requires_grad_()")
    letters = "abcdefgh"[: len(x.axes)]
    return (
        f'torch.einsum("{letters}, {letters[at]}z -> {letters.replace(letters[at], "z")}", {x.name}, {mix.name}.to({x.name}.dtype))'
    )


def _slice_keys(w: Writer, x: Var) -> str:
    """The last key takes part in the sum of the softmax and not in the product."""
    at = x.axis("j")
    sizes = ", ".join("-1" if k == at else "1" for k in range(len(x.axes)))
    return f"{x.name} * (torch.arange({w.size('j')}) < {w.size('j')} - 1).view({sizes})"


def _wrong_bool(w: Writer, x: Var) -> str:
    """An additive mask cast to bool: true means masked."""
    mask = w.input("additive", (("b",), ("j",)), "torch.zeros({shape}).masked_fill(torch.rand({shape}) > 0.5, -1e9)")
    return f'{x.name}.masked_fill(~{w.fitted(mask, x.axes).name}.to(torch.bool), float("-inf"))'


def _over(letter: str, text: str) -> Change:
    return lambda w, x: text.format(x=x.name, a=x.axis(letter), n=w.size((letter,)))


MUTATIONS: dict[str, Mutation] = {
    "softmax over queries": Mutation("axis", "i"),
    "softmax over heads": Mutation("axis", "g", lambda s: s.heads > 1),
    "softmax over batch": Mutation("axis", "b", lambda s: s.batch > 1),
    "keys rolled over the batch": Mutation("key", _roll("b"), lambda s: s.batch > 1),
    "keys with batch and heads swapped": Mutation("key", _swap("b", "g"), lambda s: s.batch == s.heads > 1),
    "keys not transposed": Mutation("key", _swap("j", "d"), lambda s: s.keys == s.width > 1),
    "keys with heads and keys swapped": Mutation("key", _swap("g", "j"), lambda s: s.heads == s.keys > 1),
    "keys summed up": Mutation("key", _over("j", "{x}.cumsum({a})")),
    "queries flipped": Mutation("query", _flip("i"), lambda s: s.queries > 1),
    "values rolled over heads": Mutation("value", _roll("g"), lambda s: s.heads > 1),
    "values flipped over keys": Mutation("value", _flip("j"), lambda s: s.keys > 1),
    "values with batch and heads swapped": Mutation("value", _swap("b", "g"), lambda s: s.batch == s.heads > 1),
    "values with keys and width swapped": Mutation("value", _swap("j", "e"), lambda s: s.keys == s.value_width > 1),
    "scores transposed": Mutation("scores", _swap("i", "j"), _square),
    "scores and their transpose": Mutation(
        "scores", lambda w, x: f"{x.name} + {x.name}.transpose({x.axis('i')}, {x.axis('j')})", _square
    ),
    "scores flipped": Mutation("scores", _flip("j"), lambda s: s.keys > 1),
    "scores squared": Mutation("scores", "{x} * {x}"),
    "relu of the scores": Mutation("scores", "{x}.relu()"),
    "scores rounded": Mutation("scores", "{x}.round()"),
    "scores detached": Mutation("scores", "{x}.detach()"),
    "scale a query": Mutation("scores", _gate("i")),
    "scale a key": Mutation("scores", _gate("j")),
    "scale a head": Mutation("scores", _gate("h")),
    "scale each score": Mutation("scores", _gate("ij")),
    "heads mixed before the softmax": Mutation("logits", _mixed, lambda s: s.heads > 1),
    "logits summed up": Mutation("logits", _over("j", "{x}.cumsum({a})")),
    "logits minus their mean": Mutation("logits", _over("j", "{x} - {x}.mean({a}, keepdim=True)")),
    "logits minus the mean of queries": Mutation("logits", _over("i", "{x} - {x}.mean({a}, keepdim=True)")),
    "logits sorted": Mutation("logits", _over("j", "{x}.sort({a})[0]")),
    "logits below the mean masked": Mutation(
        "logits", _over("j", '{x}.masked_fill({x} < {x}.mean({a}, keepdim=True), float("-inf"))')
    ),
    "logits rolled over keys": Mutation("logits", _roll("j"), lambda s: s.keys > 1),
    "additive mask cast to bool": Mutation("logits", _wrong_bool),
    "logits clamped": Mutation("logits", "{x}.clamp(-1.0, 1.0)"),
    "relu of the weights": Mutation("weights", "{x}.relu()"),
    "softmax twice": Mutation("weights", _over("j", "{x}.softmax({a})")),
    "weights transposed": Mutation("weights", _swap("i", "j"), _square),
    "weights gated": Mutation("weights", _gate("ij")),
    "weights gated by keys": Mutation("weights", _gate("bj")),
    "weights gated by queries": Mutation("weights", _gate("i")),
    "weights gated by heads": Mutation("weights", _gate("h")),
    "weights squared": Mutation("weights", "{x} * {x}"),
    "weights doubled": Mutation("weights", "{x} * 2.0"),
    "weights shifted": Mutation("weights", "{x} + 0.1"),
    "weights rolled over keys": Mutation("weights", _roll("j"), lambda s: s.keys > 1),
    "weights rolled over heads": Mutation("weights", _roll("g"), lambda s: s.heads > 1),
    "weights flipped over queries": Mutation("weights", _flip("i"), lambda s: s.queries > 1),
    "weights of other heads": Mutation("weights", _mixed, lambda s: s.heads > 1),
    "weights of keys that are left out": Mutation("weights", _slice_keys),
    "weights detached": Mutation("weights", "{x}.detach()"),
    "weights divided by their sum over queries": Mutation("weights", _over("i", "{x} / {x}.sum({a}, keepdim=True)")),
    "weights divided by their sum over keys": Mutation("weights", _over("j", "{x} / {x}.sum({a}, keepdim=True)")),
    "weights without the small ones": Mutation("weights", "torch.where({x} > 0.3, {x}, 0.0)"),
    "weights written": Mutation("weights", lambda w, x: _written(w, x)),
    "weights all dropped": Mutation("weights", "F.dropout({x}, 1.0, training=True)"),
    "output all dropped": Mutation("output", "F.dropout({x}, 1.0, training=True)"),
    "output squared": Mutation("output", "{x} * {x}"),
    "output summed over queries": Mutation("output", _over("i", "{x}.cumsum({a})")),
    "values of each query": Mutation("values", "queries", _plain_square),
    "sum over queries": Mutation("values", "sum", _plain_square),
    "sum over heads as well": Mutation("values", "heads", lambda s: s.heads > 1 and s.group == 1),
}


def fitting(program: Program) -> list[str]:
    """The mutations that a program of these sizes can have."""
    return [name for name, mutation in MUTATIONS.items() if mutation.fits(program.sizes)]


def apply(w: Writer, place: str, x: Var) -> Var:
    """``x`` after the program's mutation where it acts here."""
    mutation = MUTATIONS.get(w.program.mutation)
    if mutation is None or mutation.place != place:
        return x
    if not mutation.fits(w.program.sizes):
        raise Unspellable(w.program.mutation)
    x = w.unfolded(x)
    change = mutation.change
    return w.var(x.name, change.format(x=x.name) if isinstance(change, str) else change(w, x), x.axes)


def softmax_letter(w: Writer) -> str:
    """What the softmax runs over: j, but for the mutations that change that."""
    mutation = MUTATIONS.get(w.program.mutation)
    if mutation is None or mutation.place != "axis":
        return "j"
    if not mutation.fits(w.program.sizes):
        raise Unspellable(w.program.mutation)
    return str(mutation.change)


def values(w: Writer, weights: Var, v: Var) -> Var | None:
    """The contraction with the values where the program's mutation is a wrong one."""
    mutation = MUTATIONS.get(w.program.mutation)
    if mutation is None or mutation.place != "values":
        return None
    if not mutation.fits(w.program.sizes):
        raise Unspellable(w.program.mutation)
    p, v = w.unfolded(weights), w.unfolded(v)
    batch = [(letter,) for letter in w.program.batch]
    if mutation.change == "queries":  # sum_j p_ij v_i
        v = Var(v.name, tuple(("i",) if axis == ("j",) else axis for axis in v.axes))
        return w.einsum(p, v, (*batch, ("g",), ("i",), ("e",)), "o")
    if mutation.change == "sum":  # sum_i p_ij v_i, at each j
        v = Var(v.name, tuple(("i",) if axis == ("j",) else axis for axis in v.axes))
        out = w.einsum(p, v, (*batch, ("g",), ("j",), ("e",)), "o")
        return Var(out.name, tuple(("i",) if axis == ("j",) else axis for axis in out.axes))
    out = w.einsum(p, v, (*batch, ("i",), ("e",)), "o")
    axes: Axes = (*batch, ("g",), ("i",), ("e",))
    sizes = ", ".join(w.size(axis) for axis in axes)
    return w.var("o", f"{out.name}[{', '.join([':'] * len(batch))}, None].expand({sizes})", axes)


def _written(w: Writer, x: Var) -> str:
    copied = w.let("p", f"{x.name}.clone()")
    w.line(f"{copied}.select({x.axis('j')}, 0).zero_()")
    return copied
