"""Policy files: three formats that say the same, lines in every message, and malformed files that do no harm."""

from __future__ import annotations

import json
import os
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from policy_texts import MALFORMED, RULE, TEXTS, WANT

from attnfx import variants
from attnfx.errors import PolicyError
from attnfx.policies import marked_toml
from attnfx.policies.marked import Unreadable, parse
from attnfx.policies.policy_file import read
from attnfx.policy import Policy, Rule


@pytest.mark.parametrize(("suffix", "content", "complaint"), MALFORMED, ids=map(str, range(len(MALFORMED))))
def test_a_malformed_file_is_one_clear_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, content: str | bytes, complaint: str
) -> None:
    variants.all()
    monkeypatch.chdir(tmp_path)
    path = Path(f"policy{suffix}")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    begin = time.process_time()
    with pytest.raises(PolicyError, match=complaint) as error:
        Policy.load(path)
    assert time.process_time() - begin < 1
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1500
    assert "\n" not in str(error.value)
    assert os.listdir() == [path.name], "nothing of the file was executed"


def test_what_is_no_file(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "a.toml", tmp_path / "b.toml"
    folder.mkdir()
    os.mkfifo(pipe)
    with pytest.raises(PolicyError, match="it is a folder"):
        Policy.load(folder)
    with pytest.raises(PolicyError, match="it is no plain file"):
        Policy.load(pipe)
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load("a\0.toml")


def test_files_that_a_variant_names_are_read_only_when_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(RULE + 'variant = { name = "NeuralBias", path = "nowhere.pt" }')
    assert Policy.load(path).rules[0].variant == variants.NeuralBias("nowhere.pt")


@pytest.mark.parametrize("format", TEXTS)
def test_formats_and_python_say_the_same(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"policy.{format}"
    path.write_text(TEXTS[format])
    assert Policy.load(path) == WANT
    for other in TEXTS:
        WANT.save(tmp_path / f"saved.{other}")
        assert Policy.load(tmp_path / f"saved.{other}") == WANT


def test_every_variant_survives_every_format() -> None:
    policy = Policy([Rule("*", example.variant) for kind in variants.all().values() for example in kind.examples()])
    for format in TEXTS:
        assert parse(policy.dumps(format).encode(), format).data == policy.to_dict()


def test_all_problems_are_found_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "rules:\n- modules: 'h.[3-0]'\n  variant: keep\n- layers: x\n  variant:\n  - name: AShape\n    n_init: -1\n  - kepp\n"
    )
    policy, problems = read(path)
    assert policy is None
    assert [(problem.line, problem.rule, problem.key) for problem in problems] == [
        (2, 1, "modules"), (4, 2, "layers"), (7, 2, "variant.0.n_init"), (8, 2, "variant.1"),
    ]  # fmt: skip
    with pytest.raises(PolicyError, match=r"line 2, rule 1, modules: .*3 more: attnfx policy check"):
        Policy.load(path)


GNARLY = '''\
# "comment" [a]
"quoted . key" = "a # b" # c
'literal' = 'x"y'
a.b."c.d" = [1, # [
  { x = 1, y = [2.5, 3] }, "]", """
multi [[ "" line
""", 'z']
text = \'\'\'
[not.a.table]
\'\'\'
e = 1e-3
date = 1979-05-27T07:32:00Z
[t] # table
k = { in.ner = { deep = "\\"]" } }
[[t.many]]
v = 1
[t.many.sub]
w = 2

[[t.many]]
v = 3
[t.many.sub]
wide = 4'''


def test_every_key_of_toml_has_its_line() -> None:
    found, texts = marked_toml.parse(GNARLY), GNARLY.splitlines()
    assert found.data == tomllib.loads(GNARLY)

    def keys(data: Any, place: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
        items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        return [p for key, value in items for p in ((*place, key), *keys(value, (*place, key)))]

    places = keys(found.data, ())
    assert set(places) <= set(found.lines)
    for place in places:
        if isinstance(place[-1], str):
            assert place[-1] in texts[found.lines[place] - 1], place
    assert found.lines["t", "many", 1, "v"] == texts.index("v = 3") + 1
    assert found.lines["a", "b", "c.d", 1, "y"] == 5


def test_line_ends_of_windows_and_a_byte_order_mark_are_read() -> None:
    found = parse(b'\xef\xbb\xbfdefault = "keep"\r\nrules = []\r\n', "toml")
    assert (found.data, found.line(("rules",))) == ({"default": "keep", "rules": []}, 2)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,', "[1", "tru", '"a', "01", "1 2", '{"a":1,}', "{1:2}"]
)
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(Unreadable, match="it is not JSON"):
        parse(text.encode(), "json")


@pytest.mark.parametrize(
    "text", ['{"a": [1, -2.5e3, true, false, null, "\\u00fc\\n", {}], "b": []}', " [ ] ", "3", '"\\ud83d\\ude00"']
)
def test_json_is_read_as_python_reads_it(text: str) -> None:
    assert parse(text.encode(), "json").data == json.loads(text)
