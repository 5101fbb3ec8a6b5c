"""Generated attention programs: whatever is matched gives eager's results, and broken attentions do too."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch
from torch import Tensor

from attnfx.testing import Program, Unspellable, check, programs, seeded_program, shrink, source
from attnfx.testing.__main__ import main, summary
from attnfx.testing.bulk import Tally, examine, kind_of, many, program_of, runnable
from attnfx.testing.choices import choose_program
from attnfx.testing.judge import Results, difference, known_nan, load, movement, run
from attnfx.testing.mutations import MUTATIONS
from attnfx.testing.program import Bias, Mask, Output, Scale, Scores, Sizes, Softmax
from attnfx.testing.tracing import record

PARTS, EACH, SEED = 6, 250, 0
LEAST_MATCHED = 0.85
"""Of the exact programs of any part; raise it as recognition learns."""


@pytest.mark.parametrize("part", range(PARTS))
def test_no_program_goes_wrong(part: int) -> None:
    threads = torch.get_num_threads()
    try:
        tally = examine(SEED, range(part * EACH, (part + 1) * EACH), dynamo_every=25)
    finally:
        torch.set_num_threads(threads)
    assert not tally.failures, "\n\n".join(f.source for f in tally.failures)
    assert tally.programs > 0.9 * EACH
    assert tally.share("exact") >= LEAST_MATCHED, summary(tally)


def test_a_seed_is_the_same_programs_everywhere() -> None:
    assert [program_of(3, n) for n in range(30)] == [program_of(3, n) for n in range(30)]
    assert len({source(program_of(3, n)).code for n in range(30)}) > 25
    assert {bool(program_of(3, n).mutation) for n in (0, 1, 3, 4)} == {False}
    assert program_of(3, 2).mutation in MUTATIONS


def test_the_plainest_program_is_plain() -> None:
    body = source(Program()).function
    assert body.splitlines()[1:] == [
        "    k_t = k.transpose(2, 3)",
        "    s = q @ k_t",
        "    p = s.softmax(-1)",
        "    o = p @ v",
        "    return o",
    ]
    verdict = check(Program())
    assert (verdict.matched, verdict.failure) == (True, "")


@pytest.mark.skipif(importlib.util.find_spec("hypothesis") is None, reason="hypothesis is not installed")
def test_hypothesis_finds_and_shrinks_programs() -> None:
    import hypothesis

    quiet = hypothesis.settings(max_examples=200, database=None, deadline=None, derandomize=True)
    found = hypothesis.find(programs(), lambda p: p.softmax.how == "exp_max", settings=quiet)
    assert (found.softmax, found.terms, found.style, found.storage) == (Softmax("exp_max"), (), 0, Program().storage)
    assert hypothesis.find(programs(mutated=True), lambda p: bool(p.mutation), settings=quiet).mutation in MUTATIONS


def test_a_failing_program_is_made_small() -> None:
    failing = next(p for n in range(200) if (p := seeded_program(n)).scores.softcap and p.terms and p.style)
    small = shrink(failing, lambda p: bool(p.scores.softcap))
    assert small == Program(scores=Scores(softcap=failing.scores.softcap))


@pytest.mark.parametrize("number", [0, 1, 2, 4, 9])
def test_a_recorded_graph_is_dynamos(number: int) -> None:
    """The same operations in the same order, and the same sites."""
    program = program_of(11, number)
    function, inputs = load(source(program))
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=False)(**inputs)
    recorded, _ = record(function, inputs)

    def shapes(gm: torch.fx.GraphModule) -> Counter[object]:
        values = (n.meta.get("example_value") for n in gm.graph.nodes if n.op.startswith("call"))
        return Counter((v.dtype, tuple(v.shape)) for v in values if isinstance(v, Tensor))

    assert shapes(recorded) == shapes(graphs[0])
    assert check(program).sites == check(program, dynamo=True).sites


def test_size_symbols_go_through_dynamo() -> None:
    program = Program(shapes=True, terms=(Mask("causal"),), sizes=Sizes(queries=5, keys=5))
    verdict = check(program, dynamo=True, dynamic=True)
    assert verdict.failure == ""
    assert "=s" in verdict.sites[0], verdict


def test_trees_without_a_meaning_are_refused() -> None:
    with pytest.raises(Unspellable):
        source(Program(mutation="keys with batch and heads swapped", sizes=Sizes(batch=2, heads=3)))


WRONG = {
    "a value": lambda r: Results((r.outputs[0] + 1e-3, *r.outputs[1:]), r.gradients),
    "one element": lambda r: Results((r.outputs[0].index_fill(0, torch.tensor(0), 0.5),), r.gradients),
    "a NaN": lambda r: Results((r.outputs[0].index_fill(0, torch.tensor(0), float("nan")),), r.gradients),
    "a type": lambda r: Results((r.outputs[0].double(),), r.gradients),
    "a shape": lambda r: Results((r.outputs[0][None],), r.gradients),
    "no output": lambda r: Results((), r.gradients),
    "no gradient": lambda r: Results(r.outputs, {**r.gradients, "k": None}),
    "a gradient": lambda r: Results(r.outputs, {**r.gradients, "k": r.gradients["k"] * 1.01}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_way_to_be_wrong_is_seen(wrong: str) -> None:
    right = Results((torch.linspace(-1, 1, 12).reshape(3, 4),), {"q": torch.ones(2), "k": torch.linspace(0.1, 1, 6)})
    assert difference(right, right, right, 2e-5) == ""
    assert difference(WRONG[wrong](right), right, right, 2e-5)


def test_either_eager_is_right_where_the_type_decides() -> None:
    """A fill that swallows scores in one type and not in the other: each of the two results is accepted, a third is not."""
    own, exact, other = (Results((torch.full((4,), x),), {}) for x in (0.5, 0.5001, 0.52))
    assert difference(own, own, exact, 2e-5) == difference(exact, own, exact, 2e-5) == ""
    assert difference(other, own, exact, 2e-5)


def test_an_overflow_of_eager_is_judged_by_the_truth_alone() -> None:
    """Where an exponential overflows, a number in place of eager's NaN must be the truth, and elsewhere nothing changes."""
    nan = float("nan")
    own, exact = (Results((torch.tensor(x),), {"k": torch.tensor(x)}) for x in ([nan, 0.5, nan], [0.25, 0.5, nan]))
    assert difference(exact, own, exact, 2e-5, overflows=True) == ""
    assert difference(own, own, exact, 2e-5, overflows=True) == ""
    assert difference(exact, own, exact, 2e-5)
    for wrong in ([0.26, 0.5, nan], [nan, nan, nan], [0.25, 0.51, nan], [0.25, 0.5, 0.5]):
        off = Results((torch.tensor(wrong),), exact.gradients)
        assert difference(off, own, exact, 2e-5, overflows=True), wrong


def test_what_hangs_on_the_last_bit_may_be_as_far_off() -> None:
    """A softmax between scores in the hundreds moves by far more than the tolerance with the last bit of its inputs."""

    def function(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 300).softmax(-1) @ k

    torch.manual_seed(0)
    inputs = {name: torch.randn(4, 8, dtype=torch.float64, requires_grad=True) for name in ("q", "k")}
    truth = run(function, inputs)
    moved = movement(function, inputs, truth, "float32")
    assert set(moved) == {"output 0", "gradient of q", "gradient of k"}
    assert 0 < moved["output 0"] < 1e-3

    def off(factor: float) -> Results:
        return Results((truth.outputs[0] + factor * moved["output 0"],), truth.gradients)

    strict = 1e-3 * moved["output 0"]
    assert difference(off(3), truth, truth, strict)
    assert not difference(off(3), truth, truth, strict, moved=moved)
    assert difference(off(5), truth, truth, strict, moved=moved)


def test_only_known_nan_are_left_open() -> None:
    """Of a query without keys, a bias after a fill may lack eager's NaN; nothing else may, and no number may differ."""
    nan = float("nan")
    output = (torch.tensor([nan, 1.0]),)
    late = Program(terms=(Mask("data", fill="-inf", empty=True), Bias()))
    eager = Results(output, {"q": torch.tensor([nan, 1.0]), "bias": torch.tensor([nan, 1.0])})

    def judged(program: Program, **changed: Tensor) -> str:
        ours, own = known_nan(program, Results(output, {**eager.gradients, **changed}), eager, eager)
        return difference(ours, own, eager, 2e-5)

    assert judged(late, bias=torch.tensor([0.0, 1.0])) == ""
    assert judged(late, bias=torch.tensor([0.0, 1.1]))
    assert judged(late, bias=torch.tensor([0.0, nan]))
    assert judged(late, q=torch.tensor([0.0, 1.0]))
    assert judged(late.replace(terms=late.terms[::-1]), bias=torch.tensor([0.0, 1.0]))


def test_a_failure_is_a_file_that_runs() -> None:
    program = Program(scores=Scores(scale=Scale("scores")), terms=(Mask("window"),), output=Output(tail="b i (h e)"))
    code = runnable(program, "why")
    assert code.startswith("# why\n")
    compile(code, "failure", "exec")
    assert source(program).code in code


def test_reasons_are_counted_by_kind() -> None:
    assert kind_of("side tensor 3 needs it") == kind_of("side tensor 12 needs it")
    tally = Tally()
    tally.update(examine(5, range(4), dynamo_every=0))
    parts = many(2, 5, dynamo_every=0)
    parts.update(many(2, 5, first=2, dynamo_every=0))
    assert parts == tally
    alone = tally.seen["a single key: its weight is always 1"]
    assert tally.programs == tally.seen["exact"] + tally.seen["mutated"] + alone
    assert 0.0 <= tally.share("exact") <= 1.0


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert main(["--programs", "6", "--dynamo-every", "0", "--failures", str(tmp_path)]) == 0
    assert "exact attentions: 3" in capsys.readouterr().out
    assert main(["--programs", "3", "--first", "6", "--dynamo-every", "0", "--failures", str(tmp_path)]) == 0
    assert f"refused {0 if check(program_of(0, 8)).matched else 100:.1f}%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "The same seed gives the same programs" in capsys.readouterr().out


def test_every_kind_is_reached() -> None:
    """Each mutation, and each way to spell, appears among a few thousand programs."""
    drawn = [program_of(0, n) for n in range(3000)]
    assert {p.mutation for p in drawn} == {"", *MUTATIONS}
    assert {p.scores.how for p in drawn} == {"matmul", "einsum", "bmm", "baddbmm", "mulsum", "sdpa", "mha"}
    assert {t.kind for p in drawn for t in p.terms if isinstance(t, Mask)} >= {
        "causal",
        "data",
        "bottom",
        "window",
        "prefix",
        "documents",
    }
    assert choose_program.__doc__
