"""The command line of the generator: ``python -m attnfx.testing --programs 1000``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from attnfx.testing.bulk import Tally, many

_TEXT = """\
Writes random attention programs in plain torch, runs each one in eager and rewritten by attnfx, and compares every output and
every gradient with eager in float64, NaN included.

Two of three programs are attentions by construction: random layouts, contractions, scales, masks, biases, softmax spellings.
How many attnfx matches, and why it leaves the others, is counted. The third is an attention that one operation breaks (a softmax
over another axis, gated probabilities, rolled values): attnfx may rewrite it only if the results stay the same.

The same seed gives the same programs on every machine. A wrong program is made small and written to a folder as a file that runs
by itself. The exit status is 1 if any program is wrong.
"""

_EXAMPLES = """\
examples:
  python -m attnfx.testing                                        300 programs, half a minute
  python -m attnfx.testing --programs 100000 --seed 7 --workers 2 all of them: two or three hours
  python -m attnfx.testing --programs 50000 --first 50000 --seed 7 their second half
  python attention_failures/seed0_1234.py                         one failure, alone
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m attnfx.testing", description=_TEXT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=300, metavar="N", help="how many programs (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="which programs (default 0)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="K", help="the number of the first program: a part of a larger run (default 0)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1); give one a core")
    parser.add_argument(
        "--dynamo-every", type=int, default=10, metavar="N",
        help="one program of N goes through torch.compile, the others through a recorded graph, faster; 0: none (default 10)",
    )  # fmt: skip
    parser.add_argument(
        "--failures", type=Path, default=Path("attention_failures"), metavar="DIR", help="where failures are written"
    )
    given = parser.parse_args(arguments)
    start = time.perf_counter()

    def progress(_: int, tally: Tally) -> None:
        seconds = time.perf_counter() - start
        left = seconds / max(tally.programs, 1) * (given.programs - tally.programs)
        line = f"{tally.programs} of {given.programs} programs, {len(tally.failures)} wrong, {left / 60:.0f} min left"
        print(f"\r{line:<72}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    tally = many(given.programs, given.seed, given.workers, first=given.first, dynamo_every=given.dynamo_every, progress=progress)
    print(f"\n{summary(tally, time.perf_counter() - start)}")
    if tally.failures:
        given.failures.mkdir(parents=True, exist_ok=True)
        for failure in tally.failures:
            path = given.failures / f"seed{given.seed}_{failure.number}.py"
            path.write_text(failure.source, encoding="utf-8")
            print(f"{path}: {failure.what}")
    return 1 if tally.failures else 0


def summary(tally: Tally, seconds: float) -> str:
    """How fast it went; what was matched, by property; why exact programs were left; mutations and the share of each left."""
    rate = tally.programs / max(seconds, 1e-9)
    lines = [f"{tally.programs} programs in {seconds:.0f} s, {rate:.1f} a second, {len(tally.failures)} wrong"]
    if tally.seen["exact"]:
        lines += [f"exact attentions: {tally.seen['exact']}, matched {tally.share('exact'):.1%}", "", "matched, by what they hold"]
        names = sorted(name for name in tally.seen if ": " in name and not name.startswith("mutation"))
        lines += [
            f"  {tally.share(name):7.1%} of {tally.seen[name]:<6} {name}" for name in [*names, "in place"] if tally.seen[name]
        ]
        lines += ["", "left as they were, by reason"]
        lines += [f"  {count:6} {reason}" for reason, count in tally.reasons.most_common()]
    if tally.seen["mutated"]:
        lines += ["", f"mutations: {tally.seen['mutated']}, refused {1 - tally.share('mutated'):.1%}"]
        names = sorted(name for name in tally.seen if name.startswith("mutation"))
        lines += [f"  {1 - tally.share(name):7.1%} of {tally.seen[name]:<6} {name.partition(': ')[2]}" for name in names]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
