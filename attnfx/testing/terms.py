"""Masks and biases as real code builds them, in the axes that they have, and how they meet the scores."""

from __future__ import annotations

from collections.abc import Callable

from attnfx.testing.program import Bias, Mask, Unspellable
from attnfx.testing.writer import Var, Writer, layout

FILLS = {"-inf": 'float("-inf")', "min": "torch.finfo({s}.dtype).min", "-1e9": "-1e9", "-1e4": "-1e4"}


def add_term(w: Writer, s: Var, term: Bias | Mask) -> Var:
    """The scores with one more bias or mask."""
    if isinstance(term, Mask):
        return masked(w, s, term)
    if term.kind == "constant":
        return w.var("s", f"{s.name} + 1.5", s.axes)
    return added(w, s, w.fitted(bias(w, term), s.axes).name)


def added(w: Writer, s: Var, what: str) -> Var:
    if w.program.inplace and w.pick("iadd", "add_") == "add_":
        w.line(f"{s.name}.add_({what})")
        return s
    if w.program.inplace:
        w.line(f"{s.name} += {what}")
        return s
    return w.var("s", w.pick("{s} + {b}", "{b} + {s}", "torch.add({s}, {b})").format(s=s.name, b=what), s.axes)


def masked(w: Writer, s: Var, mask: Mask) -> Var:
    fill = FILLS[mask.fill].format(s=s.name)
    if mask.fill == "-inf":
        fill = w.pick(fill, "-math.inf", "-torch.inf")
    if mask.how == "where":
        keep = w.fitted(kept(w, mask, True), s.axes)
        return w.var("s", f"torch.where({keep.name}, {s.name}, {fill})", s.axes)
    if mask.how == "masked_fill":
        drop = w.fitted(kept(w, mask, False), s.axes)
        if w.program.inplace:
            w.line(f"{s.name}.masked_fill_({drop.name}, {fill})")
            return s
        return w.var("s", f"{s.name}.masked_fill({drop.name}, {fill})", s.axes)
    return added(w, s, w.fitted(penalty(w, mask, fill, s.name), s.axes).name)


def penalty(w: Writer, mask: Mask, fill: str, like: str) -> Var:
    """What a mask adds: 0 where it keeps, the fill where not."""
    if mask.how == "multiply":
        keep = kept(w, mask, True)
        return w.var("m", f"(1.0 - {keep.name}.to({like}.dtype)) * {fill}", keep.axes)
    if w.flip():
        keep = kept(w, mask, True)
        return w.var("m", f"torch.where({keep.name}, torch.zeros([], dtype={like}.dtype), {fill})", keep.axes)
    drop = kept(w, mask, False)
    zeros = f"torch.zeros({', '.join(w.size(axis) for axis in drop.axes)}, dtype={like}.dtype)"
    return w.var("m", f"{zeros}.masked_fill({drop.name}, {fill})", drop.axes)


def kept(w: Writer, mask: Mask, keep: bool) -> Var:
    """The mask as booleans: true where it keeps, or the opposite."""
    made = _MASKS[mask.kind](w, mask)
    if keep:
        return made
    return w.var("drop", w.pick("~{}", "{}.logical_not()", "{} == False").format(made.name), made.axes)


def bias(w: Writer, term: Bias) -> Var:
    if term.kind not in _BIASES:
        raise Unspellable(term.kind)
    return _BIASES[term.kind](w, term)


def rows(w: Writer, offset: str = "") -> str:
    name = w.let(
        "i",
        w.pick("torch.arange({})[:, None]", "torch.arange({}).unsqueeze(1)", "torch.arange({}).view(-1, 1)").format(w.size("i")),
    )
    return w.let("i", f"{name} + {offset}") if offset else name


def columns(w: Writer) -> str:
    return w.let(
        "j",
        w.pick("torch.arange({})[None, :]", "torch.arange({}).unsqueeze(0)", "torch.arange({}).view(1, -1)").format(w.size("j")),
    )


# Masks: each gives the keys that are kept --------------------------------------------------------------------------------


def _data(w: Writer, mask: Mask) -> Var:
    axes = layout(" ".join(mask.letters.split()), w.program.heads)
    if mask.empty or axes[-1] != ("j",):
        return w.input("keep", axes, "torch.rand({shape}) > 0.4")
    return w.input("keep", axes, f"(torch.rand({{shape}}) > 0.4) | (torch.arange({w.number('j')}) == 0)")


def _causal(w: Writer, mask: Mask) -> Var:
    i, j = rows(w), columns(w)
    return w.var("keep", w.pick("{j} <= {i}", "{i} >= {j}", "({i} - {j}) >= 0", "~({j} > {i})").format(i=i, j=j), (("i",), ("j",)))


def _bottom(w: Writer, mask: Mask) -> Var:
    i, j = rows(w, f"({w.size('j')} - {w.size('i')})"), columns(w)
    return w.var("keep", w.pick("{j} <= {i}", "{i} >= {j}").format(i=i, j=j), (("i",), ("j",)))


def _tril(w: Writer, mask: Mask) -> Var:
    sizes = f"{w.size('i')}, {w.size('j')}"
    how = w.pick("torch.ones({}, dtype=torch.bool).tril()", "torch.tril(torch.ones({})) != 0", "torch.ones(({})).tril().bool()")
    return w.var("keep", how.format(sizes), (("i",), ("j",)))


def _triu(w: Writer, mask: Mask) -> Var:
    sizes = f"{w.size('i')}, {w.size('j')}"
    how = w.pick("~torch.ones({}, dtype=torch.bool).triu(1)", "torch.triu(torch.ones({}), diagonal=1) == 0")
    return w.var("keep", how.format(sizes), (("i",), ("j",)))


def _window(w: Writer, mask: Mask) -> Var:
    i, j = rows(w), columns(w)
    how = w.pick("({j} <= {i}) & ({j} > {i} - 2)", "({i} - {j} >= 0) & ({i} - {j} < 2)", "~(({j} > {i}) | ({i} - {j} >= 2))")
    return w.var("keep", how.format(i=i, j=j), (("i",), ("j",)))


def _band(w: Writer, mask: Mask) -> Var:
    i, j = rows(w), columns(w)
    return w.var("keep", w.pick("({i} - {j}).abs() <= 1", "torch.abs({j} - {i}) < 2").format(i=i, j=j), (("i",), ("j",)))


def _prefix(w: Writer, mask: Mask) -> Var:
    i, j = rows(w), columns(w)
    return w.var("keep", w.pick("({j} <= {i}) | ({j} < 2)", "({j} < 2).logical_or({j} <= {i})").format(i=i, j=j), (("i",), ("j",)))


def _lengths(w: Writer, mask: Mask) -> Var:
    least = 0 if mask.empty else min(1, w.number("j"))
    lengths = w.input("lengths", (("b",),), f"torch.randint({least}, {w.number('j') + 1}, ({{shape}},))")
    return w.var("keep", f"{columns(w)} < {lengths.name}[:, None]", (("b",), ("j",)))


def _documents(w: Writer, mask: Mask) -> Var:
    made = "torch.randint(0, 2, ({shape}))"
    a = w.input("ids", (("b",), ("i",)), made)
    b = a if w.number("i") == w.number("j") and not mask.empty else w.input("key_ids", (("b",), ("j",)), made)
    return w.var("keep", f"{a.name}[:, :, None] == {b.name}[:, None, :]", (("b",), ("i",), ("j",)))


_MASKS: dict[str, Callable[[Writer, Mask], Var]] = {
    "causal": _causal, "data": _data, "bottom": _bottom, "tril": _tril, "triu": _triu, "window": _window, "band": _band,
    "prefix": _prefix, "lengths": _lengths, "documents": _documents,
}  # fmt: skip

# Biases --------------------------------------------------------------------------------


def _free(w: Writer, term: Bias) -> Var:
    made = "torch.randn({shape}).to(dtype)"
    return w.input("bias", layout(term.letters, w.program.heads), made + (".requires_grad_()" if term.learned else ""))


def _sliced(w: Writer, term: Bias) -> Var:
    heads = w.number(w.program.heads)
    made = f"torch.randn({heads}, {w.number('i') + 2}, {w.number('j') + 1}).to(dtype).requires_grad_()"
    name = w.input("bias", (), made).name
    return w.var("bias", f"{name}[:, 1 : {w.size('i')} + 1, : {w.size('j')}]", layout("h i j", w.program.heads))


def _distances(w: Writer) -> str:
    i, j = rows(w), columns(w)
    return w.let("at", f"{j} - {i} + ({w.size('i')} - 1)")


def _table(w: Writer, term: Bias) -> Var:
    table = w.input(
        "table", (), f"torch.randn({w.number(w.program.heads)}, {w.number('i') + w.number('j') - 1}).to(dtype).requires_grad_()"
    )
    return w.var("bias", f"{table.name}[:, {_distances(w)}]", layout("h i j", w.program.heads))


def _embedding(w: Writer, term: Bias) -> Var:
    table = w.input(
        "table", (), f"torch.randn({w.number('i') + w.number('j') - 1}, {w.number(w.program.heads)}).to(dtype).requires_grad_()"
    )
    at = _distances(w)
    return w.var("bias", w.pick(f"F.embedding({at}, {table.name})", f"{table.name}[{at}]"), layout("i j h", w.program.heads))


def _slopes(w: Writer) -> str:
    made = "torch.rand({shape}).to(dtype)" + w.pick("", ".requires_grad_()")
    return w.input("slopes", (tuple(w.program.heads),), made).name


def _alibi(w: Writer, term: Bias) -> Var:
    slopes, i, j = _slopes(w), rows(w), columns(w)
    return w.var("bias", f"{slopes}[:, None, None] * ({j} - {i})", layout("h i j", w.program.heads))


def _alibi_columns(w: Writer, term: Bias) -> Var:
    return w.var("bias", f"{_slopes(w)}[:, None] * {columns(w)}", layout("h j", w.program.heads))


def _alibi_absolute(w: Writer, term: Bias) -> Var:
    slopes, i, j = _slopes(w), rows(w), columns(w)
    return w.var("bias", f"-{slopes}[:, None, None] * ({i} - {j}).abs()", layout("h i j", w.program.heads))


def _t5(w: Writer, term: Bias) -> Var:
    table = w.input("table", (), f"torch.randn(6, {w.number(w.program.heads)}).to(dtype).requires_grad_()")
    i, j = rows(w), columns(w)
    n = w.let("n", w.pick(f"({i} - {j}).clamp(min=0)", f"-torch.min({j} - {i}, torch.zeros_like({j} - {i}))", f"({j} - {i}).abs()"))
    far = w.let("far", f"2 + (torch.log({n}.float() / 2) / math.log(8 / 2) * 4).to(torch.long)")
    far = w.let("far", w.pick(f"{far}.clamp(max=5)", f"torch.min({far}, torch.full_like({far}, 5))"))
    at = w.let("bucket", f"torch.where({n} < 2, {n}, {far})")
    return w.var("bias", w.pick(f"F.embedding({at}, {table.name})", f"{table.name}[{at}]"), layout("i j h", w.program.heads))


def _distance(w: Writer, term: Bias) -> Var:
    if w.flip():
        return _points(w, term)
    i, j = rows(w), columns(w)
    return w.var("bias", f"-0.25 * ({i} - {j}).abs()", (("i",), ("j",)))


def _points(w: Writer, term: Bias) -> Var:
    """Of points in space: a smooth function of how far apart two are, or one that jumps."""
    made = "torch.randn({shape}).to(dtype)" + (".requires_grad_()" if term.learned else "")
    a = w.input("points", (("b",), ("i",), ("x",)), made).name
    b = a if w.number("i") == w.number("j") and w.flip() else w.input("points", (("b",), ("j",), ("x",)), made).name
    apart = w.let("apart", w.pick(f"{a}[:, :, None] - {b}[:, None]", f"{a}.unsqueeze(2) - {b}.unsqueeze(1)"))
    ways = [f"{apart}.pow(2).sum(-1)", f"({apart} * {apart}).sum(dim=-1)", f"{apart}.square().mean(-1)", f"{apart}.abs().sum(-1)",
            f"({a} @ {b}.transpose(-1, -2)).square()"]  # fmt: skip
    if not term.learned and w.program.dtype in ("float32", "float64"):
        ways += [f"torch.cdist({a}, {b})", f"{apart}.norm(dim=-1)"]
    far = w.let("far", w.pick(*ways))
    smooth = (f"-0.5 * {far}", f"torch.exp(-{far})", f"torch.log1p({far})", f"1 / (1 + {far})")
    value = w.pick(*smooth, *smooth, f"({far} < 1.5).to({far}.dtype)", f"({far} * 2).floor()")
    return w.var("bias", value, (("b",), ("i",), ("j",)))


_BIASES: dict[str, Callable[[Writer, Bias], Var]] = {
    "data": _free, "sliced": _sliced, "table": _table, "embedding": _embedding, "alibi": _alibi, "alibi_columns": _alibi_columns,
    "alibi_absolute": _alibi_absolute, "t5": _t5, "distance": _distance,
    "points": _points,
}  # fmt: skip
