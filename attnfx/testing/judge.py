"""Judging one program: eager in float64 and in its own type against the rewritten graph, in outputs, NaN and gradients."""

from __future__ import annotations

import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from attnfx.backend import attnfx, listeners, rewrite
from attnfx.options import Options
from attnfx.report import Report
from attnfx.testing.program import Bias, Mask, Program
from attnfx.testing.spelling import Source, source
from attnfx.testing.tracing import record

#: Error allowed relative to the largest value, by the program's type; gradients may have five times that.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Verdict:
    """What became of one program. ``sites`` are the formulas put in place, ``reasons`` why others were left, ``failure`` is what
    is wrong, or empty; ``invalid`` that the program itself does not run."""

    sites: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    failure: str = ""
    invalid: bool = False

    @property
    def matched(self) -> bool:
        return bool(self.sites)


@dataclass(frozen=True)
class Results:
    """Outputs of a run and the gradients of one number made from all of them."""

    outputs: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor | None]


def check(program: Program, *, dynamo: bool = False, dynamic: bool = False) -> Verdict:
    """Run the program in eager and under attnfx with strict errors, and compare everything.

    ``dynamo`` goes through ``torch.compile``; otherwise the graph is recorded from the eager run, an order of magnitude faster.
    ``dynamic`` leaves the sizes of batch, queries and keys open where the program reads them from tensors.
    Raises Unspellable where the tree stands for no program.
    """
    text = source(program)
    try:
        function, inputs = load(text)
        exact = {name: _exact(value) for name, value in inputs.items()}
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):  # the others lose the sum of a row whose maximum is a mask's
            truth = run(function, exact)
        torch.manual_seed(0)
        graph, outputs = (None, function(**inputs)) if dynamo else record(function, inputs)
        eager = results(outputs, inputs)
    except Exception as error:
        return Verdict(failure=f"the program does not run: {_first_line(error)}", invalid=True)
    try:
        if graph is None:
            ours, report = _compiled(function, inputs, text.free if dynamic else ())
        else:
            rewritten, report = rewrite(graph, Options(strict=True, inner="eager"))
            torch.manual_seed(0)
            ours = results(rewritten(*inputs.values()), inputs)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(failure=f"crash: {_first_line(error)} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})")
    if any(bool(o.isnan().any()) for o in truth.outputs):
        ours, eager = known_nan(program, ours, eager, truth)
    sites, reasons = tuple(str(s.site) for s in report.sites), tuple(m.reason for m in report.missed)
    overflows = program.softmax.how == "exp"
    failure = difference(ours, eager, truth, _tolerance(program), overflows=overflows)
    if failure:  # perhaps the program itself hangs on the last bit of its inputs
        moved = movement(function, exact, truth, program.dtype)
        failure = difference(ours, eager, truth, _tolerance(program), overflows=overflows, moved=moved)
    return Verdict(sites, reasons, failure)


def _tolerance(program: Program) -> float:
    """The error allowed: where no run is nearer to the truth than eager, two rounding steps of the lowest fill that is added and
    leaves something of the scores. Which sum is taken first decides them. No run is nearer in float64, and where the program
    itself makes its scores float32."""
    narrowed = program.scores.product == "float" or program.softmax.upcast == "float"
    eps = torch.finfo(torch.float32 if narrowed else torch.float64).eps
    if program.dtype not in ("float64", "float32") or (program.dtype == "float32" and not narrowed):
        return TOLERANCE[program.dtype]
    finite = [t for t in program.terms if isinstance(t, Mask) and t.fill.startswith("-1e")]
    added = [-float(t.fill) for t in finite if t.how in ("add", "multiply") or program.scores.how == "sdpa"]
    return max(TOLERANCE[program.dtype], *(2 * eps * fill for fill in added if eps * fill < 0.01), 0.0)


def load(text: Source) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function and the inputs that a program's source defines."""
    module = sys.modules["attention_program"] = types.ModuleType("attention_program")  # Dynamo imports it by name
    exec(compile(text.code, "<program>", "exec"), module.__dict__)
    return module.__dict__["program"], module.__dict__["inputs"]


def run(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Results:
    return results(function(**inputs), inputs)


def results(outputs: Any, inputs: Mapping[str, Any]) -> Results:
    """The outputs with the gradients of their weighted sum for every input that wants one."""
    found = tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    wanted = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    parts = [(o.double() * _weights(o)).sum() for o in found if o.requires_grad]
    if not parts or not wanted:
        return Results(found, {})
    total = torch.stack(parts).sum()
    return Results(found, dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), allow_unused=True), strict=True)))


def _weights(x: Tensor) -> Tensor:
    """Numbers that tell the elements of a result apart, none of them near zero."""
    n = torch.arange(x.numel(), dtype=torch.float64)
    return (torch.sin(n * 1.7 + 0.5) + torch.sign(torch.cos(n * 0.9)) * 0.5).reshape(x.shape)


def _exact(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _fills_both_ways(program: Program) -> bool:
    """Whether -inf is put in place by one mask and added by another: which gradients of a row without keys are NaN and which
    are zero then depends on the mask that hid each key, which a description of one mask does not tell."""
    ways = {term.how in ("masked_fill", "where") for term in program.terms if isinstance(term, Mask) and term.fill == "-inf"}
    put = program.mutation in ("additive mask cast to bool", "logits below the mean masked")
    return len(ways | ({True} if put else set())) == 2


def _biased_after_a_fill(program: Program) -> bool:
    """Whether a learned bias is added to scores in which a mask has already put -inf: autograd hands such a bias the NaN of a
    query without keys at every key, where the same bias added before the mask gets zeros. A description of one sum and one mask
    does not tell the two apart."""
    put = False
    for term in program.terms:
        put |= isinstance(term, Mask) and term.fill == "-inf" and term.how in ("masked_fill", "where")
        if put and isinstance(term, Bias) and term.kind != "constant":
            return True
    return False


def known_nan(program: Program, ours: Results, eager: Results, truth: Results) -> tuple[Results, Results]:
    """Both with zero gradients where queries without keys make NaN in one of them that the description does not tell of: for
    every input where -inf is put and added, and for biases alone, where eager is NaN in both types, where one follows -inf."""
    both, late = _fills_both_ways(program), _biased_after_a_fill(program)
    a, b = dict(ours.gradients), dict(eager.gradients)
    for name in a.keys() & b.keys():
        x, y, z = a[name], b[name], truth.gradients.get(name)
        if x is None or y is None or z is None or not x.shape == y.shape == z.shape or not (both or late):
            continue
        biased = late and name.rstrip("0123456789") in ("bias", "table", "slopes", "points")
        unknown = x.isnan() | y.isnan() if both else y.isnan() & z.isnan() & biased
        a[name], b[name] = x.masked_fill(unknown, 0.0), y.masked_fill(unknown, 0.0)
    return Results(ours.outputs, a), Results(eager.outputs, b)


def _compiled(function: Callable[..., Any], inputs: Mapping[str, Any], free: Sequence[tuple[str, int]]) -> tuple[Results, Report]:
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    for name, axis in free:
        torch._dynamo.maybe_mark_dynamic(inputs[name], axis)
    torch.manual_seed(0)
    try:
        compiled = torch.compile(
            function, backend=attnfx, dynamic=None if free else False, options={"inner": "eager", "strict": True}
        )
        return run(compiled, inputs), Report.merge(reports)
    finally:
        listeners.reset(token)


def movement(function: Callable[..., Any], exact: Mapping[str, Any], truth: Results, dtype: str) -> dict[str, float]:
    """How far the float64 results move, by name, when every input moves by one rounding step of the program's type: all of its
    elements away from zero, or some to and some from it."""
    farthest: dict[str, float] = {}
    for together in (True, False):
        step = torch.finfo(getattr(torch, dtype)).eps
        moved = {name: _moved(value, step, together) for name, value in exact.items()}
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):
            found = run(function, moved)
        for name, (a, b) in _by_name(found, truth).items():
            if a is not None and b is not None and a.shape == b.shape and a.numel():
                far = (a.detach() - b.detach()).double().abs().nan_to_num(0.0, 0.0, 0.0).max()
                farthest[name] = max(farthest.get(name, 0.0), float(far))
    return farthest


def _moved(value: Any, step: float, together: bool) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    signs = 1.0 if together else torch.sign(_weights(value)).to(value.dtype)
    return (value.detach() * (1 + step * signs)).requires_grad_(value.requires_grad)


def _by_name(a: Results, b: Results) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    outputs = {f"output {n}": pair for n, pair in enumerate(zip(a.outputs, b.outputs, strict=True))}
    return {**outputs, **{f"gradient of {name}": (a.gradients.get(name), b.gradients[name]) for name in b.gradients}}


def difference(
    ours: Results,
    eager: Results,
    truth: Results,
    tolerance: float,
    *,
    overflows: bool = False,
    moved: Mapping[str, float] | None = None,
) -> str:
    """How our results differ from eager's, or nothing.

    An element is right when it is close to eager in float64, or to eager in the program's own type: a fill such as -1e9 swallows
    scores in one type and not in another. Where eager itself is far from the truth, ours may be three times as far.
    Where an exponential without a maximum ``overflows``, eager has NaN and the truth a number: that number is right, too.
    ``moved``: how far each result moves with the last bit of the inputs (:func:`movement`); ours may be four times as far.
    """
    if len(ours.outputs) != len(eager.outputs):
        return f"{len(ours.outputs)} outputs instead of {len(eager.outputs)}"
    if overflows:
        eager = _mended(ours, eager, truth)
    pairs: list[tuple[str, Any, Any, Any, float]] = [
        (f"output {n}", *three, tolerance) for n, three in enumerate(zip(ours.outputs, eager.outputs, truth.outputs, strict=True))
    ]
    for name in eager.gradients:
        three = (ours.gradients.get(name), eager.gradients[name], truth.gradients.get(name))
        pairs.append((f"gradient of {name}", *three, 5 * tolerance))
    slack = moved or {}
    return next((text for pair in pairs if (text := _apart(*pair, slack=4 * slack.get(pair[0], 0.0)))), "")


def _mended(ours: Results, eager: Results, truth: Results) -> Results:
    """Eager's results, with the truth's elements where these and ours are finite and eager's are not."""

    def elements(mine: Tensor | None, own: Tensor | None, exact: Tensor | None) -> Tensor | None:
        if mine is None or own is None or exact is None or not mine.shape == own.shape == exact.shape:
            return own
        return torch.where(~own.isfinite() & exact.isfinite() & mine.isfinite(), exact.to(own.dtype), own)

    outputs = tuple(map(elements, ours.outputs, eager.outputs, truth.outputs))
    gradients = {name: elements(ours.gradients.get(name), own, truth.gradients.get(name)) for name, own in eager.gradients.items()}
    return Results(cast(tuple[Tensor, ...], outputs), gradients)


def _apart(what: str, ours: Tensor | None, eager: Tensor | None, truth: Tensor | None, tolerance: float, slack: float = 0.0) -> str:
    if ours is None or eager is None:
        return "" if ours is eager else f"{what}: eager has {'no' if eager is None else 'a'} gradient and the rewrite has not"
    if (ours.shape, ours.dtype) != (eager.shape, eager.dtype):
        return f"{what}: {ours.dtype} {list(ours.shape)} instead of {eager.dtype} {list(eager.shape)}"
    a, b = ours.detach().double(), eager.detach().double()
    c = b if truth is None else truth.detach().double()
    c = torch.where(c.isfinite(), c, b)
    if not torch.equal(a.isnan(), b.isnan()):
        return f"{what}: {int(a.isnan().sum())} NaN instead of {int(b.isnan().sum())}, of {a.numel()}"
    c = torch.where(b.isnan(), b, c)
    finite = b.isfinite() & c.isfinite()
    scale = float(torch.where(finite, c, 0.0).abs().max()) if c.numel() else 0.0
    own = torch.where(finite, (b - c).abs(), 0.0)
    allowed = max(tolerance * (1 + scale), 3 * float(own.max()) if own.numel() else 0.0, slack)
    close = ((a - c).abs() <= allowed) | ((a - b).abs() <= tolerance * (1 + scale)) | (a == b) | (a.isnan() & b.isnan())
    if bool(close.all()):
        return ""
    worst = float(torch.where(close, 0.0, (a - c).abs()).max())
    return f"{what}: off by {worst:.2e} where {allowed:.1e} is allowed, in {int((~close).sum())} of {close.numel()} elements"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
