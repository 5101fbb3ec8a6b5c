"""Models that are linear attention already run in the same kernels, exactly: nothing is asked for, and no policy is there.

Three layers as their papers' code writes them: a linear transformer by running sums, with a state for each token, and
two from weights of all pairs, a RetNet with a decay for each head and ReLU attention of an image. Values and gradients are compared
with float64, beside what eager gives.

python examples/own_linear_attention.py
"""

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnfx


def linear_transformer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al. 2020, causal: a state of D x D numbers for each token."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    total = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2)) + 1e-6
    return torch.einsum("bhnd,bhnde->bhne", q, state) / total[..., None]


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sun et al. 2023, parallel: weights of all pairs, a decay for each head."""
    n, heads = q.shape[2], q.shape[1]
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=q.dtype))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    decay = torch.where(i >= j, gamma[:, None, None] ** (i - j), 0.0)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 * decay) @ v


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the patches of an image: every patch sees all others."""
    weights = F.relu(q) @ F.relu(k).transpose(-1, -2)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


class Layer(nn.Module):
    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def results(model: nn.Module, x: Tensor) -> tuple[list[Tensor], float]:
    """The output and the gradients of the parameters, and the seconds of a second step."""
    for _ in range(2):
        start = time.perf_counter()
        out = model(x)
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return [out, *gradients], time.perf_counter() - start


torch.manual_seed(0)
x = torch.randn(1, 1024, 64)
for attend in (linear_transformer, retention, relu_attention):
    layer = Layer(attend)
    report = attnfx.explain(layer, x)
    print(f"{attend.__name__}\n{report}")
    assert [(site.decision, site.exact) for site in report.sites] == [("linear", True)]
    exact, _ = results(copy.deepcopy(layer).double(), x.double())
    eager, before = results(layer, x)
    ours, after = results(attnfx.compile(layer, inner="aot_eager"), x)
    far = [max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)) for found in (ours, eager)]
    print(f"largest error of values and gradients beside float64: {far[0]:.1e}, eager's {far[1]:.1e}")
    print(f"a step of training: {1e3 * after:.0f} ms, eager's {1e3 * before:.0f} ms\n")
    assert far[0] < 2 * far[1] + 1e-6
