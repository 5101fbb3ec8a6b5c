"""Many programs: one seed gives the same programs everywhere; what was matched, refused and wrong is counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

import torch

from attnfx.testing.choices import seeded_program
from attnfx.testing.judge import Verdict, check
from attnfx.testing.mutations import MUTATIONS
from attnfx.testing.program import Mask, Program, Unspellable
from attnfx.testing.smaller import shrink
from attnfx.testing.spelling import source

CHUNK = 50


@dataclass(frozen=True)
class Failure:
    """A program that went wrong: its number under the seed, what is wrong, and runnable source of the smallest form found."""

    number: int
    what: str
    source: str


@dataclass
class Tally:
    """Counts over programs; tallies of parts add up with :meth:`update`."""

    programs: int = 0
    matched: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def update(self, other: Tally) -> None:
        self.programs += other.programs
        self.matched.update(other.matched)
        self.seen.update(other.seen)
        self.reasons.update(other.reasons)
        self.failures += other.failures

    def share(self, what: str) -> float:
        """The share of programs with a property that were matched, NaN where there is none."""
        return self.matched[what] / self.seen[what] if self.seen[what] else float("nan")


def program_of(seed: int, number: int) -> Program:
    """Program ``number`` of a seed; every third is a mutation, and the mutations take turns where sizes allow."""
    program = seeded_program(f"{seed}/{number}", mutated=number % 3 == 2)
    if program.mutation:
        wanted = list(MUTATIONS)[number // 3 % len(MUTATIONS)]
        if MUTATIONS[wanted].fits(program.sizes):
            return program.replace(mutation=wanted)
    return program


def through_dynamo(number: int, every: int) -> bool:
    """Whether a program goes through torch.compile: every so many, with size symbols every second time."""
    return bool(every) and number % every == every - 1


def examine(seed: int, numbers: range, *, dynamo_every: int = 10, minimize: bool = True) -> Tally:
    """The tally of some programs of a seed."""
    torch.set_num_threads(1)
    tally = Tally()
    for number in numbers:
        program = program_of(seed, number)
        how = partial(check, dynamo=through_dynamo(number, dynamo_every), dynamic=_dynamic(program, number, dynamo_every))
        try:
            verdict = how(program)
        except Unspellable:
            continue
        _count(tally, program, verdict)
        if verdict.failure:
            tally.failures.append(_failure(seed, number, program, verdict, how if minimize else None))
    return tally


def _dynamic(program: Program, number: int, every: int) -> bool:
    return bool(every and program.shapes and number // every % 2)


def _count(tally: Tally, program: Program, verdict: Verdict) -> None:
    tally.programs += 1
    for name in properties(program):
        tally.seen[name] += 1
        tally.matched[name] += verdict.matched
    if not (verdict.matched or program.mutation or verdict.failure or program.sizes.keys == 1):
        tally.reasons[kind_of(verdict.reasons[0]) if verdict.reasons else "nothing was taken for an attention"] += 1


def properties(program: Program) -> Iterator[str]:
    """What a program is counted under."""
    if program.mutation:
        yield "mutated"
        yield f"mutation: {program.mutation}"
        return
    if program.sizes.keys == 1:
        yield "a single key: its weight is always 1"
        return
    yield "exact"
    yield f"scores: {program.scores.how}"
    yield f"dtype: {program.dtype}"
    if program.scores.how not in ("sdpa", "mha"):
        yield f"values: {program.output.how}"
        yield f"softmax: {program.softmax.how}"
        yield f"scale: {program.scores.scale.where}"
    for term in {(type(t).__name__.lower(), t.kind) for t in program.terms}:
        yield ": ".join(term)
    yield from {f"fill: {t.how} {t.fill}" for t in program.terms if isinstance(t, Mask)}
    yield f"terms: {len(program.terms)}"
    for extra in program.output.extra:
        yield f"also returned: {extra}"
    if program.sizes.group > 1:
        yield f"groups: {program.scores.repeat}"
    if program.inplace:
        yield "in place"
    if program.storage.packed != "no":
        yield f"packed: {program.storage.packed}"


def kind_of(text: str) -> str:
    """A reason without what is particular to one program: numbers, and formulas after "used as"."""
    text = re.sub(r" is used as .*?; ", " is used otherwise; ", text, flags=re.DOTALL)
    text = re.sub(r"\b([a-z_]+?)_?\d+\b", r"\1", text)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", text)[:200]


def _failure(seed: int, number: int, program: Program, verdict: Verdict, how: Callable[[Program], Verdict] | None) -> Failure:
    if how is not None:
        program = shrink(program, partial(_fails_alike, how, kind_of(verdict.failure).split(":")[0]))
        verdict = how(program)
    return Failure(number, verdict.failure, runnable(program, f"seed {seed}, program {number}: {verdict.failure}"))


def _fails_alike(how: Callable[[Program], Verdict], kind: str, program: Program) -> bool:
    try:
        found = how(program).failure
    except Unspellable:
        return False
    return bool(found) and (
        kind_of(found).split(":")[0] == kind or (not kind.startswith(("crash", "the program")) and "off by" in found)
    )


def runnable(program: Program, title: str = "") -> str:
    """The program as a file to run: it compares attnfx with eager."""
    head = "".join(f"# {line}\n" for line in (title, str(program)) if line)
    return f"""{head}{source(program).code}

import attnfx

compiled = attnfx.compile(program, inner="eager", strict=True)
print(attnfx.explain(program, **inputs))
for ours, eager in zip(*(out if isinstance(out, tuple) else (out,) for out in (compiled(**inputs), program(**inputs)))):
    print((ours.double() - eager.double()).abs().max().item(), "apart; NaN:", int(ours.isnan().sum()), int(eager.isnan().sum()))
"""


def many(
    programs: int,
    seed: int = 0,
    workers: int = 1,
    *,
    first: int = 0,
    dynamo_every: int = 10,
    progress: Callable[[int, Tally], None] | None = None,
) -> Tally:
    """The tally of ``programs`` programs of a seed from number ``first`` on, spread over processes. A program depends on the seed
    and its number alone, so parts of a run add up to the whole. ``progress`` is called with each part."""
    total = Tally()
    end = first + programs
    parts = [range(at, min(at + CHUNK, end)) for at in range(first, end, CHUNK)]
    work = partial(examine, seed, dynamo_every=dynamo_every)
    for part, tally in zip(parts, _mapped(work, parts, workers), strict=True):
        total.update(tally)
        if progress is not None:
            progress(len(part), total)
    return total


def _mapped(work: Callable[[range], Tally], parts: list[range], workers: int) -> Iterator[Tally]:
    if workers <= 1:
        yield from map(work, parts)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, parts)
