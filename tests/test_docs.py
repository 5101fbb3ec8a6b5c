"""The documentation: every block of code runs, generated pages are current, and the site builds offline without a warning."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attnfx
from attnfx.policy import Policy
from attnfx.variants.base import Variant
from benchmarks import page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in PAGES if _blocks(path, "python")], ids=lambda path: path.stem)
def test_python_blocks_run_one_after_the_other(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the pages' models need the test extra: pip install attnfx[test]")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=59, max_position_embeddings=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    given = {"model": model, "input_ids": torch.randint(59, (1, 21)), "attnfx": attnfx, "torch": torch}
    module = ModuleType(f"docs_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    for block in _blocks(path, "python"):
        if path.stem in ("README", "CONTRIBUTING"):  # whose blocks stand for themselves
            names |= given
        exec(compile(block, f"{path.name}: {block.splitlines()[0]}", "exec", dont_inherit=True), names)
    if path.stem == "CONTRIBUTING":  # the variant that it adds keeps what it promises
        (made,) = (v for v in names.values() if isinstance(v, type) and issubclass(v, Variant) and v.__module__ == module.__name__)
        assert [example.variant.rate for example in made.examples()] == [2, 3, 3]


@pytest.mark.parametrize("path", [path for path in PAGES if _blocks(path, "toml")], ids=lambda path: path.stem)
def test_toml_blocks_are_policies(path: Path, tmp_path: Path) -> None:
    for block in _blocks(path, "toml"):
        (tmp_path / "policy.toml").write_text(block, encoding="utf-8")
        assert len(Policy.load(tmp_path / "policy.toml").rules) == len(tomllib.loads(block)["rules"])


def test_the_page_of_measurements_is_that_of_the_results() -> None:
    text = page.page()
    assert text.count("x |") >= 20
    assert page.PAGE.read_text(encoding="utf-8") == text, "write it with: python -m benchmarks.page"


def test_the_site_builds_without_a_warning_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site needs the docs extra: pip install attnfx[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "how.html", "variants.html", "performance.html", "contributing.html"} <= {p.name for p in pages}
    elsewhere = r"[^>]*=\"?(?:https?:)?//"
    fetched = rf"<(?:script|img|iframe)[^>]+src{elsewhere}|<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)[^>]*href{elsewhere}"
    for path in pages:
        assert re.findall(fetched, path.read_text(encoding="utf-8")) == [], path.name
