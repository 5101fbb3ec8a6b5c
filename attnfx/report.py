"""What was found, what was decided and why: the answer of `attnfx.explain`, as data and as text."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnfx.files import replace_file
from attnfx.graphs.breaks import Break
from attnfx.reports.report_fragment import report_fragment, site_fragment
from attnfx.reports.report_html import page
from attnfx.reports.report_json import site_to_dict, to_dict
from attnfx.reports.report_text import table

if TYPE_CHECKING:
    from attnfx.measure import Measured
    from attnfx.reports.considered import Considered
    from attnfx.reports.graph_view import GraphView
    from attnfx.reports.kernel_files import Saved
    from attnfx.site import AttentionSite
    from attnfx.variants.base import Variant


@dataclass(frozen=True)
class SiteReport:
    """One attention.

    `name` is unique in its graph, `module` the module path, `pattern` the family that recognised it, `site` the
    attention itself (`str(site)` is its formula in one line), `decision` what runs it, `variant` the variant that the
    policy chose (None: the model's own attention), `reason` why, `exact` whether the result is the model's own,
    `kernel` the generated source or None where no kernel was generated, `source` the line of the model's code, `measured` the
    error against the original where a verification measured it, `buffers` the buffers of the model whose values were read, under
    a guard that compiles anew when they change, `biases` in which form the kernel meets each term that is added to the scores,
    `considered` what else could have run it and why it does not, `original` the model's own attention where a variant changed it.
    """

    name: str
    module: str
    pattern: str
    site: "AttentionSite"
    decision: str
    variant: "Variant | None"
    reason: str
    exact: bool
    kernel: str | None = None
    source: str = ""
    measured: "Measured | None" = None
    buffers: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    considered: tuple["Considered", ...] = ()
    original: "AttentionSite | None" = None

    @property
    def rewritten(self) -> bool:
        """Whether something of ours runs it; an attention can also be described and kept as the model computes it."""
        return self.decision != "kept"

    @property
    def exactness(self) -> str:
        """ "exact", or what the variant gives up."""
        if self.exact:
            return "exact"
        return self.variant.exactness if self.variant is not None else "approximate"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as docs/report.md describes it."""
        return site_to_dict(self)

    def _repr_html_(self) -> str:
        """The attention as a notebook shows it."""
        return site_fragment(self)


@dataclass(frozen=True)
class Missed:
    """Something that looked like an attention and was left as it was: where, and the reason as a sentence."""

    module: str
    reason: str
    node: str
    source: str = ""


@dataclass(frozen=True)
class Compile:
    """One graph that was compiled while a model ran.

    `graph` is Dynamo's name of it ("0/1": the second compile of the first frame), as in TORCH_LOGS and tlparse; `function` the
    function and its line; `reason` the guard that failed, empty for a first compile; `at` the local time, `seconds` what
    attnfx itself took, `attentions` how many it found.
    """

    graph: str
    function: str
    reason: str
    at: str
    seconds: float
    attentions: int


@dataclass(frozen=True)
class Report:
    """Every attention and near miss of a model, its graphs `before` and `after` as readable Python, the `breaks` between them,
    where what runs is in no graph, and the nodes of the `graphs`, to draw them; `compiles` are the graphs that a compiled
    model really ran."""

    sites: tuple[SiteReport, ...]
    missed: tuple[Missed, ...] = ()
    before: str = ""
    after: str = ""
    policy_warnings: tuple[str, ...] = ()
    breaks: tuple[Break, ...] = ()
    compiles: tuple[Compile, ...] = ()
    graphs: tuple["GraphView", ...] = ()

    def __post_init__(self) -> None:
        for name in ("sites", "missed", "policy_warnings", "breaks", "compiles", "graphs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __str__(self) -> str:
        return table(self)

    def _repr_html_(self) -> str:
        """The report as a notebook shows it: the table, without the graphs."""
        return report_fragment(self)

    def to_json(self) -> str:
        """The whole report as JSON, as docs/report.md describes it."""
        return json.dumps(to_dict(self), indent=2, ensure_ascii=False)

    def to_html(self, path: str | os.PathLike[str], targets: Sequence[str] = (), sample: int = 4096) -> None:
        """Write the report as one HTML file that needs no other; a file already at `path` is replaced in one step.

        For each of ``targets`` ("sm90") the kernels are compiled, without a GPU, and their registers, spills and shared memory are
        shown; that takes seconds a kernel. ``sample``: as in :meth:`save_kernels`.
        """
        replace_file(Path(path), page(self, targets, sample))

    def save_kernels(
        self, directory: str | os.PathLike[str], targets: Sequence[str] = ("sm90",), *, ptx: bool = False, sample: int = 4096
    ) -> "Saved":
        """Write the source of each distinct kernel as ``<n>-<module path>.py`` into ``directory``, under a header.

        With ``ptx`` also what it compiles to for each of ``targets`` ("sm90", "gfx942"), without a GPU: a file of PTX or AMDGCN for
        each launch, and one of JSON with registers, spills, shared memory and block sizes. Lengths that are known only at
        run time are taken to be ``sample``. Each file appears whole or not at all. Raises AttnfxError with a sentence.
        """
        from attnfx.reports.kernel_files import save

        return save(self, directory, targets, ptx, sample)

    def diff(self, other: "Report") -> str:
        """What runs otherwise in ``other``: attentions with another decision, variant or formula, and those in one only."""
        from attnfx.reports.report_diff import diff

        return diff(self, other)

    @staticmethod
    def merge(reports: Iterable["Report"]) -> "Report":
        """One report for a model that was compiled as several graphs; what two graphs say alike is said once."""
        reports = tuple(reports)
        if len(reports) == 1:
            return reports[0]
        return Report(
            sites=tuple(dict.fromkeys(site for report in reports for site in report.sites)),
            missed=tuple(dict.fromkeys(missed for report in reports for missed in report.missed)),
            before=_joined([report.before for report in reports]),
            after=_joined([report.after for report in reports]),
            policy_warnings=tuple(dict.fromkeys(text for report in reports for text in report.policy_warnings)),
            breaks=tuple(dict.fromkeys(broken for report in reports for broken in report.breaks)),
            compiles=tuple(compile for report in reports for compile in report.compiles),
            graphs=tuple(graph for report in reports for graph in report.graphs),
        )


def _joined(graphs: list[str]) -> str:
    return "\n\n".join(f"# graph {number} of {len(graphs)}\n{graph}" for number, graph in enumerate(graphs, 1))
