"""Testing: look inside compiled models, and generate attention programs that judge the compiler.

``square_tensors``, ``GraphLog``, ``AtenLog`` and ``peak_bytes`` show what a compiled model does. ``check`` judges one generated
:class:`Program`, ``source`` writes it as code, ``programs`` is a hypothesis strategy of them (hypothesis is imported when it is
called), ``seeded_program`` gives the program of a seed. ``python -m attnfx.testing --help`` runs many.
"""

from attnfx.testing.choices import programs, seeded_program
from attnfx.testing.graphs import AtenLog, GraphLog, peak_bytes, square_tensors
from attnfx.testing.judge import Verdict, check
from attnfx.testing.program import Program, Unspellable
from attnfx.testing.smaller import shrink
from attnfx.testing.spelling import source

__all__ = [
    "AtenLog", "GraphLog", "Program", "Unspellable", "Verdict", "check", "peak_bytes", "programs", "seeded_program", "shrink",
    "source", "square_tensors",
]  # fmt: skip
