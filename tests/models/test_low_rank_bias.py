"""LowRankBias in Swin V1 and V2: their tables of relative positions, and the small network that makes one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model

import attnfx
from attnfx import measure
from attnfx.backend import listeners
from attnfx.report import Report
from attnfx.variants import LowRankBias


def swin() -> nn.Module:
    """Windows of 8 x 8; the tables fall off with the distance, as trained ones do."""
    torch.manual_seed(0)
    model = SwinModel(SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=8)).eval()
    x = torch.arange(-7.0, 8.0)
    squared = (x[:, None].square() + x.square()).flatten()
    with torch.no_grad():
        for name, table in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                table.copy_(torch.stack([3 * (-squared / 80).exp(), -2 * (-squared / 200).exp()], 1))
    return model


def swin_v2() -> nn.Module:
    torch.manual_seed(0)
    config = Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=8)
    return Swinv2Model(config).eval()


def compiled(model: nn.Module, variant: LowRankBias, images: Tensor) -> tuple[Tensor, Report]:
    torch._dynamo.reset()
    reports: list[Report] = []
    token = listeners.set((reports.append,))
    try:
        found = attnfx.compile(model, [attnfx.Rule("*.attention*", variant)], strict=True, inner="eager")(images)
    finally:
        listeners.reset(token)
    (report,) = reports
    return found.last_hidden_state, report


@pytest.mark.parametrize("make", [swin, swin_v2])
@pytest.mark.parametrize("rank", [4, 14])
@torch.no_grad()
def test_the_model_is_as_near_as_its_biases(make: Callable[[], nn.Module], rank: int) -> None:
    model, images = make(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    want = model(images).last_hidden_state
    found, report = compiled(model, LowRankBias(rank=rank), images)
    assert [site.exact for site in report.sites] == [False, False]
    for site in report.sites:
        assert f"rank of each head {rank}, {rank};" in site.biases[0] or make is swin
        assert "T" in site.biases[0]
    assert any("-100" in str(site.site) for site in report.sites), "the mask of shifted windows stays"
    largest = max(float(e) for s in report.sites for e in s.biases[0].split("of each head ")[2].split(", row")[0].split(", "))
    assert measure.difference(found, want) < largest
    for half in (torch.bfloat16, torch.float16):
        eager = measure.difference(make().to(half)(images.to(half)).last_hidden_state, want)
        found, _ = compiled(make().to(half), LowRankBias(rank=rank), images.to(half))
        assert measure.difference(found, want) < 1.5 * eager + largest


@torch.no_grad()
def test_v2_reads_its_network_and_stays_exact_within_a_small_tolerance() -> None:
    model, images = swin_v2(), torch.randn(1, 3, 32, 32)
    found, report = compiled(model, LowRankBias(tolerance=1e-4), images)
    assert [site.exact for site in report.sites] == [True, True]
    assert "LowRankBias leaves it exact" in report.sites[0].reason
    names = "".join(report.sites[0].buffers)
    assert "continuous_position_bias_mlp.0.weight" in names
    assert "relative_coords_table" in names
    assert measure.difference(found, model(images).last_hidden_state) < 1e-5
