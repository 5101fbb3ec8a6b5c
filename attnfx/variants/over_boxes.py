"""What the variants whose tokens see boxes of a layout share."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import sympy
from torch import Tensor

from attnfx.site import AttentionSite
from attnfx.variants import base, boxed, boxes
from attnfx.variants.attend import Attend
from attnfx.variants.base import Variant
from attnfx.variants.boxes import Boxes


class OverBoxes(Variant):
    """A variant of a ``layout`` of tokens, and perhaps ``extra`` more, that is told by its boxes."""

    layout: tuple[int, ...]
    extra: int = 0

    @abstractmethod
    def seen(self) -> Boxes:
        """What each token sees."""

    @cached_property
    def _boxes(self) -> Boxes:
        return self.seen()

    def objections(self, site: AttentionSite) -> tuple[str, ...]:
        return boxes.objections(site, self.layout, self.extra)

    def compose(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return boxed.attended(attend, query, key, value, self._boxes)

    def pairs(self, site: AttentionSite) -> sympy.Expr:
        return sympy.Min(boxes.pairs(self._boxes), base.pairs(site))
