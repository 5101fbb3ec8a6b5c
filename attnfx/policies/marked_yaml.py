"""YAML with the line of each key. Tags, anchors, aliases and merged keys are refused: a policy is plain data."""

from __future__ import annotations

from typing import Any

import yaml

from attnfx.policies.marked import DEEPEST, LONGEST_NUMBER, MOST_VALUES, Marked, Place, Unreadable, too_deep, too_many, twice

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


def parse(text: str) -> Marked:
    """The data of a YAML text. Raises Unreadable."""
    lines: dict[Place, int] = {}
    try:
        _check(text)
        root = yaml.compose(text, Loader=_LOADER)
        data = None if root is None else _value(root, (), lines, yaml.SafeLoader(""))
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        what = getattr(problem, "problem", None) or str(problem).partition("\n")[0]
        raise Unreadable(f"it is not YAML: {what}", mark.line + 1 if mark else 0) from None
    return Marked(data, lines)


def _check(text: str) -> None:
    """Refuse, event by event, what no policy has: before anything is built."""
    depth = values = 0
    event: Any
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable(f'it has the alias "*{event.anchor}"; aliases are not allowed', line)
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if not isinstance(event, yaml.NodeEvent):
            continue
        values += 1
        if event.anchor is not None:
            raise Unreadable(f'it has the anchor "&{event.anchor}"; anchors are not allowed', line)
        if (tag := getattr(event, "tag", None)) is not None:
            raise Unreadable(f'it has the tag "{tag}"; tags are not allowed', line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if depth > DEEPEST:
            raise too_deep(line)
        if values > 2 * MOST_VALUES:  # keys are counted as well
            raise too_many(line)


def _value(node: Any, place: Place, lines: dict[Place, int], scalars: Any) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*place, k), lines, scalars) for k, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _table(node, place, lines, scalars)
    if node.tag not in _TAGS:
        kind = node.tag.rpartition(":")[2]
        raise Unreadable(f"{node.value[:40]!r} is read as a {kind} by YAML; write it in quotes", line)
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null") and len(node.value) > LONGEST_NUMBER:
        raise Unreadable(f"a number has {len(node.value)} digits", line)
    try:
        return scalars.construct_object(node)
    except (ValueError, yaml.YAMLError):  # "0b", "1:2e"
        raise Unreadable(f"{node.value[:40]!r} is no number", line) from None


def _table(node: Any, place: Place, lines: dict[Place, int], scalars: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise Unreadable("a key is a table or a list; keys are text", line)
        if key.value in found:
            raise twice(key.value, line)
        lines[*place, key.value] = line
        found[key.value] = _value(value, (*place, key.value), lines, scalars)
    return found
