"""Where Dynamo ended a graph: what runs there is in no graph, so that an attention in it cannot be seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Break:
    """The line of the user's code at which a graph ended, and Dynamo's reason, a sentence."""

    source: str
    reason: str


def break_of(gm: fx.GraphModule) -> tuple[Break, ...]:
    """Why Dynamo handed ``gm`` over, where it was for a graph break; nothing where the function was at its end."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return ()
    frame = why.user_stack[-1] if why.user_stack else None
    source = f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}" if frame is not None else ""
    return (Break(source, _sentence(why.reason)),)


def with_hidden(breaks: tuple[Break, ...], counted: Iterable[str]) -> tuple[Break, ...]:
    """``breaks``, and the reasons that Dynamo ``counted`` for graphs that it did not hand over, since nothing was in them."""
    known = {b.reason for b in breaks}
    return (*breaks, *(Break("", text) for text in dict.fromkeys(map(_sentence, counted)) if text not in known))


def _sentence(reason: object) -> str:
    return (str(reason).strip().splitlines() or [""])[0]
