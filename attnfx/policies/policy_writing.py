"""Policies as the text of TOML, YAML and JSON files, from the same plain data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

_SAYS = (
    "attnfx policy: which variant serves which attention. Rules are tried in order and the first match wins;",
    'an attention that no rule matches has the default, or is rewritten exactly, and so is one whose variant is "keep".',
)
_HEADER = "".join(f"# {line}\n" for line in _SAYS)


def toml(data: Mapping[str, Any]) -> str:
    """A table under [[rules]] for each rule."""
    default = f"\ndefault = {_toml(data['default'])}\n" if "default" in data else ""
    tables = ["".join(f"{name} = {_toml(value)}\n" for name, value in rule.items()) for rule in data["rules"]]
    return _HEADER + default + "".join(f"\n[[rules]]\n{table}" for table in tables)


def in_yaml(data: Mapping[str, Any]) -> str:
    """Block style; variants and lists in one line."""
    text: str = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    return f"{_HEADER}\n{text}"


def in_json(data: Mapping[str, Any]) -> str:
    """Indented by two."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


WRITERS = {"toml": toml, "yaml": in_yaml, "json": in_json}
"""By format."""


class _Dumper(yaml.SafeDumper):
    """Without aliases, which policies do not have."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


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
