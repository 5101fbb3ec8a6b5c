"""Everything that a page says of equal attentions, made once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from attnfx.biases.bias_values import bias
from attnfx.reports.considered import WAYS
from attnfx.reports.mask_blocks import blocks
from attnfx.reports.mathml import integer
from attnfx.reports.pictures import described, heat_png, mask_svg
from attnfx.reports.report_text import buffers_of
from attnfx.reports.site_cost import quantities
from attnfx.reports.site_formula import formula

if TYPE_CHECKING:
    from attnfx.report import SiteReport
    from attnfx.reports.report_text import Group

_DECIMAL = ("", "k", "M", "G", "T", "P")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


@dataclass(frozen=True)
class Picture:
    """``markup``: an SVG, or the address of an image; a sentence that says what is seen."""

    markup: str
    caption: str


@dataclass(frozen=True)
class CostRow:
    """One quantity before and after: formulas typeset, and numbers at the site's sizes."""

    name: str
    before: str
    before_here: str
    after: str
    after_here: str


@dataclass(frozen=True)
class Described:
    """One attention, described: what equal ones share."""

    formula: str
    line: str
    reason: str
    notes: tuple[str, ...]
    ways: tuple[tuple[str, str, tuple[str, ...]], ...]
    mask: Picture | None
    bias: Picture | None
    costs: tuple[CostRow, ...]


def describe(group: Group) -> Described:
    """What a page says of ``group``."""
    site = group.sites[0]
    notes = (*site.biases, *filter(None, (buffers_of(group),)))
    ways = tuple((one.way, WAYS.get(one.way, "the policy's variant"), one.objections) for one in site.considered)
    return Described(
        formula(site.site), str(site.site), site.reason, notes, ways, mask_picture(site), _bias_picture(site), _costs(site)
    )


def mask_picture(site: SiteReport) -> Picture | None:
    """The blocks of the mask; None of an attention that sees everything, or whose sizes cannot be computed."""
    found = blocks(site.site)
    return None if found is None else Picture(mask_svg(found), described(found))


def _bias_picture(site: SiteReport) -> Picture | None:
    found = bias(site.site)
    return None if found is None else Picture(heat_png([list(line) for line in found.values]), found.caption)


def _costs(site: SiteReport) -> tuple[CostRow, ...]:
    return tuple(
        CostRow(q.name, _typeset(q.before), _number(q.before_here, q.unit), _typeset(q.after), _number(q.after_here, q.unit))
        for q in quantities(site)
    )


def _typeset(e: sympy.Expr | None) -> str:
    return "" if e is None or e.is_number else f"<math>{integer(sympy.factor_terms(e))}</math>"


def _number(e: sympy.Expr | None, unit: str) -> str:
    """Three digits and a unit; nothing for a size that is not known."""
    if e is None or not e.is_number:
        return ""
    value, power, step = float(e), 0, 1024 if unit == "B" else 1000
    names = _BINARY if unit == "B" else _DECIMAL
    while value >= step and power < len(names) - 1:
        value, power = value / step, power + 1
    return f"{value:.4g} {names[power]}{unit}"
