"""Linear attentions: a definition by brute force, weights from a file in a model, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from graphs import compiled
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional
from variant_cases import SCALE, site_of, tensors_of

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.policy import Policy, Rule
from attnfx.variants import AgentAttention, Based, Flowformer, Lightning, LinearAttention, TaylorWindow
from attnfx.variants.base import Example, Variant
from attnfx.variants.features import taylor2, taylor_width


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 16])
def test_taylor_features_are_the_polynomial(width: int) -> None:
    x, y = torch.randn(2, 5, width, dtype=torch.float64)
    f, g, z = taylor2(x, width), taylor2(y, width), (x * y).sum(-1)
    assert f.shape[-1] == -(-taylor_width(width) // 16) * 16
    torch.testing.assert_close((f * g).sum(-1), 1 + z + z**2 / 2)


def test_the_taylor_window_by_hand() -> None:
    q, k, v = (t[:1, :2] for t in tensors_of(Example(TaylorWindow(2), 4, 4), torch.float64))
    want = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
    for h in range(2):
        for i in range(4):
            weights = []
            for j in range(i + 1):
                z = SCALE * float(q[0, h, i] @ k[0, h, j])
                weights.append(torch.tensor(z).exp().item() if i - j < 2 else 1 + z + z * z / 2)
            want[0, h, i] = sum(w * v[0, h, j] for j, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(TaylorWindow(2).reference(q, k, v, SCALE, causal=True), want, rtol=1e-6, atol=1e-6)


def test_lightning_slopes() -> None:
    assert Lightning()._decay(4) == [-(2.0**-2), -(2.0**-4), -(2.0**-6), -(2.0**-8)]
    assert Lightning(3, 4)._decay(1) == pytest.approx([-1e-5 * 2.0**-8])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).transpose(1, 2).flatten(2))


def test_hedgehog_takes_each_modules_weights_from_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Model(), torch.randn(2, 23, 16), str(tmp_path / "maps.pt")
    maps: Any = {m: {"query": torch.randn(2, 8, 5), "key": torch.randn(2, 8, 5)} for m in ("first", "second")}
    torch.save(maps, path)
    rules = Policy([Rule(m, LinearAttention("softmax_pair", path=path)) for m in ("first", "second")])
    with torch.no_grad():
        got, report = compiled(model, x, policy=rules)

        def attend(module: str, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in getattr(model, module).qkv(x).chunk(3, -1))
            f, g = ((t @ maps[module][n]) for t, n in ((q, "query"), (k, "key")))
            f, g = (torch.cat([t.softmax(-1), (-t).softmax(-1)], -1) for t in (f, g))
            w = (f @ g.transpose(2, 3)).tril()
            return w / w.sum(-1, keepdim=True) @ v

        want = attend("second", attend("first", x).transpose(1, 2).flatten(2))
    assert len(report.sites) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    del maps["second"]
    torch.save(maps, path)
    with pytest.raises(BackendCompilerFailed, match='has no feature map for "second"'):
        compiled(model, x, policy=rules)


J, ONE = expr.index("j"), Example(LinearAttention())
PLAIN = site_of(ONE, torch.float32)


@pytest.mark.parametrize(
    ("variant", "site", "sentence"),
    [
        (LinearAttention(), PLAIN.replace(score=expr.Score() * 0.25 + expr.cast(J, torch.float32)), "more than q.k"),
        (LinearAttention(), PLAIN.replace(dropout=0.25), "dropout of 0.25"),
        (LinearAttention(), PLAIN.replace(keep=expr.le(J, expr.integer(4))), "not plainly causal"),
        (LinearAttention(), PLAIN.replace(sink=expr.ONE), "a sink"),
        (LinearAttention(decay=(-0.5, -0.25)), PLAIN, "2 decays and 4 heads"),
        (LinearAttention("taylor2"), PLAIN.replace(head_dim=128), "head_dim is 128"),
        (LinearAttention("taylor2"), PLAIN.replace(score=expr.Score() * -1.0), "a positive one"),
        (LinearAttention("softmax_pair", path="/nowhere"), PLAIN, "cannot be read"),
        (Lightning(), PLAIN.replace(keep=expr.TRUE), "defined for causal attention"),
        (AgentAttention(3), PLAIN, "defined for full attention"),
        (AgentAttention(49), PLAIN.replace(keep=expr.TRUE), "37 queries for 49 agents"),
        (Flowformer(), PLAIN.replace(queries=sympy.Integer(1), keep=expr.TRUE), "perhaps the last of a sequence"),
        (TaylorWindow(), PLAIN.replace(queries=sympy.Integer(5), keep=expr.TRUE), "as many of one as of the other"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_refused(variant: Variant, site: Any, sentence: str) -> None:
    assert any(sentence in objection for objection in variant.objections(site)), variant.objections(site)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearAttention("gelu"), lambda: LinearAttention("identity"), lambda: LinearAttention(decay=(0.5,)),
        lambda: LinearAttention(eps=-1.0), lambda: LinearAttention(path="x"), lambda: Lightning(4, 4), lambda: Based(weight=2.0),
        lambda: TaylorWindow(0), lambda: AgentAttention(0), lambda: Flowformer(-1.0),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(make: Any) -> None:
    with pytest.raises(PolicyError):
        make()
