"""Spelling: a program tree as plain torch source. What runs is what is printed."""

from __future__ import annotations

from dataclasses import dataclass

from attnfx.testing import mutations
from attnfx.testing.composite import multi_head
from attnfx.testing.program import Bias, Mask, Program, Unspellable
from attnfx.testing.terms import add_term, bias, kept, penalty
from attnfx.testing.writer import Axes, Var, Writer, layout


@dataclass(frozen=True)
class Source:
    """``code``: a module that defines ``program`` and ``inputs`` when it is run; ``free``: the axes of inputs whose size the
    function reads rather than names, so that a compile may leave them open."""

    function: str
    inputs: str
    free: tuple[tuple[str, int], ...] = ()

    @property
    def code(self) -> str:
        return f"import math\n\nimport torch\nimport torch.nn.functional as F\n\n\n{self.function}\n\n\n{self.inputs}\n"


def source(program: Program) -> Source:
    """The program as code. Raises Unspellable where the tree stands for nothing."""
    w = Writer(program)
    results = _body(w, program)
    function = f"def program({', '.join(w.inputs)}):\n" + "\n".join(f"    {line}" for line in w.lines)
    function += f"\n    return {', '.join(results)}"
    made = [f"dtype = torch.{program.dtype}", f"torch.manual_seed({program.seed})", "inputs = {"]
    made += [f'    "{name}": {value},' for name, value in w.inputs.items()] + ["}"]
    axes = ((name, k, axis) for name, axes in w.shapes.items() for k, axis in enumerate(axes))
    free = tuple((name, k) for name, k, axis in axes if len(axis) == 1 and axis[0] in "bij" and axis[0] in w.sized)
    return Source(function, "\n".join(made), free)


def _body(w: Writer, p: Program) -> list[str]:
    if p.scores.how == "mha":
        return multi_head(w)
    q, k, v = _operands(w)
    if p.scores.how == "sdpa":
        out, extra = _sdpa(w, q, k, v), [k.name, v.name]
    else:
        s = _scores(w, q, k)
        s = mutations.apply(w, "scores", s)
        s = _logits(w, s)
        s = mutations.apply(w, "logits", s)
        weights = mutations.apply(w, "weights", _softmax(w, s))
        narrow = _cast(w, weights, v)
        out = mutations.values(w, narrow, v) or _values(w, narrow, v)
        extra = {"cache": [k.name, v.name], "scores": [s.name], "weights": [weights.name], "sums": [f"{s.name}.sum(-1)"]}.get(
            next(iter(p.output.extra), ""), []
        )
    if p.scores.product == "float" and p.dtype != "float32":
        out = w.var("o", f"{out.name}.to({v.name}.dtype)", out.axes)
    out = mutations.apply(w, "output", out)
    out = w.arrange(out, layout(p.output.tail, p.heads), "o")
    if p.output.linear:
        weight = w.input("weight", (), f"torch.randn(3, {w.number(out.axes[-1])}).to(dtype).requires_grad_()")
        out = w.var("o", f"F.linear({out.name}, {weight.name})", (*out.axes[:-1], ("x",)))
    if p.inplace and (p.scores.how != "sdpa" or p.output.linear) and w.flip():
        w.line(f"{out.name} += 1.0")
    return [out.name, *(extra if p.output.extra else [])]


# Operands --------------------------------------------------------------------------------

_NORMAL = "torch.randn({shape}).to(dtype).requires_grad_()"


def _operands(w: Writer) -> tuple[Var, Var, Var]:
    p = w.program
    if p.storage.packed != "no":
        q, k, v = _packed(w)
    else:
        q = w.input("q", layout(p.storage.query, p.heads), _NORMAL)
        k = w.input("k", layout(p.storage.key, "g"), _NORMAL)
        v = w.input("v", layout(p.storage.value, "g"), _NORMAL)
        if p.shapes:
            w.read_sizes()
    return mutations.apply(w, "query", q), mutations.apply(w, "key", k), mutations.apply(w, "value", v)


def _packed(w: Writer) -> tuple[Var, Var, Var]:
    p, how = w.program, w.program.storage.packed
    if p.sizes.group > 1 or p.sizes.windows or p.sizes.queries != p.sizes.keys or p.sizes.width != p.sizes.value_width:
        raise Unspellable("q, k and v of different sizes in one tensor")
    stored = {"chunk": "b i (x g d)", "split": "b i (x g d)", "unbind": "b i x g d", "index": "x b g i d", "same": "b g i d",
              "linear": "b i (g d)", "inner": "b i g (x d)"}[how]  # fmt: skip
    axes = layout(stored, "g")
    x = w.input("x", axes, _NORMAL)
    if p.shapes:
        w.read_sizes()
    if "i" in w.sized:
        w.sized["j"] = w.sized["i"]
    names = [w.let(name, "None") for name in "qkv"]
    del w.lines[-3:]
    whole = ", ".join(names)
    if how in ("chunk", "inner"):
        w.line(f"{whole} = {x.name}.chunk(3, -1)")
    elif how == "split":
        w.line(f"{whole} = {x.name}.split({w.size('gd')}, dim=-1)")
    elif how == "unbind":
        w.line(f"{whole} = {w.pick('{}.unbind(2)', 'torch.unbind({}, dim=2)').format(x.name)}")
    elif how == "index":
        w.line(f"{whole} = {x.name}[0], {x.name}[1], {x.name}[2]")
    elif how == "same":
        names = [x.name] * 3
    else:
        inner = w.number("gd")
        for name in names:
            weight = w.input(f"w{name}", (), f"torch.randn({inner}, {inner}).to(dtype).requires_grad_()")
            w.line(f"{name} = F.linear({x.name}, {weight.name})")
    parts = tuple(tuple(letter for letter in axis if letter != "x") for axis in axes if axis != ("x",))
    return tuple(  # type: ignore[return-value]
        Var(name, tuple(tuple({"i": i, "d": d}.get(letter, letter) for letter in axis) for axis in parts))
        for name, i, d in zip(names, "ijj", "dde", strict=True)
    )


def _lead(p: Program, text: str) -> Axes:
    return layout(text.replace("b", "b w", 1) if p.sizes.windows and "w" not in text else text, p.heads)


def _repeated(w: Writer, x: Var, lead: Axes) -> tuple[Var, Axes]:
    """Keys or values for every query head that ``lead`` has, and their own lead: an axis of size one where they broadcast."""
    if w.program.sizes.group == 1 or (("g",) in lead and ("r",) in lead and w.program.scores.repeat in ("broadcast", "native")):
        return x, tuple(() if axis == ("r",) else axis for axis in lead)
    if ("g",) not in x.axes:
        x = w.unfolded(x)
    at = x.axis("g")
    if w.program.scores.repeat == "interleave":
        axes = (*x.axes[:at], ("g", "r"), *x.axes[at + 1 :])
        how = w.pick("{x}.repeat_interleave({r}, {d})", "torch.repeat_interleave({x}, {r}, dim={d})")
        return w.var(x.name, how.format(x=x.name, r=w.size("r"), d=at), axes), lead
    spread = w.reshaped(x, (*x.axes[: at + 1], (), *x.axes[at + 1 :]))
    axes = (*x.axes[: at + 1], ("r",), *x.axes[at + 1 :])
    return w.var(x.name, f"{spread.name}.expand({', '.join(w.size(axis) for axis in axes)})", axes), lead


# Scores --------------------------------------------------------------------------------


def _factor(w: Writer, like: str, value: float | None = None) -> str:
    """`` * c`` or `` / c`` in the program's way."""
    scale = w.program.scores.scale
    value = scale.value if value is None else value
    if scale.how == "root":
        root = w.pick("math.sqrt({d})", "{d} ** 0.5", "{d} ** -0.5").format(d=w.number("d"))
        return f" * {root}" if "-" in root else f" / {root}"
    return f" * {value}" if scale.how == "mul" else f" / {1 / value}"


def _scores(w: Writer, q: Var, k: Var) -> Var:
    scale = w.program.scores.scale
    if scale.where in ("query", "both"):
        q = w.var("q", q.name + _factor(w, q.name), q.axes)
    if scale.where in ("key", "both"):
        k = w.var("k", k.name + _factor(w, k.name), k.axes)
    s = _dot(w, q, k)
    return s if scale.where in ("query", "key", "both", "none", "after", "alpha") else _scaled(w, s)


def _scaled(w: Writer, s: Var) -> Var:
    scale = w.program.scores.scale
    if scale.where == "tensor":
        made = w.pick("torch.full([], {c}, dtype={s}.dtype)", "torch.tensor({c}, dtype={s}.dtype)").format(c=scale.value, s=s.name)
        return w.var("s", f"{s.name} {'*' if scale.how == 'mul' else '/'} {made}", s.axes)
    if scale.where in ("input", "heads"):
        axes: Axes = () if scale.where == "input" else (tuple(w.program.heads),)
        made = "(torch.rand({shape}) + 0.5).to(dtype).requires_grad_()" if axes else "torch.tensor(0.7).to(dtype).requires_grad_()"
        factor = w.input("scale", axes, made)
        factor = w.fitted(factor, s.axes) if axes else factor
        return w.var("s", f"{s.name} {'*' if scale.how == 'mul' else '/'} {factor.name}", s.axes)
    if w.program.inplace:
        sign, _, number = _factor(w, s.name).strip().partition(" ")
        w.line(f"{s.name} {sign}= {number}")
        return s
    return w.var("s", s.name + _factor(w, s.name), s.axes)


def _dot(w: Writer, q: Var, k: Var) -> Var:
    p = w.program
    how, lead = p.scores.how, _lead(p, p.scores.lead)
    if how in ("bmm", "baddbmm"):
        lead = (tuple(letter for axis in lead for letter in axis),)
    k, key_lead = _repeated(w, k, lead)
    if how == "einsum":
        full = tuple(axis for axis in lead)
        q = w.arrange(q, _kept_order(q, (*full, ("i",), ("d",))), "q")
        k = w.arrange(k, _kept_order(k, (*(axis for axis in key_lead if axis), ("j",), ("d",))), "k")
        q, k = _floats(w, q, k)
        out = [*lead, ("i",), ("j",)]
        if w.style is not None and w.style.random() < 0.3:
            w.style.shuffle(out)
        return w.einsum(*((k, q) if p.scores.keys_first else (q, k)), tuple(out), "s")
    q, k = w.arrange(q, (*lead, ("i",), ("d",)), "q"), w.arrange(k, (*key_lead, ("j",), ("d",)), "k")
    q, k = _floats(w, q, k)
    if how == "mulsum":
        a, b = w.let("a", f"{q.name}[..., :, None, :]"), w.let("c", f"{k.name}[..., None, :, :]")
        return w.var("s", w.pick(f"({a} * {b}).sum(-1)", f"torch.sum({a} * {b}, dim=-1)"), (*lead, ("i",), ("j",)))
    first, second, letters = (k, q, "ji") if p.scores.keys_first else (q, k, "ij")
    turned = w.permuted(second, (*second.axes[:-2], second.axes[-1], second.axes[-2]), f"{second.name}_t")
    axes: Axes = (*lead, *((letter,) for letter in letters))
    if how == "baddbmm":
        alpha = p.scores.scale.value
        return _baddbmm(w, first, turned, alpha, axes)
    if how == "bmm":
        return w.var("s", f"torch.bmm({first.name}, {turned.name})", axes)
    return w.var("s", w.pick("{a} @ {b}", "torch.matmul({a}, {b})", "{a}.matmul({b})").format(a=first.name, b=turned.name), axes)


def _baddbmm(w: Writer, first: Var, second: Var, alpha: float, axes: Axes) -> Var:
    term = _taken(w.program)
    if term is None:
        shape = ", ".join(w.size(axis) for axis in axes)
        none = w.let("none", f"torch.empty({shape}, dtype={first.name}.dtype)")
        return w.var("s", f"torch.baddbmm({none}, {first.name}, {second.name}, beta=0, alpha={alpha})", axes)
    b = w.fitted(bias(w, term), axes)
    cast = f"{b.name}.to({first.name}.dtype)"
    return w.var("s", f"torch.baddbmm({cast}, {first.name}, {second.name}, beta={w.pick('1.0', '0.5')}, alpha={alpha})", axes)


def _taken(p: Program) -> Bias | None:
    """The bias that goes into baddbmm."""
    first = p.terms[0] if p.terms else None
    return first if isinstance(first, Bias) and first.kind != "constant" else None


def _kept_order(x: Var, wanted: Axes) -> Axes:
    """The wanted axes in the order in which the tensor has them, so that an einsum reads it as it lies."""
    if sorted(x.axes) == sorted(wanted):
        return x.axes
    order = {letter: k for k, letter in enumerate(x.letters)}
    return tuple(sorted(wanted, key=lambda axis: order.get(axis[0], -1)))


def _floats(w: Writer, *xs: Var) -> tuple[Var, ...]:
    if w.program.scores.product != "float":
        return xs
    return tuple(w.var(x.name, f"{x.name}.float()", x.axes) for x in xs)


def _logits(w: Writer, s: Var) -> Var:
    p = w.program
    if p.scores.softcap:
        cap = p.scores.softcap
        s = w.var("s", w.pick("{c} * torch.tanh({s} / {c})", "({s} / {c}).tanh() * {c}").format(c=cap, s=s.name), s.axes)
    terms = p.terms[1:] if p.scores.how == "baddbmm" and _taken(p) is not None else p.terms
    for term in terms:
        if any(len(axis) > 1 for axis in s.axes) and w.pick("folded", "apart") == "apart":
            s = w.unfolded(s, "s")
        s = add_term(w, s, term)
    return _scaled(w, s) if p.scores.scale.where == "after" else s


# Softmax, values --------------------------------------------------------------------------------


def _softmax(w: Writer, s: Var) -> Var:
    how, upcast = w.program.softmax.how, w.program.softmax.upcast
    letter = mutations.softmax_letter(w)
    if (letter,) not in s.axes:
        s = w.unfolded(s, "s")
    axis = s.axis(letter)
    if w.style is None or w.flip():
        axis -= len(s.axes)
    x = s.name
    typed = ""
    if upcast == "float" or (upcast == "dtype" and how in ("module", "exp", "exp_max")):
        x = w.let("s", w.pick("{}.float()", "{}.to(torch.float32)").format(x))
    elif upcast == "dtype":
        typed = ", dtype=torch.float32"
    if how in ("exp", "exp_max"):
        if how == "exp_max":
            best = w.pick("{x}.amax({a}, keepdim=True)", "{x}.max({a}, keepdim=True)[0]", "{x}.max(dim={a}, keepdim=True).values",
                          "torch.amax({x}, dim={a}, keepdim=True).detach()")  # fmt: skip
            top = w.let("top", best.format(x=x, a=axis))
            x = w.let("s", f"{x} - {top}")
        e = w.let("e", w.pick("{}.exp()", "torch.exp({})").format(x))
        text = w.pick("{e} / {e}.sum({a}, keepdim=True)", "{e} / torch.sum({e}, dim={a}, keepdim=True)").format(e=e, a=axis)
    else:
        text = {"method": "{x}.softmax({a}{t})", "functional": "F.softmax({x}, dim={a}{t})", "torch": "torch.softmax({x}, {a}{t})",
                "module": "torch.nn.Softmax(dim={a})({x})", "log": "{x}.log_softmax({a}{t}).exp()"}[how]  # fmt: skip
        text = text.format(x=x, a=axis, t=typed)
    weights = w.var("p", text, s.axes)
    if w.program.softmax.dropout:
        weights = w.var(
            "p",
            w.pick(
                f"F.dropout({weights.name}, 0.1, training=False)",
                f"torch.nn.functional.dropout({weights.name}, p=0.1, training=False)",
            ),
            s.axes,
        )
    return weights


def _cast(w: Writer, weights: Var, v: Var) -> Var:
    p = w.program
    if p.dtype == "float32" and p.softmax.upcast == "none" and p.scores.product == "own":
        return weights
    return w.var("p", w.pick("{p}.to({v}.dtype)", "{p}.type_as({v})").format(p=weights.name, v=v.name), weights.axes)


def _values(w: Writer, weights: Var, v: Var) -> Var:
    p = w.program
    how, lead = p.output.how, _lead(p, p.output.lead)
    if how == "bmm":
        lead = (tuple(letter for axis in lead for letter in axis),)
    v, value_lead = _repeated(w, v, lead)
    if how == "einsum":
        a = w.arrange(weights, _kept_order(weights, (*lead, ("i",), ("j",))), "p")
        b = w.arrange(v, _kept_order(v, (*(axis for axis in value_lead if axis), ("j",), ("e",))), "v")
        out = [*lead, ("i",), ("e",)]
        if w.style is not None and w.style.random() < 0.5:
            w.style.shuffle(out)
        return w.einsum(*((b, a) if w.flip() else (a, b)), tuple(out), "o")
    if how != "mulsum" and weights.axes == (*lead, ("j",), ("i",)) and w.flip():
        b = w.arrange(v, (*value_lead, ("e",), ("j",)), "v")
        return w.var("o", f"{b.name} @ {weights.name}", (*lead, ("e",), ("i",)))
    a, b = w.arrange(weights, (*lead, ("i",), ("j",)), "p"), w.arrange(v, (*value_lead, ("j",), ("e",)), "v")
    axes: Axes = (*lead, ("i",), ("e",))
    if how == "mulsum":
        return w.var("o", f"({a.name}[..., None] * {b.name}[..., None, :, :]).sum(-2)", axes)
    if how == "bmm":
        return w.var("o", f"torch.bmm({a.name}, {b.name})", axes)
    return w.var("o", w.pick("{a} @ {b}", "torch.matmul({a}, {b})", "{a}.matmul({b})").format(a=a.name, b=b.name), axes)


# scaled_dot_product_attention --------------------------------------------------------------------------------


def _sdpa(w: Writer, q: Var, k: Var, v: Var) -> Var:
    p, scale = w.program, w.program.scores.scale
    lead = _lead(p, p.scores.lead)
    native = p.sizes.group > 1 and p.scores.repeat == "native"
    if native:
        lead = _lead(p, "b h")
        key_lead = value_lead = _lead(p, "b g")
    else:
        (k, key_lead), (v, value_lead) = _repeated(w, k, lead), _repeated(w, v, lead)
    q = w.arrange(q, (*lead, ("i",), ("d",)), "q")
    k = w.arrange(k, (*key_lead, ("j",), ("d",)), "k")
    v = w.arrange(v, (*value_lead, ("j",), ("e",)), "v")
    axes: Axes = (*lead, ("i",), ("j",))
    arguments = [f"{q.name}, {k.name}, {v.name}"]
    terms = [term for term in p.terms if not (isinstance(term, Bias) and term.kind == "constant")]
    if len(terms) == 1 and isinstance(terms[0], Mask) and terms[0].how in ("where", "masked_fill"):
        if terms[0].kind == "tril":
            arguments.append("is_causal=True")
        else:
            mask = w.fitted(kept(w, terms[0], True), axes)
            arguments.append(f"attn_mask={mask.name}" + ("[None]" if len(mask.axes) < 2 else ""))
    elif terms:
        fills = {"-inf": 'float("-inf")', "min": f"torch.finfo({q.name}.dtype).min", "-1e9": "-1e9", "-1e4": "-1e4"}
        parts = [w.fitted(penalty(w, t, fills[t.fill], q.name) if isinstance(t, Mask) else bias(w, t), axes) for t in terms]
        total = w.let("mask", " + ".join(part.name for part in parts))
        if max(len(part.axes) for part in parts) < 2:
            total = w.let("mask", f"{total}[None]")  # torch takes no rank of one
        if w.flip():
            total = w.let("mask", f"{total}.expand({', '.join(w.size(axis) for axis in axes)})")
        arguments.append(f"attn_mask={total}.to({q.name}.dtype)")
    if p.softmax.dropout:
        arguments.append("dropout_p=0.0")
    if scale.where != "none":
        arguments.append(f"scale={scale.value}")
    if native:
        arguments.append("enable_gqa=True")
    return w.var("o", f"F.scaled_dot_product_attention({', '.join(arguments)})", (*lead, ("i",), ("e",)))
