"""The command line: what each command prints, its exit codes, and how mistakes are told."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import attnfx
from attnfx import cli, versions
from attnfx.cli import app
from attnfx.commands import completion, doctor
from attnfx.commands.demo import Settings, run
from attnfx.errors import AttnfxError, UnknownOption
from attnfx.report import Report

MODELS = """
def pair(): return MODEL, (1, 2)
def triple(): return MODEL, (1,), {"key": 3}
def keywords(): return MODEL, {"key": 3}
def alone(): return MODEL
def inputs(): return [1, 2], {"key": 3}
def listed(): return [1, 2]
def number(): return 7, 8
def broken(): return _inside()
def fails(): return (lambda x: _fault(x)), (1,)
def runs(): return (lambda x: x), (1,)
def _fault(x): raise KeyError("the model's own fault")
def _inside(): raise RuntimeError("the factory's own fault")
MODEL = len
"""


class _Recorded:
    """Stands for `attnfx.explain`: keeps what it was called with, and finds nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, model: Any, *args: Any, policy: Any = None, **kwargs: Any) -> Report:
        self.calls.append((model, args, policy, kwargs))
        return Report(())


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Recorded:
    recorded = _Recorded()
    monkeypatch.setitem(vars(attnfx), "explain", recorded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    (tmp_path / "cli_models.py").write_text(MODELS)
    return recorded


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def _main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the real entry point, which turns our errors into sentences."""
    monkeypatch.setattr(sys, "argv", ["attnfx", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["cli_models:pair"], (len, (1, 2), None, {})),
        (["cli_models:triple"], (len, (1,), None, {"key": 3})),
        (["cli_models:keywords"], (len, (), None, {"key": 3})),
        (["cli_models:alone", "--inputs", "cli_models:inputs"], (len, (1, 2), None, {"key": 3})),
        (["cli_models:alone", "--inputs", "cli_models:listed"], (len, (1, 2), None, {})),
        (["cli_models:pair", "--inputs", "cli_models:listed"], (len, (1, 2), None, {})),
    ],
)
def test_explain_calls_the_factory(explained: _Recorded, arguments: list[str], call: tuple[Any, ...]) -> None:
    result = _run("explain", *arguments)
    assert result.exit_code == 0, result.output
    assert "no attention found" in result.stdout
    assert explained.calls == [call]


def test_explain_takes_a_policy_and_writes_a_page(explained: _Recorded) -> None:
    policy = attnfx.Policy([attnfx.Rule("*", attnfx.variants.SlidingWindow(7))])
    policy.save("policy.toml")
    result = _run("explain", "cli_models:pair", "--policy", "policy.toml", "--html", "report.html", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"] == []
    assert explained.calls[0][2] == policy
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert _run("explain", "cli_models:pair", "--policy", "streaming").exit_code == 0
    assert explained.calls[1][2] == attnfx.Policy.preset("streaming")


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("cli_models", '"cli_models" does not name a function; write package.module:function.'),
        ("no_such_module:f", 'There is no module "no_such_module" here'),
        ("cli_models:pear", 'The module "cli_models" has no function "pear". Did you mean "pair"?'),
        ("cli_models:alone", "cli_models:alone returned a value of type builtin_function_or_method; it must return"),
        ("cli_models:number", "cli_models:number gives a value of type int as the model's inputs"),
    ],
)
def test_explain_tells_mistakes_in_a_sentence(
    explained: _Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factory: str,
    complaint: str,
) -> None:
    code, err = _main(monkeypatch, capsys, "explain", factory)
    assert code == 1
    assert complaint in err
    assert "Traceback" not in err


def test_failing_factory_shows_its_own_traceback_only(
    explained: _Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = _main(monkeypatch, capsys, "explain", "cli_models:broken")
    assert code == 1
    assert "RuntimeError: the factory's own fault" in err
    assert "in _inside" in err
    assert "factories.py" not in err
    assert "cli.py" not in err


def test_a_model_that_fails_by_itself_shows_its_own_traceback_only(
    explained: _Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
        raise RuntimeError("the compiler's words for it")

    monkeypatch.setitem(vars(attnfx), "explain", explain)
    code, err = _main(monkeypatch, capsys, "explain", "cli_models:fails")
    assert code == 1
    assert "in _fault" in err
    assert 'KeyError: "the model\'s own fault"' in err
    assert "the compiler's words" not in err
    assert "/attnfx/" not in err
    assert isinstance(_run("explain", "cli_models:runs").exception, RuntimeError)  # the model itself runs: the fault is ours


def test_errors_are_data_with_json(
    explained: _Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["attnfx", "explain", "cli_models:pear", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "AttnfxError"
    assert 'Did you mean "pair"?' in error["message"]


def test_demo_gives_its_numbers_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"attnfx": {"milliseconds": 1.5}}
    monkeypatch.setattr("attnfx.commands.demo.run", lambda settings, told: numbers)
    assert json.loads(_run("demo", "--json").stdout) == numbers


def test_shell_completion(tmp_path: Path) -> None:
    environment = os.environ | {"_ATTNFX_COMPLETE": "complete_bash", "COMP_WORDS": "attnfx do", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['attnfx']; from attnfx.cli import main; main()"
    environment |= {"PYTHONPATH": str(Path(attnfx.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["doctor"]


def test_variants_lists_paper_class_and_parameters() -> None:
    listed = _run("variants")
    assert listed.exit_code == 0
    assert "SlidingWindow(window: int, sinks: int = 0)" in listed.stdout
    assert "arXiv:2309.17453" in listed.stdout
    told = _run("variants", "SlidingWindow").stdout
    assert "window=1 leaves it alone" in told
    assert "▀███████▄·····" in told
    (row,) = json.loads(_run("variants", "SlidingWindow", "--json").stdout)
    assert row["name"] == "SlidingWindow"


def test_unknown_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _main(monkeypatch, capsys, "variants", "SlidingWindw")
    assert code == 1
    assert 'Did you mean "SlidingWindow"?' in err


def test_bench_says_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    bench = _run("bench", "--quick")
    assert bench.exit_code == 2
    assert "in the repository" in bench.output


def test_doctor_says_what_runs_here() -> None:
    result = _run("doctor")
    assert result.exit_code == 0
    facts = json.loads(_run("doctor", "--json").stdout)["installed"]
    assert {
        "attnfx",
        "python",
        "torch",
        "C++ compiler",
        "backend",
        "device",
        "lowering",
        "tuned",
        "numpy",
        "known problems",
    } <= facts.keys()
    assert facts["attnfx"] == attnfx.__version__


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_doctor_fails_where_a_kernel_does_not_fit(monkeypatch: pytest.MonkeyPatch, fits: bool, code: int) -> None:
    row = dict.fromkeys(doctor.COLUMNS, 1) | {
        "template": "flash",
        "target": "sm90",
        "ok": fits,
        "error": "" if fits else "no",
    }

    def check(targets: list[str], begun: Callable[[str], None]) -> list[SimpleNamespace]:
        begun(targets[0])
        return [SimpleNamespace(**row | {"target": targets[0]})]

    module = SimpleNamespace(check=check)
    monkeypatch.setitem(sys.modules, "attnfx.lowering.crosscompile", module)
    monkeypatch.setattr("attnfx.lowering.crosscompile", module, raising=False)
    assert _run("doctor", "--targets", "sm90").exit_code == code
    result = _run("doctor", "--targets", "sm90", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["kernels"] == [row]


@pytest.mark.parametrize(
    ("installed", "required", "told"),
    [
        ({"torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.5.0"}, ['triton==3.7.1; platform_system == "Linux"'], []),
        ({"torch": "2.12.0", "triton": "3.6.0", "numpy": "2.3.5"}, ["triton==3.6.0", "sympy>=1.13"], []),
        ({"torch": "2.12.0", "triton": "not installed"}, ["triton==3.6.0"], []),
        ({"torch": "2.12.1", "triton": "3.7.1"}, ["triton==3.6.0"], ["torch 2.12.1 was released with Triton 3.6.0, and 3.7.1 is"]),
        ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.4.6"}, [], ["Triton's interpreter", "torch 2.11's scaled_dot"]),
        ({"torch": "2.14.0.dev1"}, [], ["torch 2.14.0.dev1 is not one of those"]),
        ({"torch": "2.9.1"}, [], ["torch 2.9.1 is not one of those that attnfx is tested with, 2.11 to below 2.14."]),
    ],
)
def test_doctor_knows_versions_that_do_not_go_together(installed: dict[str, str], required: list[str], told: list[str]) -> None:
    found = versions.known(installed, required)
    assert [sentence.startswith(start) for sentence, start in zip(found, told, strict=True)] == [True] * len(told), found


def test_doctor_refuses_an_unknown_target() -> None:
    with pytest.raises(UnknownOption, match=r'"sm91" is no target; there are .*Did you mean "sm90"'):
        doctor.checked(["sm91"])


def test_demo_without_transformers_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AttnfxError, match=r"pip install 'attnfx\[test\]'"):
        run(Settings(), cli.console)


def test_demo_shows_why_a_measurement_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the demo needs the test extra: pip install attnfx[test]")
    monkeypatch.setattr("attnfx.commands.demo.REFERENCE", "no_such_backend")
    with pytest.raises(AttnfxError, match="Traceback"):
        run(Settings(length=32, layers=1, repeats=1), cli.console)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["explain"],
        ["variants"],
        ["bench"],
        ["tune"],
        ["doctor"],
        ["policy", "check"],
        ["policy", "schema"],
        ["policy", "presets"],
        ["policy", "diff"],
    ],
)
def test_help(command: list[str]) -> None:
    result = _run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert command or "Exit codes: 0 it is done; 1 it failed" in result.stdout
    assert not command or f"attnfx {' '.join(command)} " in result.stdout, "an example"
    assert not command or "--json" in result.stdout


def test_module_is_the_command_line_and_help_needs_no_torch() -> None:
    code = "import sys, attnfx, attnfx.cli; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(attnfx.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    listed = subprocess.run([sys.executable, "-m", "attnfx", "--help"], env=environment, capture_output=True, text=True, check=True)
    assert "doctor" in listed.stdout


def test_public_names() -> None:
    assert {"compile", "explain", "verify", "Policy", "Rule", "Report", "variants", "errors"} <= set(dir(attnfx))
    assert attnfx.Report is Report
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = attnfx.explian


def test_names_are_completed_without_torch() -> None:
    names = "c.variant_names('Sli'), c.preset_names('st'), c.target_names('sm80,gfx'), 'torch' in sys.modules"
    imports = "from attnfx import cli; from attnfx.commands import completion as c; import json, sys"
    script = f"{imports}; print(json.dumps([{names}]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["SlidingWindow"], ["streaming"], ["sm80,gfx942"], False]


def test_names_that_are_completed_are_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnfx.lowering.configs import SHARED_LIMIT
    from attnfx.policies.presets import presets

    assert completion.variant_names() == sorted(attnfx.variants.all())
    assert completion.preset_names() == list(presets())
    assert completion.target_names() == list(SHARED_LIMIT)
    monkeypatch.chdir(tmp_path)
    for name in ("streams.toml", "streams.txt", "sub"):
        (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir()
    assert completion.policies("s") == ["streaming", "streams.toml", "sub/"]


def test_bench_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "models.py").write_text(
        "import json, pathlib, sys\nprint('progress')\n"
        "pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps(sys.argv[1:-1]))\nsys.exit(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "attnfx", "bench", "--quick", "--json"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, json.loads(done.stdout)) == (1, ["--quick", "--out"])
    assert "progress" in done.stderr
