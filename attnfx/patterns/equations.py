"""Einsum equations of any number of operands, with their ellipses written out."""

from __future__ import annotations

import string

from torch import fx

from attnfx.graphs.mirror import is_tensor, sizes


def letters(node: fx.Node) -> tuple[tuple[str, ...], str] | None:
    """Each operand's letters and the result's of an ``aten.einsum`` node; None where a letter repeats in an operand, the result
    is not written, or the equation does not fit the operands."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    left, arrow, out = equation.partition("->")
    inputs = left.split(",")
    if not arrow or len(inputs) != len(operands) or not all(map(is_tensor, operands)):
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    longest = max(
        (len(sizes(x)) - len(i.replace("...", "")) for i, x in zip(inputs, operands, strict=True) if "..." in i), default=0
    )
    if longest < 0 or longest > len(free):
        return None
    spread = "".join(free[:longest])
    written = []
    for given, x in zip(inputs, operands, strict=True):
        rest = len(sizes(x)) - len(given.replace("...", ""))
        full = given.replace("...", spread[longest - rest :] if rest else "")
        if len(full) != len(sizes(x)) or len(set(full)) != len(full):
            return None
        written.append(full)
    result = out.replace("...", spread)
    known = set("".join(written))
    return (tuple(written), result) if len(set(result)) == len(result) and set(result) <= known and "..." not in result else None
