"""The JSON schema of policy files, for editors: made from the dataclasses of rules and variants."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from attnfx import variants
from attnfx.policies.conditions import NAMES
from attnfx.policies.rule import KEEP, SELECTORS, WORDS, Rule
from attnfx.variants.base import Variant

_RANGES = r"^\d{1,6}(-\d{1,6})?( *, *\d{1,6}(-\d{1,6})?)*$"
_ENDLESS = r"^\d{1,6}(-(\d{1,6})?)?( *, *\d{1,6}(-(\d{1,6})?)?)*$"
_SIZES = ", ".join(f"{name} ({what})" for name, what in NAMES.items())

DESCRIPTIONS = {
    "modules": 'Module paths: a glob such as "model.layers.[0-31].*" (`*` any run of characters, dots included, `?` one character, '
    '`[0-31]` or `[0,4,8-11]` whole numbers, `[abc]` one of these), or "re:" and a regular expression. The whole path has to '
    'match. Default: "*".',
    "layers": 'Numbers of layers: "3", "0-3,8" or "24-". The layer is the first number among the parts of a module path.',
    "kind": "What the attention is, any of: self (its keys are made of the queries' own tensor), cross (of another one), causal "
    "(no query sees keys after it), decode (one query), linear (no softmax over the keys).",
    "pattern": "How the model spells it, as the report says, any of these.",
    "device": 'The type of its device, any of these; AMD\'s GPUs are "cuda" too.',
    "phase": "What the graph is compiled for, any of: training (gradients are wanted), prefill (several queries), decode (one).",
    "when": f'A condition such as "kv_len >= 8192 and head_dim <= 128" over {_SIZES}: comparisons, `and`, `or`, `not`, '
    "`+ - * // %`.",
    "heads": 'Query heads that the variant serves, "0-3,8"; all others stay exact.',
    "variant": 'What runs: "keep" (exact), the name of a variant, a table with its "name" and parameters, or a list of these, of '
    "which the first one without an objection runs.",
}
"""What each key of a rule says."""


def schema() -> dict[str, Any]:
    """The schema of a policy file."""
    known = variants.all()
    properties = {name: {**_selector(name), "description": DESCRIPTIONS[name]} for name in SELECTORS}
    rule = {
        "type": "object",
        "description": (inspect.getdoc(Rule) or "").partition("\n")[0],
        "properties": {**properties, "variant": {"$ref": "#/$defs/choice", "description": DESCRIPTIONS["variant"]}},
        "required": ["variant"],
        "anyOf": [{"required": [name]} for name in SELECTORS],
        "additionalProperties": False,
    }
    whole = [name for name, variant in known.items() if not _required(variant)]
    one = {
        "anyOf": [
            {"const": KEEP, "description": "Leave the attention exact."},
            {"enum": whole, "description": "A variant with its defaults."},
            *({"$ref": f"#/$defs/{name}"} for name in known),
        ]
    }
    several = {"type": "array", "items": {"$ref": "#/$defs/one"}, "minItems": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "attnfx policy",
        "type": "object",
        "properties": {
            "$schema": {"type": "string", "description": "For editors."},
            "default": {"$ref": "#/$defs/choice", "description": "What runs where no rule matches; without it, exact."},
            "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}, "description": "Tried in order; the first match wins."},
        },
        "additionalProperties": False,
        "$defs": {
            "rule": rule,
            "choice": {"anyOf": [{"$ref": "#/$defs/one"}, several]},
            "one": one,
            **{name: _variant(name, variant) for name, variant in known.items()},
        },
    }


def _selector(name: str) -> dict[str, Any]:
    if name in WORDS:
        word = {"enum": list(WORDS[name])}
        return {"anyOf": [word, {"type": "array", "items": word, "minItems": 1}]}
    if name in ("layers", "heads"):
        pattern = _ENDLESS if name == "layers" else _RANGES
        return {"anyOf": [{"type": "string", "pattern": pattern}, {"type": "integer", "minimum": 0}]}
    return {"type": "string", "minLength": 1}


def _required(variant: type[Variant]) -> list[str]:
    given = dataclasses.fields(variant)  # type: ignore[arg-type]  # every subclass is a dataclass
    return [f.name for f in given if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


def _variant(name: str, variant: type[Variant]) -> dict[str, Any]:
    hints = typing.get_type_hints(variant)
    properties: dict[str, Any] = {"name": {"const": name}}
    for field in dataclasses.fields(variant):  # type: ignore[arg-type]
        default = {} if field.default is dataclasses.MISSING else {"default": _plain(field.default)}
        properties[field.name] = {**_type(hints[field.name]), **default}
    return {
        "type": "object",
        "description": " ".join((inspect.getdoc(variant) or "").partition("\n\n")[0].split()),
        "properties": properties,
        "required": ["name", *_required(variant)],
        "additionalProperties": False,
    }


def _type(hint: Any) -> dict[str, Any]:
    """The schema of a parameter by its annotation; tuples are lists in files, and heads with their variants are a table."""
    plain = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    if hint in plain:
        return {"type": plain[hint]}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return {"anyOf": [_type(argument) for argument in arguments]}
    if typing.get_origin(hint) is tuple:
        if any(Variant in typing.get_args(inner) for argument in arguments for inner in typing.get_args(argument)):
            return {"type": "object", "patternProperties": {_RANGES: {"$ref": "#/$defs/one"}}, "additionalProperties": False}
        return {"type": "array", "items": _type(arguments[0])}
    return {}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
