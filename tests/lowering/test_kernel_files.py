"""Saved kernels: names and headers of files, what they compile to without a GPU, and how mistakes are told."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from lowering_sites import B, I, J, alibi, causal, load, side, site, window
from typer.testing import CliRunner
from variants.variant_cases import site_of

import attnfx
from attnfx import expr
from attnfx.cli import app
from attnfx.errors import AttnfxError, UnknownOption
from attnfx.lowering import codegen, crosscompile
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.report import Report, SiteReport
from attnfx.reports import kernel_files
from attnfx.site import AttentionSite

pytest.importorskip("triton")
GOLDEN = Path(__file__).parent / "golden" / "saved_header.txt"
KNOWN = {"attnfx": "0.1.0", "torch": "2.13.0", "triton": "3.7.1"}
LENGTH, BATCH = sympy.symbols("s0 s1", integer=True, positive=True)
LONG = {"queries": 2048, "keys": 2048, "dtype": torch.bfloat16, "requires_grad": False}


def found(name: str, s: AttentionSite, decision: str = "portable", **given: Any) -> SiteReport:
    """The entry of an attention in the module ``name``."""
    fields: dict[str, Any] = {"pattern": "softmax", "variant": None, "reason": "a reason", "exact": True} | given
    return SiteReport(name=name, module=name, site=s, decision=decision, **fields)


def source(s: AttentionSite) -> str:
    plan = make_plan(s, "flash")
    assert isinstance(plan, KernelPlan), plan
    return codegen.source(plan)


def names(saved: kernel_files.Saved) -> list[str]:
    return [file.name for file in saved.files]


def test_the_header_is_what_was_reviewed() -> None:
    local = attnfx.variants.SlidingWindow(window=8)
    changed = found("layers.2", site(keep=window(7)), "flash", variant=local, exact=False)
    sites = [found("layers.0.attn", site(keep=causal()), source="model.py:7: p = z.softmax(-1)"), found("layers.1.attn", site())]
    text = "\n".join(kernel_files.header(of, KNOWN) for of in (sites, [changed], [found("", site())]))
    if os.environ.get("ATTNFX_REFRESH_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_one_file_for_each_distinct_kernel_and_a_sentence_for_each_attention_without(tmp_path: Path) -> None:
    local, plain, tall = site(keep=window(7)), site(keep=causal()), site(keep=causal(), head_dim=300)
    report = Report((
        found("layers.0/attn", local), found("layers.1.attn", local), found("", site(alibi(), causal(), side=(side(4),))),
        found("layers.2.attn", plain, "vendor"), found("layers.3.attn", plain, "vendor"), found("tall", tall),
    ))  # fmt: skip
    saved = report.save_kernels(tmp_path / "made" / "here")
    assert names(saved) == ["1-layers.0_attn.py", "2-model.py"]
    first = saved.files[0].read_text(encoding="utf-8")
    assert first.startswith(f"# Saved by attnfx {attnfx.__version__}, torch {torch.__version__}, triton ")
    assert first.endswith(f"#\n{source(local)}")
    assert "# shared by: layers.1.attn\n" in first
    compile(first, "saved", "exec")
    vendor, wide = saved.without
    assert vendor == "layers.2.attn, layers.3.attn: nothing is generated, it runs as vendor: a reason"
    assert wide.startswith("tall: there is no kernel for a GPU: head_dim is 300")


def test_the_imported_module_knows_no_versions() -> None:
    assert not any(version in source(site(keep=causal())) for version in (torch.__version__, "Saved by"))


@pytest.mark.parametrize(("target", "kind"), [("sm90", "ptx"), ("gfx942", "amdgcn")])
def test_what_they_compile_to(tmp_path: Path, target: str, kind: str) -> None:
    lengths = {"queries": LENGTH, "keys": LENGTH, "batch": BATCH, "dtype": torch.bfloat16, "requires_grad": False}
    report = Report((found("attn", site(keep=window(7), **lengths)),))
    saved = report.save_kernels(tmp_path, (target,), ptx=True, sample=1536)
    assert names(saved) == ["1-attn.py", f"1-attn.{target}.flash_forward.{kind}", f"1-attn.{target}.json"]
    about = json.loads(saved.files[-1].read_text(encoding="utf-8"))
    assert about["sizes"] == {"s0": 1536, "s1": few()}
    assert about["target"] == target
    (kernel,) = about["kernels"]
    assert 0 < kernel["registers"] <= 512
    assert 0 < kernel["shared"] <= kernel["limit"]
    assert kernel["spills"] >= 0
    assert kernel["constants"]["SCORE"] == "score"
    assert kernel["grid"] == [-(-1536 // kernel["constants"]["BLOCK_M"]) * few() * 4]
    assert f"flash_forward{'(' if kind == 'ptx' else ':'}" in saved.files[1].read_text(encoding="utf-8")


def few() -> int:
    from attnfx.lowering import inspection

    return inspection.FEW


def test_a_size_stays_in_its_range() -> None:
    from attnfx.lowering import inspection

    bounded = site(keep=window(7), queries=LENGTH, keys=LENGTH, batch=BATCH).replace(
        ranges_low=((BATCH, sympy.Integer(5)),), ranges_high=((LENGTH, sympy.Integer(700)),)
    )
    plan = make_plan(bounded, "flash")
    assert isinstance(plan, KernelPlan)
    assert inspection.sizes(plan, 4096) == {LENGTH: 700, BATCH: 5}


DOCUMENTS = expr.logical_and(causal(), expr.eq(load(0, B, I, dtype=torch.int64), load(0, B, J, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("s", "kernels"),
    [
        (site(keep=window(7), requires_grad=False), {"short_forward"}),
        (site(keep=window(7), queries=1, keys=2048, requires_grad=False), {"decode_partial", "decode_merge"}),
        (site(keep=window(7), **LONG | {"requires_grad": True}),
         {"flash_forward", "flash_delta", "flash_query_gradient", "flash_key_gradient"}),
        (site(keep=DOCUMENTS, side=(side(2, 2048, dtype=torch.int64),), dropout=0.1, **LONG),
         {"profile_ends", "tile_lists", "flash_forward"}),
    ],
    ids=["short", "one query", "gradients", "lists and dropout"],
)  # fmt: skip
def test_all_that_a_call_launches_is_there(s: AttentionSite, kernels: set[str]) -> None:
    from attnfx.lowering import inspection

    plan = make_plan(s.replace(empty_rows="zero"), "flash")
    assert isinstance(plan, KernelPlan), plan
    assert {call.kernel.__name__ for call in inspection.launches(plan, "sm90", 4096)} == kernels


@pytest.mark.parametrize("name", sorted(attnfx.variants.all()))
def test_each_variant_s_kernels_are_written_without_a_gpu(name: str, tmp_path: Path) -> None:
    said = []
    for example in attnfx.variants.all()[name].examples():
        at = site_of(example, torch.float32)
        assert example.variant.objections(at) == ()
        changed = at if example.variant.is_composed() else example.variant.apply(at)
        entry = found("attn", changed if isinstance(changed, AttentionSite) else at, variant=example.variant, exact=False)
        saved = Report((entry,)).save_kernels(tmp_path / str(len(said)), ("sm90",))
        said += [sentence for sentence in saved.without if "operators with kernels of their own" not in sentence]
        for file in saved.files:
            compile(file.read_text(encoding="utf-8"), file.name, "exec")
    assert said == []


def test_a_kernel_that_does_not_compile_is_a_sentence_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(call: Any, target: str) -> Any:
        raise RuntimeError("outer") from ValueError("the compiler's own words")

    monkeypatch.setattr(crosscompile, "compiled", broken)
    report = Report((found("attn", site(keep=window(7), **LONG)),))
    with pytest.raises(AttnfxError, match=r"flash_forward does not compile for sm90: ValueError: the compiler's own words"):
        report.save_kernels(tmp_path, ptx=True)
    assert [file.name for file in tmp_path.iterdir()] == ["1-attn.py"]


def test_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report((found("attn", site(keep=window(7))),))
    with pytest.raises(UnknownOption, match=r'"sm91" is no target; there are .*Did you mean "sm90"'):
        report.save_kernels(tmp_path, ("sm91",))
    with pytest.raises(UnknownOption, match=r'targets is the text "sm90"'):
        report.save_kernels(tmp_path, "sm90")
    with pytest.raises(UnknownOption, match="The sample size is 0"):
        report.save_kernels(tmp_path, sample=0)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(AttnfxError, match=r"The kernels cannot be saved in .*file: "):
        report.save_kernels(file)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AttnfxError, match="unset it"):
        report.save_kernels(tmp_path, ptx=True)
    monkeypatch.setattr(kernel_files, "_version", lambda name: "not installed")
    with pytest.raises(AttnfxError, match="needs Triton"):
        report.save_kernels(tmp_path, ptx=True)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report((found("attn", site(keep=window(7), **LONG)), found("other", site(keep=causal()), "vendor")))
    monkeypatch.setitem(vars(attnfx), "explain", lambda model, *args, policy=None, **kwargs: report)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "kernel_models.py").write_text("def make(): return len, (1,)\n")
    run = CliRunner().invoke
    made = run(app, ["explain", "kernel_models:make", "--kernels", "made", "--ptx", "sm90, sm80", "--json"])
    assert made.exit_code == 0, made.output
    assert len(json.loads(made.stdout)["sites"]) == 2
    assert "other: nothing is generated, it runs as vendor: a reason" in made.stderr
    assert "5 files of kernels are in made." in made.stderr
    assert {file.suffix for file in (tmp_path / "made").iterdir()} == {".py", ".ptx", ".json"}
    sources = run(app, ["explain", "kernel_models:make", "--kernels", "sources"])
    assert sources.exit_code == 0, sources.output
    assert [file.name for file in (tmp_path / "sources").iterdir()] == ["1-attn.py"]
    alone = run(app, ["explain", "kernel_models:make", "--ptx", "sm90"])
    assert alone.exit_code == 2
    assert "--kernels DIR" in alone.stderr


def test_data_of_a_compiled_kernel_is_all_but_the_assembly() -> None:
    from attnfx.lowering.inspection import Compiled

    made = Compiled("k", "assembly", 1, 2, 3, 4, (5,), {"SCORE": test_mistakes_are_sentences, "FILL": float("-inf"), "KEEP": None})
    data = kernel_files._data(made)
    assert data.keys() == {f.name for f in dataclasses.fields(Compiled)} - {"assembly"}
    assert data["constants"] == {"SCORE": "test_mistakes_are_sentences", "FILL": "-inf", "KEEP": None}
