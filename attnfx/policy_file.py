"""Policies as TOML: data only. Reading one runs no code of the file's, and errors say which file, rule and key."""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnfx import variants
from attnfx.conditions import Condition
from attnfx.errors import PolicyError, listing, nearest
from attnfx.files import replace_file
from attnfx.globs import Glob
from attnfx.variants.base import Variant

KEEP = "keep"
"""How files and rules spell "leave this attention exact"."""

_HEADER = """\
# attnfx policy: which variant serves which attention. Rules are tried in order and the first match wins;
# an attention that no rule matches is rewritten exactly, and so is one whose variant is "keep".
"""


def read_rules(path: Path) -> list[dict[str, Any]]:
    """The arguments of the file's rules, in order."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise PolicyError(f"The policy file {path} cannot be read: {problem.strerror or problem}.") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise PolicyError(f"The policy file {path} is not TOML: {problem}.") from problem
    _known(data, ("rules",), str(path))
    rules = data.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise PolicyError(f'{path}: "rules" is {rules!r}; it must be tables, each under its own [[rules]].')
    return [_rule(rule, f"{path}, rule {number}") for number, rule in enumerate(rules, 1)]


def write_rules(path: Path, rules: Iterable[Mapping[str, Any]]) -> None:
    """Write the rules, given by their arguments, as TOML and move the finished file into place."""
    tables = []
    for rule in rules:
        variant = rule["variant"]
        values = {**rule, "variant": variant.to_dict() if variant else KEEP}
        lines = "".join(f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None)
        tables.append(f"\n[[rules]]\n{lines}")
    replace_file(path, _HEADER + "".join(tables))


def _rule(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    _known(table, ("modules", "variant", "when", "phase"), where)
    for key in ("modules", "variant"):
        if key not in table:
            raise PolicyError(f'{where}: the key "{key}" is missing; a rule has "modules" and "variant".')
    try:
        if "when" in table:
            Condition(table["when"])
        return {**table, "modules": Glob(table["modules"]).text, "variant": _variant(table["variant"])}
    except PolicyError as problem:
        raise PolicyError(f"{where}: {problem}") from None


def _variant(value: Any) -> Variant | None:
    if value == KEEP:
        return None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise PolicyError(
            f'"variant" is {value!r}; it must be "{KEEP}" or a table such as {{ name = "SlidingWindow", window = 1024 }}.'
        )
    return variants.named(value["name"]).from_dict(value)


def _known(table: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in allowed:
            raise PolicyError(f'{where}: the key "{key}" is unknown; allowed are {listing(allowed)}.{nearest(key, allowed)}')


def _toml(value: Any) -> str:
    """A value as TOML. JSON's strings are TOML's, but for the one control character that JSON lets stand."""
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{_key(key)} = {_toml(item)}' for key, item in value.items() if item is not None)} }}"
    raise TypeError(f"{value!r} is a {type(value).__name__}, which a policy file cannot hold")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
