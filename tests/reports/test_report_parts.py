"""The parts of the report's page: typeset formulas, blocks of masks, costs, the two graphs, and what was not chosen."""

import difflib
import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path

import pytest
import sympy
import torch
from torch import nn

import attnfx
from attnfx import expr
from attnfx.biases.bias_values import bias
from attnfx.expr import Int, Load
from attnfx.lowering import inspection
from attnfx.report import Report, SiteReport
from attnfx.reports.considered import WAYS
from attnfx.reports.graph_code import listing
from attnfx.reports.graph_data import short
from attnfx.reports.mask_blocks import DATA, EMPTY, FULL, PARTIAL, blocks
from attnfx.reports.mathml import integer, typeset
from attnfx.reports.module_tree import tree
from attnfx.reports.pictures import mask_svg
from attnfx.reports.report_kernels import highlighted
from attnfx.reports.site_cost import quantities
from attnfx.reports.site_formula import formula
from attnfx.site import AttentionSite, SideTensor
from attnfx.variants import SlidingWindow

I, J, H = (expr.index(name) for name in "ijh")
SIZES = [sympy.Integer(number) for number in (1, 8, 4, 96, 96)]
SITE = AttentionSite(*SIZES, 16, 8, torch.float32, "cpu", expr.Score() * 0.125, keep=expr.le(J, I))
WINDOW = expr.logical_and(SITE.keep, expr.lt(I - J, expr.integer(20)))


def _text(markup: str) -> str:
    """What a reader sees, fractions as a/b."""

    def visit(node: ET.Element) -> str:
        parts = [visit(child) for child in node]
        return "/".join(parts) if node.tag == "mfrac" else (node.text or "") + "".join(parts)

    return visit(ET.fromstring(markup))


@pytest.mark.parametrize(
    ("e", "seen"),
    [
        (expr.le(J, I), "j≤i"),
        (Int(2 * (expr.INDEX["i"] + 1) * expr.INDEX["j"]), "j·(2·i+2)"),
        (expr.floordiv(I, expr.integer(4)), "⌊i/4⌋"),
        (Load(1, (H, J), torch.float32) * 2.0, "T1[h,j]·2"),
        (expr.where(expr.le(J, I), expr.constant(1.0, torch.float32), expr.constant(0.0, torch.float32)), "1if j≤i0otherwise"),
        (expr.constant(float("-inf"), torch.float32), "−∞"),
    ],
)
def test_expressions_are_typeset(e: expr.Expr, seen: str) -> None:
    assert _text(typeset(e)) == seen


def test_a_site_is_typeset_as_well_formed_mathml() -> None:
    site = SITE.replace(
        sink=Load(0, (H,), torch.float32), weight=Load(0, (H,), torch.float32), side=(SideTensor((SIZES[1],), torch.float32),)
    )
    seen = _text(formula(site))
    assert "zij=(qi·kj)·0.125if j≤i−∞otherwise" in seen
    assert "pij=ezij/eT0[h]+∑jezij" in seen
    assert seen.endswith("oi=∑jT0[h]·pijvj")


@pytest.mark.parametrize(
    "keep", [SITE.keep, WINDOW, expr.eq(expr.floordiv(I, expr.integer(10)), expr.floordiv(J, expr.integer(10)))]
)
def test_blocks_are_those_of_the_mask(keep: expr.Expr) -> None:
    found = blocks(SITE.replace(keep=keep), 12)
    assert found is not None
    assert (found.rows, found.columns) == (8, 8)
    i, j = torch.arange(96)[:, None], torch.arange(96)
    held = {SITE.keep: j <= i, WINDOW: (j <= i) & (i - j < 20)}.get(keep, i // 10 == j // 10)
    tiles = held.view(12, 8, 12, 8).permute(0, 2, 1, 3).flatten(2)
    want = torch.where(tiles.all(-1), FULL, torch.where(tiles.any(-1), PARTIAL, EMPTY))
    assert torch.tensor(found.kinds).equal(want)


def test_a_mask_of_data_is_known_only_where_the_rest_is_empty() -> None:
    padding = Load(0, (expr.integer(0), J), torch.bool)
    found = blocks(
        SITE.replace(keep=expr.logical_and(SITE.keep, padding), side=(SideTensor((SIZES[0], SIZES[4]), torch.bool),)), 12
    )
    assert found is not None
    assert {kind for row, line in enumerate(found.kinds) for column, kind in enumerate(line) if column <= row} == {DATA}
    assert {kind for row, line in enumerate(found.kinds) for column, kind in enumerate(line) if column > row} == {EMPTY}
    assert "block-data" in mask_svg(found)


def test_lengths_that_change_are_drawn_at_a_sample() -> None:
    s = sympy.Symbol("s0", integer=True, positive=True)
    found = blocks(SITE.replace(queries=s, keys=s))
    assert found is not None
    assert (found.queries, found.keys) == (512, 512)


def test_a_bias_is_what_is_added_to_the_scores() -> None:
    distance = expr.cast(J - I, torch.float32)
    found = bias(SITE.replace(score=expr.Score() * 0.125 + distance * 0.5))
    assert found is not None
    assert found.values[0][-1] == 47.5
    assert found.values[-1][0] == -47.5
    assert bias(SITE) is None


def _report(**changes: object) -> SiteReport:
    fields = {
        "name": "a",
        "module": "m",
        "pattern": "softmax",
        "site": SITE,
        "decision": "flash",
        "variant": None,
        "reason": "",
        "exact": True,
    }
    return SiteReport(**(fields | changes))  # type: ignore[arg-type]


def test_costs_before_and_after() -> None:
    operations, traffic, memory = quantities(_report())
    pairs = 96 * 97 // 2
    assert (operations.before_here, operations.after_here) == (2 * 8 * 96 * 96 * 24, 2 * 8 * pairs * 24)
    operands = 4 * (8 * 96 * 24 + 4 * 96 * 24)
    assert (traffic.before_here, traffic.after_here) == (operands + 4 * 4 * 8 * 96 * 96, operands)
    assert (memory.before_here, memory.after_here) == (2 * 4 * 8 * 96 * 96, 4 * 8 * 96)
    windowed, *_ = quantities(_report(site=SITE.replace(keep=WINDOW), original=SITE, variant=SlidingWindow(20), exact=False))
    assert windowed.after_here == 2 * 8 * 96 * 20 * 24
    kept, *_ = quantities(_report(decision="kept"))
    assert kept.after_here == kept.before_here


class Model(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) * 0.25).tanh()
        return scores.softmax(-1) @ v


@pytest.fixture(scope="module")
def report() -> attnfx.Report:
    x = torch.randn(1, 2, 24, 8)
    with torch.no_grad():
        return attnfx.explain(Model(), x, x, x)


def test_every_way_that_was_not_chosen_has_an_objection(report: attnfx.Report) -> None:
    (site,) = report.sites
    assert {one.way for one in site.considered} == WAYS.keys() - {site.decision, "linear"}  # its weights are exponentials
    assert all(one.objections and all(one.objections) for one in site.considered)
    (vendor,) = [one for one in site.considered if one.way == "vendor"]
    assert "takes a scale only" in vendor.objections[0]


def test_nodes_are_of_one_graph_or_of_both(report: attnfx.Report) -> None:
    (view,) = report.graphs
    roles = {node.calls: node.role for node in view.nodes}
    assert roles["softmax"] == "removed"
    assert roles["attnfx.attention"] == "new"
    assert roles["input"] == "kept"
    (output,) = [node for node in view.nodes if node.calls == "output"]
    assert output.reads != output.read_before
    assert output.read_before


def test_the_listing_is_both_graphs() -> None:
    before = "\n".join(["def f():", *(f"    x{n} = {n}" for n in range(50)), "    same", "    same", "    old", "    return x"])
    after = before.replace("x7 = 7", "x7 = 8").replace("    old\n", "    new\n    newer\n")
    lines = listing(before, after).split("\n")
    assert "\n".join(line[1:] for line in lines if line[0] != "+") == before
    assert "\n".join(line[1:] for line in lines if line[0] != "-") == after
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]
    assert len([line for line in lines if line[0] in "+-"]) == len(changed)


def test_modules_are_a_tree_whose_chains_are_joined() -> None:
    found = tree([("model.layers.0.attn", 0), ("model.layers.1.attn", 1), ("", 2)])
    assert found.leaves == [2]
    (layers,) = found.below.values()
    assert layers.name == "model.layers"
    assert [(branch.name, branch.leaves) for branch in layers.below.values()] == [("0.attn", [0]), ("1.attn", [1])]


def test_highlighting_changes_no_letter() -> None:
    source = 'def f(x):  # <b> & "c"\n    return x + 1\n'
    marked = highlighted(source)
    assert '<span class="k">def</span>' in marked
    assert unescape("".join(ET.fromstring(f"<pre>{marked}</pre>").itertext())) == source


def test_paths_are_shown_without_the_folder_of_packages() -> None:
    assert short("/usr/lib/python3/site-packages/model.py:7: x = 1") == "model.py:7: x = 1"
    assert short("/home/me/model.py:7: y") == "/home/me/model.py:7: y"


def test_a_page_says_what_kernels_take_on_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    compiled, seen = inspection.compiled, []
    monkeypatch.setattr(inspection, "compiled", lambda *given: seen.append(compiled(*given)) or seen[-1])
    report = Report((SiteReport("a", "layers.0.attn", "softmax", SITE.replace(keep=WINDOW), "portable", None, "a reason", True),))
    report.to_html(tmp_path / "page.html", ("sm90",))
    page = unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    ((made,),) = seen
    assert made.registers > 0
    row = re.search(rf"sm90.*?{made.name}.*?</tr>", page, re.DOTALL)
    assert row is not None
    assert {str(made.registers), str(made.spills)} <= set(re.findall(r"\d+", row.group()))
    report.to_html(tmp_path / "plain.html")
    assert made.name not in re.sub(r"<pre.*?</pre>", "", (tmp_path / "plain.html").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_costs_with_halves_and_least_numbers_are_typeset() -> None:
    queries, keys = sympy.symbols("M N", positive=True)
    found = integer(sympy.Min(32 * queries, queries * (keys - queries / 2 + sympy.Rational(1, 2))))
    ET.fromstring(f"<math>{found}</math>")
    assert "<mtext>" not in found
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in found
