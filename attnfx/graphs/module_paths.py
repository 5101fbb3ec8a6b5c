"""Module paths that differ only in numbers, written as one: "model.layers.[0-31].self_attn"."""

import math
from collections.abc import Iterable

Numbers = tuple[int, ...]


def fold(modules: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Distinct module paths as (one name, the paths it stands for); the name is a glob that a policy takes as it is."""
    templates: dict[str, dict[Numbers, str]] = {}
    for module in modules:
        parts = module.split(".")
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        template = ".".join("{}" if part.isdecimal() else _escaped(part) for part in parts)
        templates.setdefault(template, {})[numbers] = module
    return [
        (template.format(*map(_ranges, axes)), tuple(paths[numbers] for numbers in members))
        for template, paths in templates.items()
        for axes, members in _boxes(list(paths))
    ]


def _boxes(points: list[Numbers]) -> list[tuple[list[list[int]], list[Numbers]]]:
    """The points split into full boxes: (the numbers along each axis, the points)."""
    axes = [sorted(set(axis)) for axis in zip(*points, strict=True)]
    if math.prod(map(len, axes)) == len(points):
        return [(axes, points)]
    split = next(axis for axis, values in enumerate(axes) if len(values) > 1)
    return [
        box for value in axes[split] for box in _boxes([point for point in points if point[split] == value])
    ]  # fmt: skip


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"[{','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}]"


def _escaped(part: str) -> str:
    return part.replace("{", "{{").replace("}", "}}")
