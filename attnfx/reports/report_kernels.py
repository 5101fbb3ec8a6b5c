"""Generated kernels as a page shows them: each source once, highlighted, and on request what it compiles to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

from attnfx.errors import AttnfxError

if TYPE_CHECKING:
    from attnfx.report import SiteReport
    from attnfx.reports.kernel_files import Kernel


@dataclass(frozen=True)
class Resource:
    """What one launch takes on ``target``: registers and spilled bytes of a thread, bytes shared by a block, at most ``limit``."""

    target: str
    name: str
    registers: int
    spills: int
    shared: int
    limit: int
    grid: str


@dataclass(frozen=True)
class Shown:
    """One kernel: a number in the page, its source as HTML, and its resources, or why nothing is known of them."""

    number: int
    code: str
    lines: int
    resources: tuple[Resource, ...] = ()
    failed: str = ""


@dataclass
class Listing:
    """The kernels of a page; equal sources share a number."""

    targets: Sequence[str] = ()
    sample: int = 4096
    shown: dict[str, Shown] = field(default_factory=dict)

    def of(self, site: SiteReport) -> tuple[list[Shown], str]:
        """The kernels of a site, and a sentence on them: where they run, or why there is none."""
        from attnfx.report import Report
        from attnfx.reports.kernel_files import kernels_of

        try:
            kernels, without = kernels_of(Report((site,)))
        except (
            AttnfxError,
            RuntimeError,
            AssertionError,
        ) as problem:  # a composition may make tensors on a device that is not here
            kernels, without = [], (f"the kernels that a GPU would run cannot be generated on this machine: {problem}",)
        if site.kernel is not None and site.kernel != "\n\n".join(kernel.source for kernel in kernels):
            return [self._source(site.kernel)], "This kernel runs here."
        where = f"{site.module or 'the model itself'}: "
        if not kernels:
            return [], " ".join(_capital(text.removeprefix(where)) for text in without)
        found = [self._shown(kernel) for kernel in kernels]
        if site.kernel is not None:
            return found, "This kernel runs here."
        device = site.site.device
        return found, f"The kernel that a GPU would run; on this {device} the attention runs as {site.decision}."

    def _source(self, source: str) -> Shown:
        if source not in self.shown:
            self.shown[source] = Shown(len(self.shown) + 1, highlighted(source), source.count("\n") + 1)
        return self.shown[source]

    def _shown(self, kernel: Kernel) -> Shown:
        if kernel.source not in self.shown:
            made = self._source(kernel.source)
            resources: list[Resource] = []
            try:
                for target in self.targets:
                    resources += _resources(kernel, target, self.sample)
            except AttnfxError as problem:
                made = replace(made, failed=str(problem))
            self.shown[kernel.source] = replace(made, resources=tuple(resources))
        return self.shown[kernel.source]


def _resources(kernel: Kernel, target: str, sample: int) -> list[Resource]:
    from attnfx.lowering import inspection

    return [
        Resource(target, one.name, one.registers, one.spills, one.shared, one.limit, " × ".join(map(str, one.grid)))
        for one in inspection.compiled(kernel.plan, target, sample)
    ]


def highlighted(source: str) -> str:
    """Python as HTML: a span for keywords, comments, strings, numbers, and names that are defined or built in."""
    from pygments import token
    from pygments.lexers import PythonLexer

    kinds = (
        (token.Keyword, "k"), (token.Operator.Word, "k"), (token.Comment, "c"), (token.String, "s"), (token.Number, "m"),
        (token.Name.Function, "f"), (token.Name.Decorator, "f"), (token.Name.Builtin, "b"),
    )  # fmt: skip
    parts: list[str] = []
    for kind, text in PythonLexer().get_tokens(source):
        name = next((name for known, name in kinds if kind in known), "")
        parts.append(f'<span class="{name}">{escape(text)}</span>' if name and text.strip() else escape(text))
    return "".join(parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
