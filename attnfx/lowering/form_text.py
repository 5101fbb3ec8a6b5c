"""The form of a term of a bias in words, for reports."""

from __future__ import annotations

from attnfx.lowering.forms import Choice

LONGEST = 120


def sentence(choice: Choice) -> str:
    """One line: ``bias T0[h]·(j - i): one number for each key; what all keys of a row share is dropped; 2 slots``."""
    term = str(choice.term)
    term = term if len(term) <= LONGEST else term[: LONGEST - 4] + " ..."
    parts = [f"bias {term}: {_form(choice)}", choice.why, f"{choice.slots:.3g} slots and {choice.bytes:.3g} bytes a score"]
    return "; ".join(p for p in parts if p) + "."


def _form(choice: Choice) -> str:
    if choice.form == "data":
        return "loaded"
    if choice.form == "formula":
        return "computed in the tile"
    if choice.form == "band":
        return "a product of each query with the vector of a distance, computed block by block"
    if choice.form == "key":
        return "one number for each key; what all keys of a row share is dropped"
    if choice.form == "products":
        return f"rank {choice.rank}: products of a number of the query and one of the key, what all keys of a row share dropped"
    if choice.form == "distance":
        return (
            "table[h, i - j], one number for each head and distance"
            if "h" in choice.axes
            else "table[i - j], one number a distance"
        )
    return f"table[{', '.join(choice.axes)}], made once a call, small beside the queries"
