"""A fixed bias as a product of two thin matrices: FlashBias by singular values."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnfx.errors import PolicyError
from attnfx.variants import dense
from attnfx.variants.base import Example, Variant, whole_number

if TYPE_CHECKING:
    from attnfx.site import AttentionSite


@dataclass(frozen=True)
class LowRankBias(Variant):
    """The bias that a module adds to its scores, as `sum_r u_r(h, i) v_r(h, j)`, from the singular values of what it is now.

    For biases computed from positions, buffers, and parameters that are not trained in this call: a table of relative positions,
    one for each window of a field, the small network of Swin V2. Each head has the least rank whose largest error, once the mean
    of each row is taken out, is at most `tolerance` in logits. A bias that would need more than pays (its columns beside query
    and key against reading the bias), or more than 32, stays exact, and the report says so. `rank` is the most that a head
    gets, however large its error then is. Masks stay as they are. Other values of the bias compile anew.
    """

    rank: int | None = None
    tolerance: float = 1e-3

    paper: ClassVar[str] = "FlashBias: Fast Computation of Attention with Bias (arXiv:2505.12044), NeurIPS 2025"
    exactness: ClassVar[str] = "approximate, training-free"

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole_number(self, "rank", least=1)
        given: Any = self.tolerance
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
            raise PolicyError(f"LowRankBias.tolerance is {given!r}; it must be a number of logits, 0 or more.")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (
            Example(cls(), plain=False),
            Example(cls(rank=5), plain=False),
            Example(cls(tolerance=0.01), causal=False, plain=False),
        )

    def objections(self, site: "AttentionSite") -> tuple[str, ...]:
        sizes = {"heads": site.heads, "key heads": site.key_heads, "queries": site.queries, "keys": site.keys}
        found = {name: size for name, size in sizes.items() if not size.is_Integer}
        return tuple(
            f"The number of {name} is {size}; factors are made for a number that is known." for name, size in found.items()
        )

    def apply(self, site: "AttentionSite") -> "AttentionSite":
        """The site itself: what stands for its bias depends on the values (:mod:`attnfx.biases.low_rank`)."""
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
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`bias` is (H, M, N); each head's is replaced by its best approximation, in least squares, of the least rank within
        the tolerance, its row means apart."""
        M, N = q.shape[2], k.shape[2]
        z = dense.scores(q, k, scale)
        if bias is not None:
            centred = bias - bias.mean(-1, keepdim=True)
            z = z + torch.stack([self._approximated(head) for head in centred])
        return dense.mixed(dense.softmax(z, dense.seen(M, N, causal, keep, q.device)), v)

    def _approximated(self, head: torch.Tensor) -> torch.Tensor:
        U, S, Vh = torch.linalg.svd(head, full_matrices=False)  # (M, R), (R), (R, N)
        ranks = range((self.rank if self.rank is not None else len(S)) + 1)
        made: list[torch.Tensor] = [(U[:, :r] * S[:r]) @ Vh[:r] for r in ranks if r <= len(S)]
        return next((m for m in made if (head - m).abs().max() <= self.tolerance), made[-1])
