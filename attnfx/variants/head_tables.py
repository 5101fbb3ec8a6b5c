"""Tables with a row for each layer and a number for each head, from a policy or from a file, and predicates of heads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from attnfx import expr
from attnfx.errors import PolicyError
from attnfx.expr import Expr
from attnfx.site import AttentionSite

Row = tuple[float, ...]
#: One row for all sites that a rule names, a row for each layer, or the path of a file with such rows.
Table = Row | tuple[Row, ...] | str


def checked(name: str, table: Any) -> None:
    """Refuse what is no table; a file is read only when it is needed."""
    if isinstance(table, str) and table:
        return
    if not isinstance(table, tuple) or not table or not all(map(_is_row, rows(table))):
        raise PolicyError(f"{name} is {table!r}; it must be numbers, rows of numbers (one row a layer), or the path of a file.")


def rows(table: Table) -> tuple[Row, ...]:
    """The rows of ``table``, read from its file where it is a path: JSON, or lines of numbers with tabs or spaces between."""
    if isinstance(table, str):
        try:
            text = Path(table).read_text(encoding="utf-8")
            found = (
                json.loads(text) if Path(table).suffix == ".json" else [line.split() for line in text.splitlines() if line.strip()]
            )
            table = tuple(tuple(map(float, row)) for row in found) if isinstance(found[0], list) else tuple(map(float, found))
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise PolicyError(f'No table can be read from "{table}": {type(error).__name__}: {error}') from error
    return table if isinstance(table[0], tuple) else (table,)


def layer_of(module: str) -> int | None:
    """The layer of a module by its path: the one number among its parts, as in "model.layers.3.self_attn"."""
    numbers = [int(part) for part in module.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def row_of(table: Table, layer: int | None, module: str = "") -> int:
    """Which row of ``table`` a module has: the only one, that of ``layer``, or that of the number in its path."""
    count = len(rows(table))
    if count == 1 and layer is None:
        return 0
    found = layer_of(module) if layer is None else layer
    if found is None:
        raise PolicyError(
            f'The table has {count} rows, and the path "{module}" does not hold one number that tells which; give `layer`.'
        )
    if found >= count:
        raise PolicyError(f"The table has {count} rows, and none for layer {found}.")
    return found


def objections(site: AttentionSite, table: Table, layer: int | None, counts: Iterable[str] = ("key_heads",)) -> tuple[str, ...]:
    """Why no row of ``table`` tells about the heads of ``site``; ``counts``: which of its numbers of heads a row may have."""
    supported = {name.replace("_", " "): getattr(site, name) for name in counts}
    if not all(n.is_Integer for n in (site.heads, site.key_heads)):
        return (f"The {site.heads} heads and {site.key_heads} key heads are not known; a table needs their numbers.",)
    try:
        found = len(rows(table)[row_of(table, layer, site.origin.module)])
    except PolicyError as error:
        return (str(error),)
    if found in supported.values():
        return ()
    return (f"The row has {found} numbers; the site has {' and '.join(f'{n} {name}' for name, n in supported.items())}.",)


def of_heads(heads: Iterable[int]) -> Expr:
    """Whether the query head h is one of ``heads``."""
    wanted, h = sorted(set(heads)), expr.index("h")
    if not wanted:
        return expr.FALSE
    begins = [wanted[0], *(b for a, b in pairwise(wanted) if b != a + 1)]
    ends = [*(a for a, b in pairwise(wanted) if b != a + 1), wanted[-1]]
    runs = (
        expr.eq(h, expr.integer(a)) if a == b else expr.logical_and(expr.ge(h, expr.integer(a)), expr.le(h, expr.integer(b)))
        for a, b in zip(begins, ends, strict=True)
    )
    return expr.logical_or(*runs)


def _is_row(row: Any) -> bool:
    return isinstance(row, tuple) and bool(row) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in row)
