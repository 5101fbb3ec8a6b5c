"""The file of what was found: readable, merged by many writers, set aside where it is broken or foreign, given away and taken."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from attnfx.errors import AttnfxError, AttnfxWarning
from attnfx.lowering.configs import Config, Tile
from attnfx.lowering.tuning import cache
from attnfx.lowering.tuning.entries import Comparison, Entry, EntryError, choice_from_data, choice_to_data, read

WHO = cache.Identity("NVIDIA H200", "2.11.0", "3.6.0", "0.1.0", "1a2b3c4d")
ENTRY = Entry(Config(64, 128, 4, 2, tma=False), 0.5, 0.75, "softmax", "2026-01-01", 30, {"a wrong result": 1})
SPLIT = Entry(Tile(64, 4, 3, 12), 0.01, 0.02)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_file_is_named_for_its_device_and_versions(folder: Path) -> None:
    cache.add(WHO, {"key": ENTRY})
    name = "NVIDIA-H200--torch-2.11.0--triton-3.6.0--attnfx-0.1.0-1a2b3c4d.json"
    assert WHO.path == folder / "tuned" / name
    data = json.loads(WHO.path.read_text())
    assert data["for"]["device"] == "NVIDIA H200"
    assert data["entries"]["key"]["config"] == {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 2, "tma": False}


@pytest.mark.parametrize("entry", [ENTRY, SPLIT, Comparison(1.0, 2.0, "plain", "2026-01-01")])
def test_entries_come_back(entry: Any) -> None:
    assert cache.add(WHO, {"key": entry}) == {"key": entry} == cache.load(WHO)


def test_nothing_is_remembered_without_a_file_and_for_a_cpu() -> None:
    import torch

    assert cache.load(WHO) == {}
    assert cache.identity(torch.device("cpu")) is None


def test_a_later_entry_replaces_an_earlier_one_and_leaves_the_others() -> None:
    cache.add(WHO, {"key": ENTRY, "other": SPLIT})
    better = replace(ENTRY, ms=0.4)
    assert cache.add(WHO, {"key": better}) == {"key": better, "other": SPLIT}
    assert cache.add(WHO, {"key": ENTRY}, keep=True)["key"] == better


BROKEN = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "another shape": "[]",
    "another schema": json.dumps({"attnfx tuned": 99, "for": {}, "entries": {}}),
    "another device": cache.written(replace(WHO, device="NVIDIA H100"), {"key": ENTRY}),
    "other versions": cache.written(replace(WHO, triton="3.5.0"), {"key": ENTRY}),
    "entries in a list": cache.written(WHO, {}).replace("{}", "[]"),
    "a wild block": cache.written(WHO, {"key": ENTRY}).replace('"block_m": 64', '"block_m": 48'),
    "half of it": cache.written(WHO, {"key": ENTRY})[:-40],
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_set_aside_with_a_warning(text: str) -> None:
    cache.add(WHO, {})
    for number in ("", "-2", "-3"):
        WHO.path.write_text(text)
        with pytest.warns(AttnfxWarning, match="is not read, because of this"):
            found = cache.add(WHO, {"key": SPLIT}) if number == "-2" else cache.load(WHO)
        assert found == ({"key": SPLIT} if number == "-2" else {})
        assert WHO.path.with_name(f"{WHO.path.name}.set-aside{number}").read_text() == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(WHO) == {}


def test_a_folder_that_cannot_be_written_keeps_what_was_found_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add(WHO, {"key": ENTRY})

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "replace_file", full)
    with pytest.warns(AttnfxWarning, match="cannot be written .*No space left"):
        assert cache.add(WHO, {"other": SPLIT}) == {"key": ENTRY, "other": SPLIT}
    monkeypatch.undo()


def _write(number: int) -> None:
    for step in range(20):
        cache.add(WHO, {f"{number} {step}": ENTRY, "shared": replace(ENTRY, ms=float(step))})


def test_processes_that_write_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert cache.load(WHO).keys() == {"shared", *(f"{n} {step}" for n in range(3) for step in range(20))}
    assert [p.name for p in WHO.path.parent.iterdir() if not p.name.endswith((".json", ".lock"))] == []


def test_one_process_searches_at_a_time() -> None:
    with cache.searching(WHO, 1.0) as first, cache.searching(WHO, 0.01) as second:
        assert (first, second) == (True, False)
    with cache.searching(WHO, 0.01) as later:
        assert later


def test_a_file_is_taken_on_a_device_like_its_own(tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text(cache.written(WHO, {"key": replace(ENTRY, ms=0.1), "new": SPLIT}))
    cache.add(WHO, {"key": ENTRY})
    assert cache.import_file(given, WHO) == 1
    assert cache.load(WHO) == {"key": ENTRY, "new": SPLIT}  # what was measured here is kept


def test_a_foreign_file_is_taken_by_force_alone(tmp_path: Path) -> None:
    given, other = tmp_path / "given.json", replace(WHO, device="NVIDIA H100", torch="2.12.0")
    given.write_text(cache.written(other, {"key": ENTRY}))
    with pytest.raises(AttnfxError, match=r"made for NVIDIA H100, torch 2.12.0.*this is NVIDIA H200.*--force") as refused:
        cache.import_file(given, WHO)
    assert str(given) in str(refused.value)
    assert cache.load(WHO) == {}
    assert cache.import_file(given, WHO, force=True) == 1
    assert cache.load(WHO) == {"key": ENTRY}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_none_is_refused_in_a_sentence(tmp_path: Path, force: bool) -> None:
    with pytest.raises(AttnfxError, match="cannot be read: No such file"):
        cache.import_file(tmp_path / "none.json", WHO, force)
    for name, text in BROKEN.items():
        if name not in ("another device", "other versions"):
            (tmp_path / "broken.json").write_text(text)
            with pytest.raises(AttnfxError, match="is not a file of tuned configurations"):
                cache.import_file(tmp_path / "broken.json", WHO, force)
            assert (tmp_path / "broken.json").exists()


@pytest.mark.parametrize("choice", [ENTRY.choice, SPLIT.choice, Config(16, 16, 1, 1)])
def test_a_configuration_comes_back(choice: Any) -> None:
    assert choice_from_data(json.loads(json.dumps(choice_to_data(choice)))) == choice


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], "an entry is list"),
        ({}, "an entry has no 'about'"),
        (ENTRY.to_data() | {"ms": "fast"}, "ms is 'fast'; it is a time"),
        (ENTRY.to_data() | {"ms": float("nan")}, "ms is nan"),
        (ENTRY.to_data() | {"timed": "all"}, "they are numbers"),
        (ENTRY.to_data() | {"about": 3}, "about is 3; it is a text"),
        (ENTRY.to_data() | {"config": {"block_m": 64}}, "it has the fields of a Config or of a Tile"),
        (ENTRY.to_data() | {"config": choice_to_data(ENTRY.choice) | {"num_warps": 3}}, "num_warps is 3; it is one of 1, 2, 4"),
        (ENTRY.to_data() | {"config": choice_to_data(ENTRY.choice) | {"tma": 1}}, "tma is 1"),
        (ENTRY.to_data() | {"config": choice_to_data(ENTRY.choice) | {"num_stages": True}}, "num_stages is True"),
        (Comparison(1.0, 2.0).to_data() | {"generated_ms": -1.0}, "generated_ms is -1.0"),
    ],
)
def test_data_that_is_no_entry_is_refused(data: Any, complaint: str) -> None:
    with pytest.raises(EntryError, match=complaint):
        read(data)


def test_other_kernels_are_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from attnfx.lowering import templates

    cache._kernels.cache_clear()
    before = cache._kernels()
    (tmp_path / "template.py").write_text("changed")
    monkeypatch.setattr(templates, "__path__", [*templates.__path__, str(tmp_path)])
    cache._kernels.cache_clear()
    assert cache._kernels() != before
    cache._kernels.cache_clear()
