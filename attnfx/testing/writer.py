"""The writer: lines of torch code, and tensors whose axes have names, so that any layout can be spelled from any other."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnfx.testing.program import Program

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Var:
    """A tensor of the program: its name, and the letters folded into each axis, () for an axis of size one."""

    name: str
    axes: Axes

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(letter for axis in self.axes for letter in axis)

    def axis(self, letter: str) -> int:
        """Which axis is ``letter`` alone. Raises ValueError where none is."""
        return self.axes.index((letter,))


def layout(text: str, heads: str) -> Axes:
    """ "(b h) i d" as axes; h becomes the letters of ``heads``."""
    axes: list[tuple[str, ...]] = []
    folded: list[str] | None = None
    for word in text.replace("(", "( ").replace(")", " )").split():
        if word == "(":
            folded = []
        elif word == ")":
            axes.append(tuple(folded or ()))
            folded = None
        else:
            letters = list(heads) if word == "h" else [] if word == "1" else [word]
            if folded is None:
                axes.append(tuple(letters))
            else:
                folded += letters
    return tuple(axes)


class Writer:
    """Collects the body of a program and its inputs. Small choices come from ``style``; 0 takes the first of everything."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lines: list[str] = []
        self.inputs: dict[str, str] = {}
        self.used: dict[str, int] = {}
        self.sized: dict[str, str] = {}
        self.style = random.Random(program.style) if program.style else None
        self.shapes: dict[str, Axes] = {}

    # Names, lines, sizes

    def pick(self, *options: str) -> str:
        return options[0] if self.style is None else self.style.choice(options)

    def flip(self) -> bool:
        return self.style is not None and self.style.random() < 0.5

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, name: str, expression: str) -> str:
        """A fresh variable of about that name."""
        self.used[name] = count = self.used.get(name, 0) + 1
        fresh = name if count == 1 else f"{name}{count}"
        self.line(f"{fresh} = {expression}")
        return fresh

    def var(self, name: str, expression: str, axes: Axes) -> Var:
        return Var(self.let(name, expression), axes)

    def input(self, name: str, axes: Axes, made: str = "") -> Var:
        """An input with these axes; ``made`` is its value with {shape} for the sizes, by default normal numbers."""
        self.used[name] = count = self.used.get(name, 0) + 1
        fresh = name if count == 1 else f"{name}{count}"
        shape = ", ".join(str(self.number(axis)) for axis in axes)
        made = made or "torch.randn({shape}).to(dtype)"
        self.inputs[fresh] = made.replace("{shape}", shape)
        self.shapes[fresh] = axes
        return Var(fresh, axes)

    def number(self, axis: Iterable[str]) -> int:
        product = 1
        for letter in axis:
            product *= 3 if letter == "x" else self.program.sizes.of(letter)
        return product

    def size(self, axis: Iterable[str]) -> str:
        """The size of an axis as code: a number, or a product of names where sizes are read from tensors."""
        axis = tuple(axis)
        names = [self.sized[letter] for letter in axis if letter in self.sized]
        rest = self.number(letter for letter in axis if letter not in self.sized)
        return " * ".join(names + ([str(rest)] if rest != 1 or not names else []))

    def read_sizes(self) -> None:
        """Names for the sizes that an axis of an input tells."""
        names = {"b": "B", "w": "W", "g": "G", "i": "M", "j": "N"}
        for tensor, axes in self.shapes.items():
            for k, axis in enumerate(axes):
                if len(axis) == 1 and axis[0] in names and axis[0] not in self.sized:
                    self.sized[axis[0]] = names[axis[0]]
                    self.line(f"{names[axis[0]]} = {tensor}.{self.pick('shape[{}]', 'size({})').format(k)}")

    def sizes(self, axes: Axes) -> str:
        texts = [self.size(axis) for axis in axes]
        free = [k for k, text in enumerate(texts) if not (self.sized and text.isdigit())]
        if free and self.flip() and self.number(letter for axis in axes for letter in axis):
            texts[free[int(self.style.random() * len(free))] if self.style else 0] = "-1"
        return ", ".join(texts)

    # Layouts

    def arrange(self, x: Var, target: Axes, name: str = "") -> Var:
        """``x`` with the axes of ``target``, which has the same letters."""
        whole = [axis for axis in x.axes if axis]
        wanted = [axis for axis in target if axis]
        if sorted(whole) != sorted(wanted):
            x = self.unfolded(x, name)
            wanted = [(letter,) for axis in target for letter in axis]
        elif len(whole) != len(x.axes):
            x = self.reshaped(x, tuple(whole), name)
        x = self.permuted(x, tuple(wanted), name)
        return x if x.axes == target else self.reshaped(x, target, name)

    def unfolded(self, x: Var, name: str = "") -> Var:
        axes: Axes = tuple((letter,) for axis in x.axes for letter in axis)
        if axes == x.axes:
            return x
        folded = [k for k, axis in enumerate(x.axes) if len(axis) != 1]
        if len(folded) == 1 and len(x.axes[folded[0]]) > 1 and self.flip():
            sizes = ", ".join(self.size((letter,)) for letter in x.axes[folded[0]])
            return self.var(name or x.name, f"{x.name}.unflatten({folded[0] - self.wrap(len(x.axes))}, ({sizes}))", axes)
        return self.reshaped(x, axes, name)

    def wrap(self, rank: int) -> int:
        return rank if self.flip() else 0

    def reshaped(self, x: Var, axes: Axes, name: str = "") -> Var:
        """Folds, unfolds and axes of size one; the letters keep their order."""
        if axes == x.axes:
            return x
        added = [k for k, axis in enumerate(axes) if axis == ()]
        if tuple(axis for axis in axes if axis) == x.axes:
            if len(added) == 1 and self.flip():
                return self.var(name or x.name, f"{x.name}.unsqueeze({added[0]})", axes)
            return self.var(name or x.name, f"{x.name}[{', '.join('None' if a == () else ':' for a in axes)}]", axes)
        how = self.pick("{x}.reshape({s})", "{x}.contiguous().view({s})", "torch.reshape({x}, ({s},))", "{x}.reshape({s})")
        return self.var(name or x.name, how.format(x=x.name, s=self.sizes(axes)), axes)

    def permuted(self, x: Var, axes: Axes, name: str = "") -> Var:
        if axes == x.axes:
            return x
        order = [x.axes.index(axis) for axis in axes]
        rank = len(order)
        moved = [k for k, at in enumerate(order) if at != k]
        ways = [f"{x.name}.permute({', '.join(map(str, order))})", f"torch.permute({x.name}, ({', '.join(map(str, order))}))"]
        if len(moved) == 2:
            a, b = (k - self.wrap(rank) for k in moved)
            ways = [f"{x.name}.transpose({a}, {b})", f"{x.name}.swapaxes({a}, {b})", f"torch.transpose({x.name}, {b}, {a})", *ways]
            if moved == [rank - 2, rank - 1]:
                ways += [f"{x.name}.mT", f"{x.name}.transpose(-1, -2)"]
        return self.var(name or x.name, self.pick(*ways), axes)

    def fitted(self, x: Var, axes: Axes, name: str = "") -> Var:
        """``x``, which has some of the letters, made to broadcast against ``axes``."""
        x = self.unfolded(x, name)
        has = set(x.letters)
        order: Axes = tuple((letter,) for axis in axes for letter in axis if letter in has)
        x = self.permuted(x, order, name)
        partial = [axis for axis in axes if has.intersection(axis) and not has.issuperset(axis)]
        if partial:
            spread: Axes = tuple((letter,) if has.issuperset((letter,)) else () for axis in axes for letter in axis
                                 if has.intersection(axis))  # fmt: skip
            full: Axes = tuple((letter,) for axis in axes for letter in axis if has.intersection(axis))
            x = self.reshaped(x, spread, name)
            x = self.var(name or x.name, f"{x.name}.expand({', '.join(self.size(axis) for axis in full)})", full)
            has |= set(x.letters)
        wanted: Axes = tuple(axis if has.issuperset(axis) and axis else () for axis in axes)
        while wanted and wanted[0] == () and not self.flip():
            wanted = wanted[1:]
        folded = tuple(axis for axis in wanted if axis)
        if folded != x.axes:
            x = self.reshaped(x, folded, name)
        return x if wanted == x.axes else self.reshaped(x, wanted, name)

    def einsum(self, left: Var, right: Var, out: Axes, name: str) -> Var:
        """The contraction of two tensors over the letters that ``out`` lacks, folded axes as one letter."""
        letters: dict[tuple[str, ...], str] = {}
        free = list("abcdefghijklmnopqrstuvwxyz")
        if self.style is not None:
            self.style.shuffle(free)
        for axis in (*left.axes, *right.axes):
            letters.setdefault(axis, free[len(letters)])
        texts = ["".join(letters[axis] for axis in axes) for axes in (left.axes, right.axes, out)]
        return self.var(name, f'torch.einsum("{texts[0]}, {texts[1]} -> {texts[2]}", {left.name}, {right.name})', out)


def same_letters(a: Sequence[str], b: Sequence[str]) -> bool:
    return sorted(a) == sorted(b)
