"""`attnfx policy`: what each command prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from policy_texts import MALFORMED, TEXTS, WANT
from typer.testing import CliRunner

from attnfx import variants
from attnfx.cli import app
from attnfx.policies.marked import parse
from attnfx.policies.policy_schema import schema
from attnfx.policies.presets import presets
from attnfx.policy import Policy, Rule
from attnfx.variants import AShape


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["policy", *arguments])


def test_check_tells_every_problem_of_every_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.toml"
    good.write_text(TEXTS["yaml"])
    bad.write_text('default = "x"\nruls = 3\n')
    assert _run("check", str(good)).exit_code == 0
    result = _run("check", str(good), str(bad), str(tmp_path / "none.toml"))
    assert result.exit_code == 1
    assert f"{good}: 2 rules, and a default, all well-formed." in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert f"{bad}, line 2: " in lines[1]
    assert 'Did you mean "rules"?' in lines[1]
    assert "No such file" in lines[2]
    listed = json.loads(_run("check", "--json", str(bad)).stdout)["problems"]
    assert [(problem["line"], problem["key"]) for problem in listed] == [(1, "default.name"), (2, "ruls")]


def test_no_malformed_file_ends_in_a_traceback(tmp_path: Path) -> None:
    paths = []
    for number, (suffix, content, _) in enumerate(MALFORMED):
        if len(content) < 1000:
            paths.append(tmp_path / f"{number}{suffix}")
            paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    result = _run("check", *map(str, paths))
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, Exception)
    assert all(str(path) in result.stderr for path in paths)


def test_presets_are_listed_and_printed_as_files() -> None:
    listed = _run("presets")
    assert all(name in listed.stdout for name in presets())
    assert {row["name"] for row in json.loads(_run("presets", "--json").stdout)} == set(presets())
    for name, preset in presets().items():
        assert parse(_run("presets", name).stdout.encode(), "toml").data == preset.policy.to_dict()
        assert json.loads(_run("presets", name, "--json").stdout) == preset.policy.to_dict()


def test_diff_tells_which_rules_differ(tmp_path: Path) -> None:
    a, b, c = Rule("a", AShape()), Rule("b", AShape(3)), Rule("c")
    Policy([a, b, c]).save(tmp_path / "a.toml")
    Policy([a, c, b], default="keep").save(tmp_path / "b.json")
    result = _run("diff", str(tmp_path / "a.toml"), str(tmp_path / "b.json"))
    assert result.exit_code == 1
    signs = [line[0] for line in result.stdout.splitlines()]
    assert sorted(signs) == ["+", "+", "-"]
    changes = json.loads(_run("diff", "--json", str(tmp_path / "a.toml"), str(tmp_path / "b.json")).stdout)["changes"]
    assert changes[-1] == {"change": "added", "place": "default", "rule": {"modules": "*", "variant": "keep"}}
    same = _run("diff", "streaming", "streaming")
    assert (same.exit_code, same.stdout) == (0, "The policies say the same.\n")


@pytest.fixture(scope="module")
def validator() -> Any:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_the_schema_takes_what_is_a_policy(validator: Any) -> None:
    assert json.loads(_run("schema").stdout) == validator.schema
    for data in (*(parse(text.encode(), format).data for format, text in TEXTS.items()), WANT.to_dict()):
        validator.validate(data)
    for preset in presets().values():
        validator.validate(preset.policy.to_dict())
    for kind in variants.all().values():
        for example in kind.examples():
            validator.validate(Policy(default=example.variant).to_dict())


@pytest.mark.parametrize(
    "data",
    [
        [], {"rule": []}, {"rules": {}}, {"rules": [{"variant": "keep"}]}, {"rules": [{"modules": "*"}]},
        {"rules": [{"modules": "*", "variant": "kepp"}]}, {"rules": [{"modules": 3, "variant": "keep"}]},
        {"rules": [{"layers": "a", "variant": "keep"}]}, {"rules": [{"kind": "selfe", "variant": "keep"}]},
        {"rules": [{"kind": [], "variant": "keep"}]}, {"default": "SlidingWindow"}, {"default": []},
        {"default": {"name": "SlidingWindow", "windw": 3}}, {"default": {"name": "SlidingWindow", "window": "3"}},
        {"default": {"name": "PerHead", "choices": {"0-x": "keep"}}},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_none(validator: Any, data: Any) -> None:
    assert not validator.is_valid(data)
