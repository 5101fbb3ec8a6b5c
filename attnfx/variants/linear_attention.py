"""Linear attention with a feature map of one's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from attnfx.errors import PolicyError, listing
from attnfx.site import AttentionSite
from attnfx.variants import dense, feature_weights, features, linear
from attnfx.variants.attend import Attend
from attnfx.variants.base import Example, Variant

MAPS = ("identity", "elu", "relu", "exp", "taylor2", "softmax_pair", "cosine")
#: The widest head whose second-order Taylor features, half its square, are served: 2177 of 64.
WIDEST_TAYLOR = 64


@dataclass(frozen=True)
class LinearAttention(Variant):
    """O_i = sum_j lam^(i-j) w_ij v_j / (sum_j lam^(i-j) w_ij + eps) with w_ij = f(q_i).f(k_j) in place of exp(s q_i.k_j).

    `feature_map` is f: "elu" (elu(x) + 1), "relu", "exp", "cosine" (w = 1 + cos(q, k)), "taylor2" (w = 1 + z + z^2 / 2 with
    the model's own logit z), "softmax_pair" (Hedgehog: (softmax(x W), softmax(-x W))), or "identity" (w is the logit itself,
    which may be negative, so it needs `normalize` off). Only "identity" and "taylor2" know the model's scale. `decay`: log lam,
    at most 0, one number or one for each head; for causal attention. Without `normalize` nothing is divided. Keys that the model's
    padding hides take no part. A decode step sums over the keys that the model caches, in time that grows with their number:
    the cache is the model's own. `torch.ops.attnfx.linear_attention_states` keeps a state in its place.

    `path` names a file of trained weights of "softmax_pair", written by `torch.save`: {module path: {"query": (H, D, F), "key":
    (H_k, D, F)}}. Without one, W is the identity, from which Hedgehog starts its training.
    """

    feature_map: str = "elu"
    decay: tuple[float, ...] = ()
    normalize: bool = True
    eps: float = 1e-6
    path: str = ""

    paper: ClassVar[str] = (
        "Katharopoulos et al. 2020, Transformers are RNNs (arXiv:2006.16236); taylor2: Based (arXiv:2402.18668); softmax_pair: "
        "Hedgehog (arXiv:2402.04347); cosine: Li et al. (arXiv:2007.14902)"
    )
    exactness: ClassVar[str] = "another function than softmax, needs training or conversion"

    def __post_init__(self) -> None:
        if self.feature_map not in MAPS:
            raise PolicyError(f'LinearAttention.feature_map is "{self.feature_map}"; known are {listing(MAPS)}.')
        if any(isinstance(d, bool) or not isinstance(d, int | float) or not d <= 0 for d in self.decay):
            raise PolicyError(f"LinearAttention.decay is {self.decay!r}; it must be numbers that are at most 0.")
        if not isinstance(self.eps, int | float) or isinstance(self.eps, bool) or not self.eps >= 0:
            raise PolicyError(f"LinearAttention.eps is {self.eps!r}; it must be a number that is not negative.")
        if self.feature_map == "identity" and self.normalize:
            raise PolicyError('LinearAttention.normalize is on, and the weights of "identity" may add up to nothing; turn it off.')
        if self.path and self.feature_map != "softmax_pair":
            raise PolicyError(f'LinearAttention.path is given, and only "softmax_pair" has weights, not "{self.feature_map}".')

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls()), Example(cls("identity", (-0.1, -0.2, -0.3, -0.4), normalize=False)), Example(cls("relu", eps=0.5)),
            Example(cls("exp", (-0.125,)), queries=9), Example(cls("taylor2")), Example(cls("softmax_pair")),
            Example(cls("cosine"), causal=False), Example(cls("taylor2"), queries=13, causal=False),
        )  # fmt: skip

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        found = [*linear.objections(site, "linear attention", True if self.decay else None, padded=True)]
        if len(self.decay) > 1 and len(self.decay) != site.heads:
            found.append(f"There are {len(self.decay)} decays and {site.heads} heads; one is needed for all, or one for each.")
        if self.feature_map == "taylor2" and site.head_dim > WIDEST_TAYLOR:
            wide = features.taylor_width(site.head_dim)
            found.append(
                f"The head_dim is {site.head_dim}, of which taylor2 makes {wide} features; supported: up to {WIDEST_TAYLOR}."
            )
        if self.feature_map == "taylor2" and not (site.scale or 0.0) > 0.0:
            found.append(f"The scale of the scores is {site.scale}; taylor2 needs a positive one.")
        if self.path:
            weights = self._weights(site)
            found += [weights] if isinstance(weights, str) else []
        return tuple(found)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        site, decay = attend.site, None
        if self.decay:
            each = [self.decay[h % len(self.decay)] for h in range(int(site.heads))]
            decay = torch.tensor(each, dtype=torch.float64, device=attend.device)
        weights = self._weights(site) if self.path else (None, None)
        assert not isinstance(weights, str), weights
        held = [None if w is None else w.to(attend.device, site.dtype) for w in weights]
        query, key = self._mapped(query, site, held[0]), self._mapped(key, site, held[1])
        # autocast computes some of the maps in float32
        query, key = (torch.ops.aten.to.dtype(x, site.dtype) for x in (query, key))
        scale = site.scale if self.feature_map == "identity" and site.scale is not None else 1.0
        eps = self.eps if self.normalize else 0.0
        return linear.attended(attend, query, key, value, decay, self.normalize, eps, scale)

    def _mapped(self, x: Tensor, site: AttentionSite, weight: Tensor | None) -> Tensor:
        if self.feature_map == "identity":
            return x
        if self.feature_map == "taylor2":
            return features.taylor2(x * (site.scale or 1.0) ** 0.5, site.head_dim)
        if self.feature_map == "softmax_pair":
            return features.softmax_pair(x, weight)
        return {"elu": features.elu, "relu": torch.relu, "exp": torch.exp, "cosine": features.cosine}[self.feature_map](x)

    def _weights(self, site: AttentionSite) -> tuple[Tensor, Tensor] | str:
        """This site's own weights, or what is wrong with them."""
        found = feature_weights.load(self.path)
        if isinstance(found, str):
            return found
        if site.origin.module not in found:
            return f'"{self.path}" has no feature map for "{site.origin.module}"; it has {listing(sorted(found)) or "none"}.'
        query, key = found[site.origin.module]
        want = [(int(site.heads), site.head_dim), (int(site.key_heads), site.head_dim)]
        if [w.shape[:2] for w in (query, key)] != want or query.shape[2] != key.shape[2]:
            return f"The weights are {tuple(query.shape)} and {tuple(key.shape)}; the site needs {want[0]} and {want[1]}; F."
        return query, key

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        wide = {"taylor2": features.taylor_width(site.head_dim), "softmax_pair": 2 * site.head_dim}
        return linear.pairs(site, wide.get(self.feature_map, site.head_dim))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, keep: Tensor | None = None
    ) -> Tensor:
        M, N = q.shape[2], k.shape[2]
        z = dense.scores(q, k, scale)
        if self.feature_map == "identity":
            w = z
        elif self.feature_map == "taylor2":
            w = 1 + z + z**2 / 2
        elif self.feature_map == "cosine":
            w = 1 + z / scale / (q.norm(dim=-1)[..., None] * dense.grouped(k, q).norm(dim=-1)[:, :, None])
        elif self.feature_map == "softmax_pair":
            w = dense.scores(q.softmax(-1), k.softmax(-1), 1.0) + dense.scores((-q).softmax(-1), (-k).softmax(-1), 1.0)
        else:
            f = _exp if self.feature_map == "exp" else _relu if self.feature_map == "relu" else _elu
            w = dense.scores(f(q), f(k), 1.0)
        if self.decay:
            behind = torch.arange(M, device=q.device)[:, None] + (N - M) - torch.arange(N, device=q.device)
            log = torch.tensor([self.decay[h % len(self.decay)] for h in range(q.shape[1])], dtype=q.dtype, device=q.device)
            w = w * torch.exp(log[:, None, None] * behind.clamp(min=0))
        return linear.mixed(w, v, dense.seen(M, N, causal, keep, q.device), self.normalize, self.eps)


def _exp(x: Tensor) -> Tensor:
    return x.exp()


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())
