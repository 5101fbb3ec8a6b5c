"""The variants as rows of plain text: what `attnfx variants` and the docs' table print."""

import dataclasses
import inspect
import re
from collections.abc import Mapping

from attnfx.reports.variant_picture import picture
from attnfx.variants.base import Variant

_INTRODUCTION = """\
# Variants

What a policy can put in place of a model's own attention. This page is written by `attnfx variants --markdown`.

A picture shows which keys (columns) a query (row) sees, two rows a line, in the first example of the variant's tests: `█` both
rows, `▀` the upper, `▄` the lower, `·` none. Heads that differ are drawn apart.
"""


def described(variants: Mapping[str, type[Variant]]) -> list[dict[str, str]]:
    """For each variant its name, parameters with types and defaults, exactness, paper, summary and docstring."""
    return [
        {
            "name": name,
            "parameters": ", ".join(_parameter(field) for field in dataclasses.fields(variant)),  # type: ignore[arg-type]
            "exactness": variant.exactness,
            "paper": variant.paper,
            "summary": _sentence(inspect.getdoc(variant) or ""),
            "doc": inspect.getdoc(variant) or "",
        }
        for name, variant in variants.items()
    ]


def markdown(variants: Mapping[str, type[Variant]]) -> str:
    """The gallery: for each variant its parameters, what it gives up, its docstring, its paper and a picture."""
    rows = described(variants)
    lines = [_INTRODUCTION, "| variant | in a line | exactness |", "|---|---|---|"]
    lines += [f"| [{row['name']}](#{row['name'].lower()}) | {_cell(row['summary'])} | {_cell(row['exactness'])} |" for row in rows]
    for row in rows:
        example = variants[row["name"]].examples()[0]
        seen = f"`{example.variant}`, {example.queries} queries, {example.keys} keys{', causal' if example.causal else ''}:"
        parameters = f"`{row['name']}({row['parameters']})`"
        drawn = f"```text\n{picture(example)}\n```"
        lines += [
            f"\n## {row['name']}\n",
            parameters,
            f"\n{row['doc']}\n",
            f"*{row['exactness']}*. {row['paper']}\n",
            f"{seen}\n",
            drawn,
        ]
    return "\n".join(lines) + "\n"


def _sentence(doc: str) -> str:
    """The first one of a docstring."""
    first = " ".join(doc.partition("\n\n")[0].split())
    found = re.match(r".*?[^.]\.(?=\s|$)", first)
    return found[0] if found else first


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _parameter(field: "dataclasses.Field[object]") -> str:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return f"{field.name}: {kind}" + ("" if field.default is dataclasses.MISSING else f" = {field.default!r}")
