"""Programs of one call that holds a whole attention: ``torch.nn.functional.multi_head_attention_forward``."""

from __future__ import annotations

from attnfx.testing.program import Bias, Mask, Unspellable
from attnfx.testing.terms import bias, kept, penalty
from attnfx.testing.writer import Writer


def multi_head(w: Writer) -> list[str]:
    """The body of the program; queries (M, B, E), keys and values (N, B, E). Returns what it returns."""
    p = w.program
    if p.sizes.windows or p.sizes.group > 1 or p.mutation or p.storage.packed != "no":
        raise Unspellable("multi_head_attention_forward has one batch axis and as many key heads as query heads")
    width = p.sizes.heads * p.sizes.width
    wants = ".to(dtype).requires_grad_()"
    names = [
        w.input(name, (), f"torch.randn({rows}, {p.sizes.batch}, {width}){wants}").name
        for name, rows in (("q", p.sizes.queries), ("k", p.sizes.keys), ("v", p.sizes.keys))
    ]
    if w.flip():
        names = [names[0], names[1], names[1]]
    weight = w.input("weight", (), f"(torch.randn({3 * width}, {width}) * 0.5){wants}").name
    offset = w.input("offset", (), f"torch.randn({3 * width}){wants}").name
    out_weight = w.input("out_weight", (), f"torch.randn({width}, {width}){wants}").name
    out_offset = w.input("out_offset", (), f"torch.randn({width}){wants}").name
    masks = _masks(w)
    zero = w.pick("False", "False", "False", "True")
    w.line(
        f"o, weights = F.multi_head_attention_forward({', '.join(names)}, {width}, {p.sizes.heads}, {weight}, {offset}, "
        f"None, None, {zero}, {w.pick('0.0', '0.1')}, {out_weight}, {out_offset}, training=False, need_weights=False{masks})"
    )
    return ["o"]


def _masks(w: Writer) -> str:
    """attn_mask (M, N) and key_padding_mask (B, N): true, or low, where a key is hidden."""
    text, has = "", ""
    for term in w.program.terms:
        if isinstance(term, Bias):
            if term.kind not in ("data", "distance") or term.letters != "i j" or has:
                raise Unspellable("a bias that multi_head_attention_forward has no argument for")
            text, has = f"{text}, attn_mask={bias(w, term).name}", "bias"
        elif isinstance(term, Mask) and term.kind == "lengths" and has != "bias":
            text += f", key_padding_mask={kept(w, term, False).name}"
            has = has or "padding"
        elif (
            isinstance(term, Mask)
            and term.kind not in ("lengths", "documents", "data")
            and has != "bias"
            and "attn_mask" not in text
        ):
            boolean = term.how in ("where", "masked_fill") or has
            mask = kept(w, term, False) if boolean else penalty(w, term, 'float("-inf")', "q")
            text, has = f"{text}, attn_mask={mask.name}", "mask" if boolean else "bias"
        else:
            raise Unspellable("a mask that multi_head_attention_forward has no argument for")
    return text
