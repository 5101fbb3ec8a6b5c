"""The report's page in a real browser, one that is installed already: nothing is downloaded, and no request leaves the file.

``ATTNFX_SCREENSHOTS=docs/images`` writes the pictures of the docs anew; else they go to a temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnfx

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
LAYERS, WIDTH, HEADS, TOKENS = 32, 32, 4, 64


class SelfAttention(nn.Module):
    """Every second layer sees all keys before it, with slopes for each distance; the others have windows, no two the same."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.window = 8 + number if number % 2 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        scores, keep = q @ k.transpose(-1, -2) / 8**0.5, j <= i
        if self.window is None:
            scores = scores - 0.25 * (i - j)
        else:
            keep = keep & (i - j < self.window)
        return self.out((scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(WIDTH), SelfAttention(number)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.self_attn(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model of 32 layers."""
    torch.manual_seed(0)
    with torch.no_grad():
        report = attnfx.explain(Model().eval(), torch.randn(1, TOKENS, WIDTH))
    assert len(report.sites) == LAYERS
    assert max(map(len, str(report).splitlines())) <= 100
    found = tmp_path_factory.mktemp("report") / "report.html"
    report.to_html(found)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    """The open page; anything that the console says, and any request but for the file itself, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    found, said = context.new_page(), []
    found.set_default_timeout(5000)
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    context.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith((path.as_uri(), "data:")) else None
    )
    found.goto(path.as_uri())
    yield found
    context.close()
    assert said == []


def _screenshot(page: Any, name: str, folder: Path) -> None:
    file = Path(os.environ.get("ATTNFX_SCREENSHOTS", folder)) / name
    page.screenshot(path=file)
    assert file.stat().st_size > 5000


def _chosen(page: Any) -> Any:
    return page.locator("article.card:visible")


def test_a_report_of_32_layers_is_small_and_opens_at_once(page: Any, path: Path) -> None:
    assert path.stat().st_size < 3_000_000
    start = time.perf_counter()
    page.goto(path.as_uri() + "?again")
    page.locator("nav .leaf").last.wait_for()
    assert time.perf_counter() - start < 2
    assert page.locator("nav .leaf").count() == LAYERS


def test_the_policy_lets_nothing_in(page: Any) -> None:
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_filter_and_the_tree_lead_to_a_layer(page: Any, tmp_path: Path) -> None:
    page.keyboard.press("/")
    page.keyboard.type("layers.13.")
    assert page.locator("nav .leaf:visible").count() == 1
    assert page.locator("#filter-count").inner_text() == f"1 of {LAYERS}"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert _chosen(page).count() == 1
    assert "layers.13.self_attn" in _chosen(page).locator("h2").inner_text()
    assert "j≤i∧i−j≤20" in _chosen(page).locator("math").first.text_content().replace(" ", "")
    _screenshot(page, "report.png", tmp_path)
    page.locator("#filter").press("Escape")
    page.locator("#show-all").click()
    assert page.locator("nav .leaf:visible").count() == LAYERS
    assert _chosen(page).count() == 1 + LAYERS // 2


def test_every_attention_shows_its_kernel(page: Any) -> None:
    shown = page.evaluate("""async () => {
        const found = [];
        for (const link of document.querySelectorAll("nav .leaf a")) {
            link.click();
            await new Promise(done => addEventListener("hashchange", done, { once: true }));
            const card = document.querySelector(".card tr.chosen").closest(".card"), source = card.querySelector("details.source");
            source.open = true;
            const code = source.querySelector("pre");
            const where = card.querySelector(".kernel p").textContent;
            found.push([card.checkVisibility(), code.checkVisibility(), code.textContent, where]);
        }
        return found;
    }""")
    assert len(shown) == LAYERS
    assert len({code for _, _, code, _ in shown}) == 1 + LAYERS // 2
    for card, visible, code, where in shown:
        assert card
        assert visible
        assert "def keep" in code
        assert where.startswith("The kernel that a GPU would run")


def test_the_decision_names_every_other_way(page: Any) -> None:
    page.evaluate("location.hash = 'site-3'")
    ways = _chosen(page).locator("dl")
    assert [text.split()[0] for text in ways.locator("dt").all_inner_texts()] == ["vendor", "flash", "kept"]
    assert "the generated kernels run on a GPU" in ways.inner_text()
    assert _chosen(page).locator("svg.mask path").count() >= 2
    assert _chosen(page).locator("table.cost tbody tr").count() == 3


def test_a_bias_is_drawn(page: Any) -> None:
    page.evaluate("location.hash = 'site-2'")
    image = _chosen(page).locator("img.bias")
    image.scroll_into_view_if_needed()
    assert image.evaluate("each => each.complete && each.naturalWidth") == 48


def test_the_graph_is_searched_drawn_and_linked_to_the_code(page: Any, tmp_path: Path) -> None:
    page.locator("#graph").scroll_into_view_if_needed()
    page.locator("#find").fill("attnfx.attention layers.3.")
    page.locator("#found button").first.click()
    assert page.locator("#scope").input_value() == "layers.3.self_attn"
    chosen = page.locator("#drawing g.new.chosen")
    assert chosen.count() == 1
    assert re.search(r"test_report_browser\.py:\d+", page.locator("#node").inner_text())
    page.locator("#find").fill("")
    page.locator("#graph").evaluate("each => each.scrollIntoView()")
    before = page.locator("#drawing svg").get_attribute("viewBox")
    page.locator("#drawing svg").press("+")
    assert page.locator("#drawing svg").get_attribute("viewBox") != before
    page.locator("[data-zoom=fit]").click()
    _screenshot(page, "report_graph.png", tmp_path)
    page.locator("#node button").click()
    line = page.locator("#lines .there")
    assert "attnfx.attention" in line.inner_text()
    assert "fresh" in line.get_attribute("class")
    page.locator("[data-show=before]").click()
    assert page.locator("#drawing g.removed").count() > 0
    assert page.locator("#drawing g.new").count() == 0
    page.locator("#scope").select_option("")
    page.locator("#drawing g.inner").first.press("Enter")
    assert page.locator("#scope").input_value() == "layers"


def test_the_code_shows_each_side(page: Any) -> None:
    page.locator("[data-code=before]").click()
    assert page.locator("#lines .fresh:visible").count() == 0
    assert page.locator("#lines .gone:visible").count() > LAYERS
    page.locator("[data-code=after]").click()
    assert page.locator("#lines .gone:visible").count() == 0
    assert page.locator("#lines .fresh:visible").count() >= LAYERS


def test_a_phone_in_the_dark(page: Any, tmp_path: Path) -> None:
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.evaluate("location.hash = 'site-5'")
    page.locator("details.source:visible summary").click()
    page.locator("[data-code=both]").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    _chosen(page).locator("h2").scroll_into_view_if_needed()
    _screenshot(page, "report_phone.png", tmp_path)
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


def test_keys_reach_everything_and_show_where_they_are(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(3):
        page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    clickable = page.evaluate("[...document.querySelectorAll('[onclick], div[role=button], span[role=button]')].length")
    assert clickable == 0
