"""Conditions of rules: what they mean, what they refuse, and that a length that changes is guarded and not compiled anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfx.backend import attnfx, listeners
from attnfx.errors import PolicyError
from attnfx.policies.conditions import Condition
from attnfx.policy import Policy, Rule
from attnfx.report import Report
from attnfx.variants import SlidingWindow

SIZES = {"batch": 2, "heads": 8, "kv_heads": 2, "q_len": 100, "kv_len": 300, "head_dim": 64, "value_dim": 64}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("kv_len >= 300", True),
        ("kv_len > 300", False),
        ("100 < kv_len <= 300", True),
        ("kv_len >= 8192 or head_dim == 64 and not heads < 8", True),
        ("kv_len - q_len == 200", True),
        ("kv_len // 7 * 7 + kv_len % 7 == kv_len", True),
        ("heads != 4 * kv_heads", False),
        ("-kv_len < 0", True),
    ],
)
def test_what_conditions_mean(text: str, want: bool) -> None:
    assert Condition(text).holds(SIZES) is want


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it must be text such as"),
        (7, "it must be text such as"),
        ("kv_len >=", "cannot be read"),
        ("kv_len", "where a comparison"),
        ("kv_len >= 8192; q_len", "cannot be read"),
        ("kv_lne >= 8192", 'has "kv_lne"; known are .* Did you mean "kv_len"'),
        ("kv_len >= 'a'", "where a whole number"),
        ("kv_len >= 0.5", "where a whole number"),
        ("kv_len >= True", "where a whole number"),
        ("__import__('os').system('true') == 0", "where a whole number"),
        ("kv_len.real > 3", "where a whole number"),
        ("kv_len ** 9 > 3", "where a whole number"),
        ("kv_len in heads", "where a comparison"),
        ("kv_len // 0 == 1", "divides by"),
        ("kv_len % heads == 1", "divides by"),
        ("1 < " * 200 + "2", "characters"),
        ("not " * 40 + "1 < 2", "nested more than"),
        ("(" * 120 + "1 < 2" + ")" * 120 + " < 3", "where a whole number"),
        (f"kv_len < {10**30}", "where a whole number"),
    ],
)
def test_what_they_refuse(text: Any, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Condition(text)


def test_rules_with_conditions_survive_a_file(tmp_path: Path) -> None:
    policy = Policy([Rule("a.*", SlidingWindow(4), when="kv_len >= 8192", phase="prefill"), Rule("*", None, phase="decode")])
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy


def test_a_file_names_the_rule_of_a_bad_condition(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[[rules]]\nmodules = "*"\nvariant = "keep"\nwhen = "kv_len > x"\n', encoding="utf-8")
    with pytest.raises(PolicyError, match='rule 1, when: The condition "kv_len > x" has "x"'):
        Policy.load(path)
    with pytest.raises(PolicyError, match="The phase is 'decoding'; known are"):
        Rule("*", None, phase="decoding")


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


WINDOW = SlidingWindow(3)


def run(policy: Policy, lengths: list[int], grad: bool = False, dynamic: bool = False) -> tuple[list[bool], list[str]]:
    """Whether each length was served in a window, and the variants of all compiles that they needed."""
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    torch._dynamo.reset()
    model, served = Attention(), []
    options = {"inner": "eager", "strict": True, "policy": policy}
    try:
        compiled = torch.compile(nn.Sequential(model), backend=attnfx, dynamic=dynamic, options=options)
        for n in lengths:
            x = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n), requires_grad=grad)
            heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
            got, want = compiled(x), WINDOW.reference(heads, heads, heads, 8**-0.5, causal=True)
            served.append(torch.allclose(got, want, atol=1e-5))
            assert served[-1] or torch.allclose(got, model(x), atol=1e-5)
    finally:
        listeners.reset(token)
    return served, [str(report.sites[0].variant) for report in reports]


def test_a_length_is_guarded_and_compiled_once_for_each_side() -> None:
    policy = Policy([Rule("*", WINDOW, when="kv_len >= 32")])
    lengths = [20, 25, 31, 40, 32, 50, 21]
    assert run(policy, lengths, dynamic=True) == ([n >= 32 for n in lengths], ["None", str(WINDOW)])


@pytest.mark.parametrize("length", [20, 40])
def test_a_known_length_decides_at_once(length: int) -> None:
    served, variants = run(Policy([Rule("*", WINDOW, when="kv_len >= 32")]), [length])
    assert served == [length >= 32]
    assert variants == [str(WINDOW) if length >= 32 else "None"]


@pytest.mark.parametrize(
    ("phase", "grad", "served"), [("training", True, True), ("training", False, False), ("prefill", False, True)]
)
def test_phases(phase: str, grad: bool, served: bool) -> None:
    assert run(Policy([Rule("*", WINDOW, phase=phase)]), [20], grad)[0] == [served]
