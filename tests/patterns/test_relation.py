"""Self-attention and cross-attention, told by the graph; and rules of kinds in a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfx
from attnfx.report import Report
from attnfx.variants import AffineScaled


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (f(t).unflatten(-1, (2, 8)).transpose(1, 2) for f, t in ((self.query, x), (self.key, y), (self.value, y)))
        return self.out(F.scaled_dot_product_attention(q * turn, k * turn, v).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


NAMES = {
    "twice_normed": "self", "plain": "self", "fused": "self", "before_norm": "self", "reduced": "self",
    "cross": "cross", "back": "cross", "learned": "cross",
}  # fmt: skip


class Model(nn.Module):
    """Two streams of as many tokens, whose positions, rotated and added, are the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, Fused() if name == "fused" else Attention())
        self.norm, self.halve, self.latent = nn.LayerNorm(16), nn.Conv1d(16, 16, 2, 2), nn.Parameter(torch.randn(1, 6, 16))
        self.register_buffer("frequency", torch.rand(8))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = (torch.arange(6.0)[:, None] * self.frequency).cos()
        added = torch.cat([turn, turn], -1)
        x, y = x + added, y + added
        y = y + self.twice_normed(self.norm(y), self.norm(y), turn)
        x = x + self.plain(x, x, turn)
        x = x + self.fused(self.norm(x))
        x = x + self.before_norm(x, self.norm(x), turn)
        x = x + self.cross(self.norm(x), self.norm(y), turn)
        y = y + self.back(y, x, turn)
        y = y + self.reduced(self.norm(y), self.norm(self.halve(y.mT).mT), turn[:1])
        return x, y, self.learned(self.latent, x, turn)


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    torch._dynamo.reset()
    scaled = AffineScaled(0.5)
    rules = [
        attnfx.Rule(kind="cross", variant=scaled),
        attnfx.Rule(kind="causal", variant=scaled),
        attnfx.Rule(layers="0-3", variant=scaled),
        attnfx.Rule(pattern="flex_attention", variant=scaled),
        attnfx.Rule("plain", kind="self"),
    ]
    with torch.no_grad(), pytest.warns(attnfx.errors.AttnfxWarning):
        return attnfx.explain(Model(), torch.randn(2, 6, 16), torch.randn(2, 6, 16), policy=rules)


def test_what_keys_are_made_of(report: Report) -> None:
    assert {site.module: site.site.origin.relation for site in report.sites} == NAMES


def test_rules_of_kinds_choose(report: Report) -> None:
    assert {site.module: "self" if site.exact else "cross" for site in report.sites} == NAMES


def test_rules_that_matched_nothing_are_warned_of(report: Report) -> None:
    found = [text.partition(" -> ")[0].removeprefix("The policy's rule ") for text in report.policy_warnings]
    assert found == ['"*" kind causal', '"*" layers 0-3', '"*" pattern flex_attention']


def test_what_is_not_projected_here_is_not_told() -> None:
    class Given(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k) + F.scaled_dot_product_attention(q, q, q)

    torch._dynamo.reset()
    tensors = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    report = attnfx.explain(Given(), *tensors, policy=[attnfx.Rule("*", kind="self")])
    assert [site.site.origin.relation for site in report.sites] == ["", "self"]


def test_the_names_of_patterns_are_those_that_a_policy_may_say() -> None:
    import re
    from pathlib import Path

    from attnfx.policies.rule import PATTERNS

    folder = Path(attnfx.__file__).parent / "patterns"
    texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    found = set(re.findall(r'\bpattern="([^"]+)"', texts)) | set(
        re.findall(r'def pattern\(self\) -> str:\s+return "([^"]+)"', texts)
    )
    assert found == set(PATTERNS)
