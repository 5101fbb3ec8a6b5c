"""What a compile tells about itself: TORCH_LOGS, the events that tlparse reads, and warnings that come once."""

import json
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import attnfx
from attnfx import logs
from attnfx.errors import AttnfxWarning

ROOT = Path(attnfx.__file__).parent.parent
MODEL = """
import torch
from torch import nn
class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(x.shape[1], x.shape[1]).tril().triu(-5)
        return (torch.softmax((q @ k.mT / 3).masked_fill(mask == 0, -torch.inf), -1) @ v).transpose(1, 2).flatten(2)
compiled = torch.compile(nn.Sequential(Windowed(), Windowed()), backend="attnfx", options={"inner": "eager"})
with torch.no_grad():
    compiled(torch.randn(2, 13, 16))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Standard error and the trace of a program that loads attnfx through the name of the backend alone."""
    try:
        metadata.version("attnfx")
    except metadata.PackageNotFoundError:
        pytest.skip("attnfx is importable but not installed, so torch does not know the backend's name: pip install .")
    folder = tmp_path_factory.mktemp("logs")
    (folder / "model.py").write_text(MODEL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_LOGS": "+attnfx", "TORCH_TRACE": str(folder / "trace")}
    command = [sys.executable, folder / "model.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    (trace,) = (folder / "trace").iterdir()
    return done.stderr, trace.read_text(encoding="utf-8")


def test_torch_logs_knows_attnfx_by_name_and_shows_everything_with_a_plus(run: tuple[str, str]) -> None:
    told, _ = run
    assert told.count("[0/0] attnfx: 2 attentions (portable 2), all exact. Rewritten in") == 1
    assert "[0-1] ×2: portable, exact; " in told
    assert "is softmax((q·k)·0.333333 | " in told
    assert "attention_default" in told.split("the graph after:")[1]


def test_artifacts_for_tlparse(run: tuple[str, str]) -> None:
    found, lines = {}, run[1].splitlines()
    for number, line in enumerate(lines):
        event = json.loads(line[line.index("{") :]) if line.startswith("V") else {}
        if event.get("artifact", {}).get("name", "").startswith("attnfx_"):
            end = next((k for k in range(number + 1, len(lines)) if not lines[k].startswith("\t")), len(lines))
            payload = "\n".join(text[1:] for text in lines[number + 1 : end])
            found[event["artifact"]["name"]] = event, payload
    assert set(found) == {"attnfx_report", "attnfx_report_data", "attnfx_graph_before", "attnfx_graph_after"}
    assert all((event["frame_id"], event["frame_compile_id"]) == (0, 0) for event, _ in found.values())
    assert found["attnfx_report"][1].startswith("attnfx: 2 attentions (portable 2), all exact.")
    data = json.loads(found["attnfx_report_data"][1])
    assert [site["module"] for site in data["sites"]] == ["0", "1"]
    assert "= torch.softmax(" in found["attnfx_graph_before"][1]
    assert "= torch.softmax(" not in found["attnfx_graph_after"][1]


def test_set_logs_takes_the_name_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    state = torch._logging._internal._get_log_state()
    try:
        torch._logging.set_logs(modules={"attnfx": 20})
        compiled = torch.compile(lambda x: x + 1, backend=attnfx.backend.attnfx, options={"inner": "eager"})
        compiled(torch.ones(2))
    finally:
        torch._logging.set_logs()
        torch._logging._internal._set_log_state(state)
    assert "attnfx: no attention found" in capfd.readouterr().err


def test_a_warning_comes_once_until_dynamo_is_reset() -> None:
    def told() -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logs.warn("one and the same sentence of this test")
        return sum(w.category is AttnfxWarning and w.filename == __file__ for w in caught)

    torch._dynamo.reset()
    assert [told(), told()] == [1, 0]
    torch._dynamo.reset()
    assert told() == 1
