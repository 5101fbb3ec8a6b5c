"""The reference of policies: up to date, and its examples run and say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from attnfx.policies.marked import parse
from attnfx.policies.policy_file import problems_of
from attnfx.policies.policy_page import MISTAKE, markdown
from attnfx.policies.rule import SELECTORS, WORDS
from attnfx.policy import Policy

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def python() -> list[dict[str, Any]]:
    """The names after each block of Python, which follow upon one another."""
    space: dict[str, Any] = {}
    found = []
    for kind, text in BLOCKS:
        if kind == "python":
            exec(text, space)
            found.append(dict(space))
    return found


def test_the_page_is_up_to_date() -> None:
    assert markdown() == PAGE, "write it with: attnfx policy schema --markdown > docs/policy.md"


@pytest.mark.parametrize("format", ["toml", "yaml", "json"])
def test_the_examples_say_the_same(tmp_path: Path, python: list[dict[str, Any]], format: str) -> None:
    (text,) = (text for kind, text in BLOCKS if kind == format)
    (tmp_path / f"policy.{format}").write_text(text, encoding="utf-8")
    assert Policy.load(tmp_path / f"policy.{format}") == python[0]["policy"]


def test_the_example_of_composing_runs(python: list[dict[str, Any]]) -> None:
    assert python[1]["policy"].rules[2:] == Policy.preset("streaming").rules


def test_the_tables_have_every_selector_and_word() -> None:
    assert all(f"| `{name}` |" in PAGE for name in SELECTORS)
    assert all(f"`{word}`" in PAGE for words in WORDS.values() for word in words)


def test_the_error_of_the_page_is_the_one_that_is_told() -> None:
    (problem,) = problems_of(MISTAKE.encode(), "policy.toml")
    assert problem.line == 5
    assert f"\n{problem}\n" in PAGE
    assert parse(MISTAKE.encode(), "toml").data["default"] == "keep"
