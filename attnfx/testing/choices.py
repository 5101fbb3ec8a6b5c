"""Random programs: one description of what may be chosen, drawn by a seeded source or by hypothesis' search."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from attnfx.testing.mutations import fitting
from attnfx.testing.program import Bias, Mask, Output, Program, Scale, Scores, Sizes, Softmax, Storage

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

T = TypeVar("T")


class Choose(Protocol):
    """A source of choices. Options come with the plainest first, since that is what a search shrinks towards."""

    def pick(self, options: Sequence[Any]) -> Any: ...

    def number(self, low: int, high: int) -> int: ...


class Seeded:
    """Choices of a seed: the same program for the same seed, everywhere."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random.random() * len(options))]

    def number(self, low: int, high: int) -> int:
        return low + int(self.random.random() * (high - low + 1))


class _Drawn:
    """Choices that hypothesis makes, remembers and shrinks."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.number(0, len(options) - 1)]

    def number(self, low: int, high: int) -> int:
        from hypothesis import strategies

        return int(self.draw(strategies.integers(low, high)))


def programs(*, mutated: bool = False) -> SearchStrategy[Program]:
    """A hypothesis strategy of programs: exact attentions, or attentions broken by one mutation. Needs hypothesis."""
    from hypothesis import strategies

    return strategies.composite(lambda draw: choose_program(_Drawn(draw), mutated=mutated))()


def seeded_program(seed: int | str, *, mutated: bool = False) -> Program:
    """The program of a seed."""
    return choose_program(Seeded(seed), mutated=mutated)


def choose_program(c: Choose, *, mutated: bool = False) -> Program:
    """One program: an exact attention, or one that a mutation breaks."""
    if not mutated and c.number(0, 29) == 29:
        return _multi_head(c)
    program = _plain(c, mutated)
    return program.replace(mutation=c.pick(fitting(program))) if mutated else program


def _plain(c: Choose, mutated: bool) -> Program:
    dtype = c.pick(("float32",) * 9 + ("float64", "float16", "bfloat16"))
    sizes = _sizes(c, square=mutated and c.pick((True, False, False)))
    how = c.pick(
        ("matmul",) * 4 + ("einsum",) * 3 + ("bmm", "bmm", "baddbmm", "baddbmm", "mulsum") + (() if mutated else ("sdpa",) * 4)
    )
    storage = _storage(c, sizes)
    if storage.packed != "no":
        sizes = dataclasses.replace(sizes, group=1, windows=0, keys=sizes.queries, value_width=sizes.width)
    upcast = c.pick(("none", "none", "dtype", "float")) if dtype != "float64" else "none"
    inplace = not mutated and c.pick((False,) * 4 + (True,))
    program = Program(
        sizes=sizes,
        dtype=dtype,
        storage=storage,
        scores=Scores(
            how=how,
            lead=_lead(c, sizes),
            keys_first=how not in ("sdpa", "mulsum") and c.pick((False,) * 5 + (True,)),
            scale=_scale(c, how),
            softcap=c.pick((0.0,) * 5 + (2.0, 30.0)) if how != "sdpa" else 0.0,
            product=c.pick(("own",) * 5 + ("float",)) if how not in ("sdpa", "baddbmm") and dtype != "float64" else "own",
            repeat=c.pick(("expand", "interleave", "broadcast", "native")),
        ),
        terms=tuple(_term(c, dtype) for _ in range(c.pick((0, 1, 1, 1, 2, 2, 3)))),
        softmax=Softmax(c.pick(("method", "functional", "torch") * 3 + ("module", "exp_max", "exp", "log")),
                        upcast, c.pick((False,) * 5 + (True,))),
        output=Output(
            how=c.pick(("mulsum", "matmul") if how == "mulsum" else ("matmul",) * 3 + ("einsum",) * 2 + ("bmm",) * 2 + ("mulsum",)),
            lead=_lead(c, sizes),
            tail=_tail(c, sizes),
            linear=c.pick((False,) * 4 + (True,)),
            extra=() if mutated else c.pick(((),) * 8 + (("cache",), ("cache",), ("scores",), ("weights",), ("sums",))),
        ),
        inplace=inplace,
        shapes=c.pick((False, True)),
        style=c.number(0, 10**6) if c.pick((True, True, True, False)) else 0,
        seed=c.number(0, 1000),
    )  # fmt: skip
    if program.softmax.how == "exp" and (mutated or storage.packed == "linear"):
        # exp of a score above 88 is infinite, and eager's quotient NaN, where no maximum is taken off
        program = program.replace(softmax=dataclasses.replace(program.softmax, how="exp_max"))
    return program


def _multi_head(c: Choose) -> Program:
    """A call of multi_head_attention_forward, with what masks it takes."""
    kinds = c.pick(((), ("causal",), ("lengths",), ("triu", "lengths"), ("bias",), ("window",)))
    hows = ("masked_fill", "add") if kinds and kinds[-1] != "lengths" else ("masked_fill",)
    terms = tuple(Bias("data", "i j", c.pick((True, False))) if kind == "bias" else Mask(kind, c.pick(hows)) for kind in kinds)
    sizes = dataclasses.replace(_sizes(c, square=False), windows=0, group=1)
    return Program(sizes=sizes, dtype=c.pick(("float32", "float32", "float64", "bfloat16")), scores=Scores(how="mha"), terms=terms,
                   style=c.number(0, 10**6), seed=c.number(0, 1000))  # fmt: skip


def _sizes(c: Choose, square: bool) -> Sizes:
    """Odd sizes, ones, and sizes that equal each other, which is where axes are mistaken for one another."""
    if square:
        n = c.pick((2, 3, 4))
        return Sizes(batch=n, heads=n, queries=n, keys=n, width=n, value_width=n)
    batch, heads = c.pick((2, 1, 3, 2)), c.pick((2, 1, 3, 2, 4))
    queries = c.pick((3, 5, 2, 7, 4, 1))
    keys = c.pick((queries, queries, queries, 4, 5, 9, 1, 6))
    width = c.pick((2, 4, 3, 1, 8, queries))
    return Sizes(
        batch=batch,
        windows=c.pick((0,) * 7 + (2, 3)),
        heads=heads,
        group=c.pick((1, 1, 1, 2, 3)),
        queries=queries,
        keys=keys,
        width=width,
        value_width=c.pick((width, width, width, 5, 1)),
    )


def _storage(c: Choose, sizes: Sizes) -> Storage:
    packed = c.pick(("no",) * 6 + ("chunk", "split", "unbind", "index", "same", "linear", "inner"))
    if packed != "no":
        return Storage(packed=packed)
    plain = ("b h {} {}", "b {0} h {1}", "{0} b h {1}", "(b h) {} {}", "h b {} {}", "b {0} (h {1})", "b h {1} {0}")
    windowed = ("b w h {} {}", "b w {0} h {1}", "(b w) h {} {}", "b h w {} {}", "(b w h) {} {}", "w b {0} (h {1})")
    forms = windowed if sizes.windows else plain
    q = c.pick(forms)
    k = c.pick((q, q, c.pick(forms)))
    v = c.pick((k, k, c.pick(forms)))
    return Storage(q.format("i", "d"), k.format("j", "d"), v.format("j", "e"))


def _lead(c: Choose, sizes: Sizes) -> str:
    leads = ["b h", "b h", "(b h)", "h b"]
    if sizes.windows:
        leads = ["b w h", "(b w) h", "b h w", "(b w h)"]
    if sizes.group > 1:
        leads += ["b w g r"] if sizes.windows else ["b g r", "b g r", "g r b"]
    return str(c.pick(leads))


def _tail(c: Choose, sizes: Sizes) -> str:
    if sizes.windows:
        return str(c.pick(("b w h i e", "b w i (h e)", "(b w) i h e", "b w i h e", "b (w i) (h e)")))
    return str(c.pick(("b h i e", "b i (h e)", "b i h e", "i b (h e)", "(b h) i e", "(b i) (h e)", "b h e i", "(b h i) e")))


def _scale(c: Choose, how: str) -> Scale:
    value = c.pick((0.5, 0.25, 0.35, 1.25))
    if how == "sdpa":
        return Scale(c.pick(("none", "scores")), "mul", value)
    if how == "baddbmm":
        return Scale("alpha", "mul", value)
    places = ("none", "scores", "scores", "scores", "query", "query", "key", "both", "after", "tensor", "input", "heads")
    return Scale(c.pick(places), c.pick(("mul", "div", "root")), value)


def _term(c: Choose, dtype: str) -> Bias | Mask:
    if c.pick((True, False)):
        kind = c.pick(("causal", "data", "tril", "triu", "bottom", "window", "band", "prefix", "lengths", "documents"))
        how = c.pick(("masked_fill", "where", "add", "multiply"))
        fills = ["-inf", "min", "-1e4"] + (["-1e9"] if dtype != "float16" else [])
        fill = c.pick(fills[1:] if how == "multiply" else fills)
        letters = c.pick(("i j", "b j", "b h i j", "b i j", "h i j", "j")) if kind == "data" else "i j"
        return Mask(kind, how, fill, letters, empty=c.pick((False,) * 5 + (True,)))
    kind = c.pick(
        (
            "data",
            "data",
            "data",
            "table",
            "embedding",
            "sliced",
            "alibi",
            "alibi_columns",
            "alibi_absolute",
            "t5",
            "distance",
            "constant",
        )
    )
    letters = c.pick(("i j", "h i j", "b h i j", "b j", "j", "b i j", "h j", "i", "b h i")) if kind == "data" else "i j"
    return Bias(kind, letters, c.pick((True, True, False)))
