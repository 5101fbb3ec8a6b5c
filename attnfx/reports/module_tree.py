"""The modules of a report as a tree: what is below a module, with the attentions at its leaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Leaf = TypeVar("Leaf")


@dataclass
class Branch(Generic[Leaf]):
    """A module, or a chain of modules that have nothing else below them: ``name`` is "layers" or "0.self_attn"."""

    name: str
    leaves: list[Leaf] = field(default_factory=list)
    below: dict[str, Branch[Leaf]] = field(default_factory=dict)


def tree(placed: Iterable[tuple[str, Leaf]]) -> Branch[Leaf]:
    """The tree of ``(module path, leaf)``; chains are joined."""
    root: Branch[Leaf] = Branch("")
    for path, leaf in placed:
        at = root
        for part in path.split(".") if path else ():
            at = at.below.setdefault(part, Branch(part))
        at.leaves.append(leaf)
    return _joined(root)


def _joined(branch: Branch[Leaf]) -> Branch[Leaf]:
    below = {name: _joined(child) for name, child in branch.below.items()}
    if branch.name and not branch.leaves and len(below) == 1:
        (child,) = below.values()
        return Branch(f"{branch.name}.{child.name}", child.leaves, child.below)
    return Branch(branch.name, branch.leaves, below)
