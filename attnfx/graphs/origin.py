"""Where a site comes from: the module path and the source line of the user's own code."""

from __future__ import annotations

import re

from torch import fx

from attnfx.graphs.mirror import Mirror
from attnfx.site import Origin

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)')


def origin_of(mirror: Mirror, node: fx.Node) -> Origin:
    """The module path (``model.layers.0.self_attn``), innermost source line and Dynamo node of a mirror node."""
    maker = mirror.origin.get(node)
    if maker is None:
        return Origin(node=node.name)
    return Origin(module=module_path(maker), source=source_line(maker), node=maker.name)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that made a Dynamo node, as ``model.named_modules()`` spells it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # Dynamo writes L['self'].model.layers[0].self_attn, or L['self']._modules['model']..., with user-chosen local names in front.
    path = re.sub(r"\._modules\['([^']+)'\]|\.getattr\(([^)]*)\)", lambda m: "." + (m.group(1) or m.group(2)), path)
    path = re.sub(r"^L\['[^']*'\]", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.lstrip(".")


def source_line(node: fx.Node) -> str:
    """``file:line: code`` of the innermost frame, or ''."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}: {frames[-1][2].strip()}" if frames else ""
