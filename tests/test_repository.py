"""The repository keeps its promises: CI runs the commands of README, links lead somewhere, the backend has a name."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import attnfx

ROOT = Path(__file__).parent.parent


def _readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block.strip() for block in blocks]


def _ci_commands() -> list[str]:
    listed = subprocess.run(["bash", ROOT / ".ci/run", "--list"], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_readme_holds_two_one_line_commands() -> None:
    commands = _readme_commands()
    assert len(commands) == 2
    assert not any("\n" in command for command in commands)
    assert commands[0].endswith(".venv/bin/attnfx demo")
    assert ".venv/bin/pytest" in commands[1]


def test_ci_runs_the_commands_of_readme_and_then_the_checks() -> None:
    commands = _ci_commands()
    assert commands[:2] == _readme_commands()
    rest = " ".join(commands[2:])
    assert all(check in rest for check in ("ruff check", "ruff format --check", "mypy", "doctor --targets"))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_paths_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("end", ["patterns", "lowering"])
def test_the_top_shows_the_two_ends_of_the_compiler(end: str) -> None:
    link = ROOT / end
    assert link.is_symlink()
    assert link.readlink() == Path("attnfx", end)


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "attnfx").rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_dependency_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    needed = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    assert [name for name in needed if not re.search(rf'"{re.escape(name)}",  # \w', text)] == []


def test_the_backend_has_a_name_without_importing_attnfx() -> None:
    try:
        metadata.version("attnfx")
    except metadata.PackageNotFoundError:
        pytest.skip("attnfx is importable but not installed, so it has no entry points: pip install .")
    assert "attnfx" in torch._dynamo.list_backends()
    assert metadata.version("attnfx") == attnfx.__version__
