"""The arrows between the parts, and the size of files: what keeps the project readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "attnfx"
SITE = {"site", "expr", "errors", "algebra", "sites"}
"""What an attention is: expressions, proofs about them, and errors. Imports nothing of ours but itself."""
ENDS = ("patterns", "lowering")
SEES_BOTH = {"backend", "api", "report", "cli", "commands", "testing"}


def _modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def _imports(module: str) -> Iterator[str]:
    """The dotted names inside attnfx that a module imports, wherever it does, type checking included."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; inside the project modules are imported by full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("attnfx.") for name in names if name.startswith("attnfx."))


def _part(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".").partition(".")[0]


@pytest.mark.parametrize("module", [module for module in _modules() if _part(module) in SITE])
def test_the_site_imports_nothing_of_ours(module: str) -> None:
    assert {_part(name) for name in _imports(module)} <= SITE


def test_errors_come_before_expressions_and_expressions_before_sites() -> None:
    assert not list(_imports("errors.py"))
    assert "site" not in {_part(name) for name in _imports("expr.py")}


@pytest.mark.parametrize("module", [module for module in _modules() if _part(module) == "algebra"])
def test_algebra_knows_of_no_site(module: str) -> None:
    # but for the text of an expression, which is written in the letters of sites
    assert {_part(name) for name in _imports(module)} <= {"algebra", "expr"} or module == "algebra/nodes.py"


@pytest.mark.parametrize("module", [module for module in _modules() if _part(module) == "variants"])
def test_variants_import_the_site_only(module: str) -> None:
    assert {_part(name) for name in _imports(module)} <= SITE | {"variants"}


@pytest.mark.parametrize("module", [module for module in _modules() if _part(module) not in SEES_BOTH])
def test_nothing_but_the_pipeline_sees_both_ends(module: str) -> None:
    seen = {_part(name) for name in _imports(module)} | {_part(module)}
    assert not seen.issuperset(ENDS), f"{module} ties recognition to lowering; only {sorted(SEES_BOTH)} may"


@pytest.mark.parametrize("module", _modules())
def test_files_are_short_and_say_what_they_are_for(module: str) -> None:
    text = (PACKAGE / module).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert not text or ast.get_docstring(ast.parse(text)), f"{module} does not say what it is for"
