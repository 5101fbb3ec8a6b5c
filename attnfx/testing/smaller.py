"""Making a failing program small: every part goes back to its plainest value where the program still fails the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from attnfx.testing.program import Bias, Mask, Program, Unspellable
from attnfx.testing.spelling import source


def shrink(program: Program, fails: Callable[[Program], bool], *, attempts: int = 200) -> Program:
    """The smallest program found that still ``fails``, trying at most ``attempts`` smaller ones."""
    left = attempts
    progress = True
    while progress and left > 0:
        progress = False
        for smaller in _smaller(program):
            if left <= 0:
                break
            if not _spellable(smaller):
                continue
            left -= 1
            if fails(smaller):
                program, progress = smaller, True
                break
    return program


def _spellable(program: Program) -> bool:
    try:
        source(program)
    except (Unspellable, ValueError, KeyError):
        return False
    return True


def _smaller(program: Program) -> Iterator[Program]:
    """Programs one step plainer."""
    for k in range(len(program.terms)):
        yield program.replace(terms=program.terms[:k] + program.terms[k + 1 :])
    yield from _plainer(program, "style", 0)
    for name in ("output", "scores", "softmax", "storage", "sizes"):
        part = getattr(program, name)
        if part != type(part)():
            yield program.replace(**{name: type(part)()})
        for changed in _fields(part):
            yield program.replace(**{name: changed})
    for k, term in enumerate(program.terms):
        for changed in _fields(term):
            yield program.replace(terms=(*program.terms[:k], changed, *program.terms[k + 1 :]))
    for name, plain in (("inplace", False), ("shapes", False), ("dtype", "float32"), ("seed", 0)):
        yield from _plainer(program, name, plain)
    if program.style:
        for style in range(1, 4):
            yield from _plainer(program, "style", style)


def _plainer(program: Program, name: str, plain: object) -> Iterator[Program]:
    if getattr(program, name) != plain and not (name == "style" and plain and program.style <= 3):
        yield program.replace(**{name: plain})


def _fields(part: Any) -> Iterator[Any]:
    """The same with one field at its default, or a size less by one."""
    for field in dataclasses.fields(part):
        now = getattr(part, field.name)
        plain = field.default if field.default is not dataclasses.MISSING else type(now)()
        if dataclasses.is_dataclass(now):
            for changed in _fields(now):
                yield dataclasses.replace(part, **{field.name: changed})
        elif now != plain and not (isinstance(part, Mask | Bias) and field.name == "letters"):
            yield dataclasses.replace(part, **{field.name: plain})
            if isinstance(now, int) and not isinstance(now, bool) and now > 1:
                yield dataclasses.replace(part, **{field.name: now - 1})
