"""Reports: the table, JSON, the page, merging, and the folding of equal layers into one entry."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sympy
import torch

from attnfx import expr
from attnfx.graphs.module_paths import fold
from attnfx.policy import Rule
from attnfx.report import Missed, Report, SiteReport
from attnfx.site import AttentionSite
from attnfx.variants import SlidingWindow, TaylorWindow

SIZES = [sympy.Integer(number) for number in (1, 8, 4, 2048, 2048)]
SITE = AttentionSite(*SIZES, 64, 64, torch.float32, "cpu", expr.Score() * 0.125, keep=expr.le(expr.index("j"), expr.index("i")))


def _row(module: str, number: int = 0, **changes: object) -> SiteReport:
    fields = {
        "name": f"attention_{number}",
        "module": module,
        "pattern": "sdpa",
        "site": SITE,
        "decision": "portable",
        "variant": None,
        "reason": "The mask is proved causal.",
        "exact": True,
        "source": "model.py:7",
    }
    return SiteReport(**(fields | changes))  # type: ignore[arg-type]


def _windowed(module: str, number: int = 0) -> SiteReport:
    return _row(module, number, variant=SlidingWindow(1024), exact=False, reason="The policy asks for SlidingWindow.")


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (["model.layers.0.self_attn"], ["model.layers.0.self_attn"]),
        ([f"h.{n}.attn" for n in range(32)], ["h.[0-31].attn"]),
        ([f"h.{n}" for n in (0, 1, 2, 5, 7, 8)], ["h.[0-2,5,7-8]"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.[0-1].b.[0-1]"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.[0-1]", "a.1.b.0"]),
        (["encoder.0.x", "decoder.0.x", "encoder.1.x"], ["encoder.[0-1].x", "decoder.0.x"]),
        (["", "{odd}.0"], ["", "{odd}.0"]),
    ],
)
def test_equal_layers_fold_into_a_glob_that_a_policy_takes(modules: list[str], names: list[str]) -> None:
    folded = fold(modules)
    assert [name for name, _ in folded] == names
    for name, members in folded:
        assert not name or [module for module in modules if Rule(name).matches(module)] == sorted(members, key=modules.index)
    assert sorted(module for _, members in folded for module in members) == sorted(modules)


def test_table_says_what_runs_and_why() -> None:
    rows = [_row(f"model.layers.{number}.self_attn", number) for number in range(1, 32)]
    report = Report([_windowed("model.layers.0.self_attn"), *rows])  # type: ignore[arg-type]
    text = str(report)
    assert text.startswith("attnfx: 32 attentions (portable 32), 1 approximate, by policy.")
    assert re.search(r"model\.layers\.\[1-31\]\.self_attn ×31 +portable +exact", text)
    assert re.search(r"model\.layers\.0\.self_attn +portable +approximate, training-free", text)
    assert str(SITE) in text
    assert "The mask is proved causal." in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("module", ["model.layers.0.self_attn", "a_long_module_name." * 12])
def test_what_a_variant_gives_up_is_told_in_several_lines(module: str) -> None:
    variant = TaylorWindow()
    text = str(Report((_row(module, variant=variant, exact=False),)))
    assert max(map(len, text.splitlines())) <= 100
    table = text[: text.index(str(SITE)[:20])].replace("─", " ")
    assert all(word in table.split() for word in variant.exactness.split())


def test_long_names_and_sentences_stay_within_the_width() -> None:
    row = _row("a_long_module_name." * 12, decision="sdpa (cuDNN)", reason="A long reason. " * 20)
    missed = Missed("m" * 130, "another long reason " * 12, "node")
    text = str(Report((row,), (missed,), policy_warnings=("a warning that goes on " * 12,)))
    assert max(map(len, text.splitlines())) <= 100


def test_no_attention_is_said_plainly() -> None:
    assert str(Report(())) == "attnfx: no attention found; the model compiles as it would without attnfx."


def test_near_misses_and_warnings_are_listed() -> None:
    missed = [Missed(f"blocks.{number}", "The softmax is over axis 0, not over keys.", "softmax") for number in range(3)]
    text = str(Report((), tuple(missed), policy_warnings=('The rule "x.*" matches no attention.',)))
    assert "3 near misses" in text
    assert "blocks.[0-2] ×3: The softmax is over axis 0, not over keys." in text
    assert 'The rule "x.*" matches no attention.' in text


def test_one_module_called_twice_counts_twice() -> None:
    assert "shared ×2" in str(Report((_row("shared", 0), _row("shared", 1))))


def test_json_holds_everything() -> None:
    report = Report(
        (_windowed("a.0"), _row("a.1", kernel="def kernel(): ...")),
        (Missed("b", "why", "node"),),
        "before",
        "after",
        ("w",),
    )
    data = json.loads(report.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert data["sites"][0]["variant"] == {"name": "SlidingWindow", "window": 1024, "sinks": 0}
    assert data["sites"][0]["formula"] == str(SITE)
    assert data["sites"][0]["site"]["queries"] == 2048
    assert data["sites"][0]["site"]["dtype"] == "torch.float32"
    assert data["sites"][1]["kernel"] == "def kernel(): ..."
    assert data["missed"] == [{"module": "b", "reason": "why", "node": "node", "source": ""}]
    assert (data["before"], data["after"], data["policy_warnings"]) == ("before", "after", ["w"])


def test_page_is_one_file_and_escapes_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    hostile = _row("a.0", reason="<script>alert(1)</script> $summary", kernel="x < y && z")
    Report((hostile,), (Missed("b", "r < s", "n"),), "before <b>", "after").to_html(path)
    page = path.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $summary" in page
    assert "x &lt; y &amp;&amp; z" in page
    addresses = re.findall(r"\b(?:src|href)=\"([^\"]*)", page)
    assert [each for each in addresses if not each.startswith(("#", "data:"))] == [], "the page needs no other file"
    assert _unclosed(page) == []
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_page_without_attention(tmp_path: Path) -> None:
    Report(()).to_html(str(tmp_path / "report.html"))
    assert "no attention found" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_merge_says_once_what_two_graphs_say_alike() -> None:
    first = Report((_row("a.0"), _row("a.1", 1)), (Missed("m", "r", "n"),), "g1", "h1", ("w",))
    second = Report((_row("a.0"), _row("a.2", 2)), (Missed("m", "r", "n"),), "g2", "h2", ("w",))
    merged = Report.merge([first, second])
    assert [site.module for site in merged.sites] == ["a.0", "a.1", "a.2"]
    assert len(merged.missed) == len(merged.policy_warnings) == 1
    assert merged.before == "# graph 1 of 2\ng1\n\n# graph 2 of 2\ng2"
    assert Report.merge([first]) == first
    assert Report.merge([]) == Report(())


def _unclosed(page: str) -> list[str]:
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "link", "input", "img"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(page)
    return opened


def test_repeated_layers_are_one_near_miss_with_its_line() -> None:
    missed = [
        Missed(f"blocks.{n}", f"its probabilities are also used by sum_{n + 1}", "softmax", "model.py:7: return p")
        for n in range(3)
    ]
    text = str(Report((), tuple(missed)))
    assert "blocks.[0-2] ×3: its probabilities are also used by sum_1\n    at model.py:7: return p" in text
    assert text.count("also used by") == text.count("model.py:7") == 1
    long = str(Report((), (Missed("b", "why", "n", "m.py:1: " + "x" * 200),)))
    assert max(map(len, long.splitlines())) <= 100
