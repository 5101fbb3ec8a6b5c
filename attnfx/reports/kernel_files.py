"""The generated kernels of a report as files: sources under a header and, on request, what they compile to without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnfx
from attnfx.errors import AttnfxError, UnknownOption, listing, nearest
from attnfx.files import replace_file

if TYPE_CHECKING:
    from attnfx.lowering.plan import KernelPlan
    from attnfx.report import Report, SiteReport
    from attnfx.variants.base import Variant

#: What a length is taken to be that is known only at run time, where nobody says otherwise.
SAMPLE = 4096
#: What a file is not named with.
UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Saved:
    """The ``files`` that were written, and a sentence for each attention that has no generated kernel."""

    files: tuple[Path, ...]
    without: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """One generated source, and the attentions that share its plan."""

    plan: KernelPlan
    source: str
    sites: tuple[SiteReport, ...]


def save(
    report: Report, directory: str | os.PathLike[str], targets: Sequence[str] = ("sm90",), ptx: bool = False, sample: int = SAMPLE
) -> Saved:
    """See :meth:`attnfx.report.Report.save_kernels`."""
    _check(targets, sample)
    if ptx:
        _check_compiler()
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise AttnfxError(f"The kernels cannot be saved in {folder}: {problem.strerror}.") from problem
    kernels, without = kernels_of(report)
    files: list[Path] = []
    for number, kernel in enumerate(kernels, 1):
        stem = f"{number}-{UNSAFE.sub('_', kernel.sites[0].module) or 'model'}"
        for name, text in _texts(stem, kernel, targets if ptx else (), sample):
            replace_file(folder / name, text)
            files.append(folder / name)
    return Saved(tuple(files), without)


def kernels_of(report: Report) -> tuple[list[Kernel], tuple[str, ...]]:
    """The distinct kernels of a report, in its order, and sentences on the attentions without one.

    An attention that runs in torch operations for want of a GPU has the kernel that it would run on one.
    """
    from attnfx.lowering import codegen
    from attnfx.lowering.plan import KernelPlan

    found: dict[tuple[str, Variant | None], Kernel] = {}
    without: dict[str, list[str]] = {}
    for site in report.sites:
        where = site.module or "the model itself"
        if site.decision not in ("flash", "portable"):
            without.setdefault(f"nothing is generated, it runs as {site.decision}: {site.reason}", []).append(where)
            continue
        plans = _plans(site)
        if plans and isinstance(plans[0], str):
            without.setdefault(f"there is no kernel for a GPU: {' '.join(map(str, plans))}", []).append(where)
            continue
        if not plans:
            without.setdefault("nothing is generated, it calls operators with kernels of their own", []).append(where)
        for plan in plans:
            assert isinstance(plan, KernelPlan)
            key = plan.to_json(), site.variant
            before = found[key].sites if key in found else ()
            found[key] = Kernel(plan, codegen.source(plan), (*before, *(s for s in (site,) if s not in before)))
    return list(found.values()), tuple(f"{', '.join(modules)}: {reason}" for reason, modules in without.items())


def _plans(site: SiteReport) -> Sequence[KernelPlan | str]:
    """What a GPU runs in place of a site, or sentences on why it cannot."""
    from attnfx.composing import composed
    from attnfx.lowering.plan import KernelPlan, make_plan

    there = site.site.replace(device="cuda")
    if site.variant is not None and site.variant.is_composed():
        made = composed(site.variant, there, "flash", device="cpu")
        return made if isinstance(made, tuple) else made.plans
    plan = make_plan(there, "flash")
    return [plan] if isinstance(plan, KernelPlan) else plan


def versions() -> dict[str, str]:
    """attnfx's, torch's and Triton's."""
    return {"attnfx": attnfx.__version__} | {name: _version(name) for name in ("torch", "triton")}


def header(sites: Sequence[SiteReport], known: Mapping[str, str]) -> str:
    """The comment above a saved source: versions, the attention, its variant, and where it is. It is no part of the module that is
    imported, whose name is made of its content."""
    first = sites[0]
    others = [site.module or "the model itself" for site in sites[1:]]
    variant = "none, the model's own attention" if first.variant is None else f"{first.variant}: {first.exactness}"
    lines = [
        f"Saved by {', '.join(f'{name} {version}' for name, version in known.items())}.",
        f"attention: {first.module or 'the model itself'}{f' ({first.source})' if first.source else ''}",
        *([f"shared by: {', '.join(others)}"] if others else []),
        f"site: {first.site}",
        f"variant: {variant}",
        f"runs here as: {first.decision}",
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _texts(stem: str, kernel: Kernel, targets: Sequence[str], sample: int) -> Iterator[tuple[str, str]]:
    """Names and contents of the files of one kernel."""
    known = versions()
    yield f"{stem}.py", f"{header(kernel.sites, known)}#\n{kernel.source}"
    for target in targets:
        from attnfx.lowering import inspection

        made = inspection.compiled(kernel.plan, target, sample)
        kind = "ptx" if target.startswith("sm") else "amdgcn"
        for one in made:
            yield f"{stem}.{target}.{one.name}.{kind}", one.assembly
        about = {
            "target": target, "site": str(kernel.sites[0].site), "versions": known,
            "sizes": {str(symbol): value for symbol, value in inspection.sizes(kernel.plan, sample).items()},
            "kernels": [_data(one) for one in made],
        }  # fmt: skip
        yield f"{stem}.{target}.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _data(kernel: Any) -> dict[str, Any]:
    """A compiled kernel but for its assembly, as JSON's own kinds."""
    data = {field.name: getattr(kernel, field.name) for field in dataclasses.fields(kernel) if field.name != "assembly"}
    return data | {"constants": {name: _plain(value) for name, value in kernel.constants.items()}}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    return getattr(value, "__name__", None) or str(value)


def _check(targets: Sequence[str], sample: int) -> None:
    from attnfx.lowering.configs import SHARED_LIMIT

    if isinstance(targets, str):
        raise UnknownOption(f'targets is the text "{targets}"; write a tuple of names, ("{targets}",).')
    for target in targets:
        if target not in SHARED_LIMIT:
            raise UnknownOption(f'"{target}" is no target; there are {listing(SHARED_LIMIT)}.{nearest(target, SHARED_LIMIT)}')
    if sample < 1:
        raise UnknownOption(f"The sample size is {sample}; it is 1 at least.")


def _check_compiler() -> None:
    if _version("triton") == "not installed":
        raise AttnfxError(
            f"Compiling kernels needs Triton, which is not installed here ({platform.system()} {platform.machine()})."
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise AttnfxError("TRITON_INTERPRET=1 makes Triton interpret kernels, and nothing is compiled: unset it.")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
