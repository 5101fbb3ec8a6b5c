"""A bias that depends on data, as a product of what two small networks make of each token: FlashBias for AlphaFold's pair bias."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnfx.errors import PolicyError
from attnfx.variants import dense
from attnfx.variants.base import Example, Variant

if TYPE_CHECKING:
    from attnfx.site import AttentionSite


@dataclass(frozen=True)
class NeuralBias(Variant):
    """A bias projected from a pair representation, `linear(z)[i, j, h]`, as `phi_q(i, h) . phi_k(j, h)` from networks of tokens.

    `path` names the file that `attnfx.fit_neural_bias` wrote: networks by module path, of which the site's own are taken.
    They are given what a graph has at hand of each token: the means of its row and column of z, and its own element. The S x S
    bias is then neither computed nor read. For inference: the projection gets no gradient. How good the fit is depends on the
    data; the report tells what it was when fitted, and `attnfx.verify` measures the model.
    """

    path: str

    paper: ClassVar[str] = "FlashBias: Fast Computation of Attention with Bias (arXiv:2505.12044), NeurIPS 2025"
    exactness: ClassVar[str] = "approximate, needs fitted networks"

    def __post_init__(self) -> None:
        given: Any = self.path
        if not isinstance(given, str) or not given:
            raise PolicyError(f"NeuralBias.path is {given!r}; it must be the path of a file that attnfx.fit_neural_bias wrote.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example(cls("networks.pt"), plain=False),)

    def objections(self, site: "AttentionSite") -> tuple[str, ...]:
        if site.queries != site.keys:
            return (f"The site has {site.queries} queries and {site.keys} keys; a pair representation is of one list of tokens.",)
        return ()

    def apply(self, site: "AttentionSite") -> "AttentionSite":
        """The site itself: what stands for its bias depends on the networks (:mod:`attnfx.biases.neural`)."""
        return site

    def reference(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        *,
        causal: bool = False,
        keep: torch.Tensor | None = None,
        factors: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`factors` are phi_q (B, H, M, R) and phi_k (B, H, N, R)."""
        M, N = q.shape[2], k.shape[2]
        z = dense.scores(q, k, scale)
        if factors is not None:
            z = z + torch.einsum("bhir,bhjr->bhij", *factors)
        return dense.mixed(dense.softmax(z, dense.seen(M, N, causal, keep, q.device)), v)
