"""NeuralBias lowered: columns that two networks compute from the pair representation, in place of a bias projected from it."""

from __future__ import annotations

import torch

from attnfx import expr
from attnfx.algebra.nodes import has_score
from attnfx.algebra.summands import summands
from attnfx.biases.beside import Beside, Known, Networks, compacted, scale_of, short, slot, total
from attnfx.biases.pair_file import load
from attnfx.expr import Load
from attnfx.lowering.derivative import widened
from attnfx.lowering.forms import droppable
from attnfx.lowering.plan import WIDEST
from attnfx.site import AttentionSite
from attnfx.variants.neural_bias import NeuralBias


def neural(site: AttentionSite, variant: NeuralBias, known: Known | None) -> Beside | tuple[str, ...]:
    """``site`` with the columns of the networks in place of its bias, or objections."""
    if known is None:
        return ("The graph that the site is in is not at hand.",)
    networks = load(variant.path)
    if isinstance(networks, str):
        return (networks,)
    module = site.origin.module
    if module not in networks:
        return (f'"{variant.path}" has no networks for "{module}"; it has some for {", ".join(networks) or "nothing"}.',)
    network, why = networks[module], list[str]()
    parts = list(summands(widened(site.score)))
    for k, (part, factor) in enumerate(parts):
        if has_score(part) or not (expr.depends_on(part, "i") and expr.depends_on(part, "j")):
            continue
        pair = known.pair(part) if isinstance(part, Load) else "it is more than a tensor"
        if isinstance(pair, str):
            why.append(f"{short(part)}: {pair}.")
            continue
        if isinstance(part, Load) and site.side[slot(part)].requires_grad:
            return (f"{short(part)}: a gradient of it is wanted; the networks take the place of what is not trained.",)
        rest = [p for at, p in enumerate(parts) if at != k]
        scale = scale_of(rest, site, known.values)
        if scale is None:
            return ("The products of queries and keys are changed by more than a number for each head.",)
        if (network.heads, network.channels) != (site.heads, pair.channels):
            return (
                f"The networks of {module} are for {network.heads} heads and {network.channels} channels; the site has "
                f"{site.heads} and {pair.channels}.",
            )
        if site.heads != site.key_heads:
            return (f"Its {site.heads} query heads share {site.key_heads} key heads; the networks have keys for each head.",)
        without, kept = compacted(site.replace(score=total(rest)))
        if not droppable(without):
            return ("What all keys of a row share is seen by a sink or a fill here, and the networks leave it out.",)
        if site.head_dim + network.rank > WIDEST:
            return (f"head_dim and rank are {site.head_dim} and {network.rank}; together they may be {WIDEST}.",)
        wide = without.replace(head_dim=site.head_dim + network.rank)
        each = (scale / factor).float()
        note = (
            f"bias {short(part)}: as {network.rank} columns of queries and keys, from two networks; when fitted, the bias had the "
            f"root mean square {network.size:.2g}, the error {network.error:.2g}, at most {network.largest:.2g}, row means apart."
        )
        return Beside(wide, kept, networks=Networks(pair, network, each.to(torch.device(site.device))), notes=(note,))
    return tuple(why) or ("Nothing that depends on the query and the key is added to its scores.",)
