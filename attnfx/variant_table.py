"""The variants as rows of plain text: what `attnfx variants` and the docs' table print."""

import dataclasses
import inspect
from collections.abc import Mapping

from attnfx.variants.base import Variant


def described(variants: Mapping[str, type[Variant]]) -> list[dict[str, str]]:
    """For each variant its name, parameters with types and defaults, exactness, paper, summary and docstring."""
    return [
        {
            "name": name,
            "parameters": ", ".join(_parameter(field) for field in dataclasses.fields(variant)),  # type: ignore[arg-type]
            "exactness": variant.exactness,
            "paper": variant.paper,
            "summary": (inspect.getdoc(variant) or "").partition("\n")[0],
            "doc": inspect.getdoc(variant) or "",
        }
        for name, variant in variants.items()
    ]


def _parameter(field: "dataclasses.Field[object]") -> str:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return f"{field.name}: {kind}" + ("" if field.default is dataclasses.MISSING else f" = {field.default!r}")
