"""The formula of a whole attention, typeset: its scores, its mask, its weights and its output, a line each."""

from __future__ import annotations

import math

from attnfx import expr
from attnfx.expr import Expr, Int
from attnfx.reports import mathml
from attnfx.reports.mathml import fraction, identifier, row, sign, sub, typeset, words
from attnfx.site import AttentionSite
from attnfx.sites.feature_maps import FeatureMap

_J = identifier("j")
_IJ = row(identifier("i"), identifier("j"))
_Z, _P, _W = (sub(identifier(letter), _IJ) for letter in "zpw")


def formula(site: AttentionSite) -> str:
    """``<math>`` of a site."""
    lines = _softmax(site) if site.exponential else _weights(site)
    rows = "".join(f"<mtr><mtd>{left}</mtd><mtd>{sign('=')}</mtd><mtd>{right}</mtd></mtr>" for left, right in lines)
    return f'<math display="block"><mtable class="lines" displaystyle="true">{rows}</mtable></math>'


def _softmax(site: AttentionSite) -> list[tuple[str, str]]:
    score = typeset(site.score, 0, mathml.dot(band=site.band is not None))
    lines = [(_Z, _masked(site, score))]
    if site.band is not None:
        left = (
            sub(identifier("q"), identifier("i")) if site.band.left is None else typeset(expr.Load(site.band.left, (), site.dtype))
        )
        right = typeset(expr.Load(site.band.right, (site.band.row,), site.dtype))
        factor = () if site.band.factor == 1.0 else (f"<mn>{site.band.factor:.6g}</mn>", sign("·"))
        lines.insert(0, (sub(identifier("r"), _IJ), row(*factor, left, sign("·"), right)))
    if site.skip is not None:
        size = f"{site.skip.rows} × {site.skip.keys}"
        tile = f"−∞ in tiles of {size} in which no row reaches {site.skip} times its largest exponential before"
        lines.append((_Z, f"<mtext>{tile}</mtext>"))
    if site.order is not None:
        lines.append((_IJ, f"<mtext>the digits {site.order}, of the places of query and key</mtext>"))
    power = f"<msup>{identifier('e')}{{}}</msup>"
    whole = row(_sum(), power.format(_Z))
    if site.sink is not None:
        whole = row(power.format(typeset(site.sink)), sign("+"), whole)
    if site.normaliser == "max":
        lines.append((_P, power.format(row(_Z, sign("−"), sub(identifier("max"), _J), _Z))))
    else:
        lines.append((_P, fraction(power.format(_Z), whole)))
    weight = () if site.weight == expr.ONE else (typeset(site.weight, 5), sign("·"))
    weights = mathml.called("dropout", _P, f"<mn>{site.dropout:g}</mn>") if site.dropout else _P
    lines.append(_output(row(*weight, weights)))
    return lines


def _weights(site: AttentionSite) -> list[tuple[str, str]]:
    product = row(_mapped(site.query_map, "q", "i"), sign("·"), _mapped(site.key_map, "k", "j"))
    lines = [(_W, _choice(typeset(site.score, 0, product), site.keep, "<mn>0</mn>"))]
    if site.normaliser == "none":
        return [*lines, _output(_W)]
    total = _W if site.normaliser == "sum" else mathml.bracketed(_W, "|", "|")
    length = sub(identifier("l"), identifier("i"))
    divisor = typeset(site.divisor, 0, length)
    return [*lines, (length, row(_sum(), total)), _output(fraction(_W, divisor))]


def _mapped(feature_map: FeatureMap, letter: str, index: str) -> str:
    operand = sub(identifier(letter), identifier(index))
    return operand if feature_map.identity else words(feature_map.notation(f"{letter}_{index}"))


def _output(weights: str) -> tuple[str, str]:
    return sub(identifier("o"), identifier("i")), row(_sum(), weights, sub(identifier("v"), _J))


def _sum() -> str:
    return f"<munder>{sign('∑')}{_J}</munder>"


def _masked(site: AttentionSite, score: str) -> str:
    fill = f"<mn>{site.fill:.6g}</mn>" if math.isfinite(site.fill) else row(sign("−" if site.fill < 0 else "+"), identifier("∞"))
    return _choice(score, site.keep, row(score, sign("+"), fill) if site.additive and math.isfinite(site.fill) else fill, site)


def _choice(value: str, keep: Expr, otherwise: str, site: AttentionSite | None = None) -> str:
    if keep == expr.TRUE or (site is not None and site.facts.full):
        return value
    when = _mask(site) if site is not None else typeset(keep)
    cells = ((value, row(words("if "), when)), (otherwise, words("otherwise")))
    rows = "".join(f"<mtr><mtd>{a}</mtd><mtd>{b}</mtd></mtr>" for a, b in cells)
    return f'<mtable class="cases">{rows}</mtable>'


def _mask(site: AttentionSite) -> str:
    """What is proved of the mask, and the rest as a formula."""
    facts, i, j = site.facts, expr.INDEX["i"], expr.INDEX["j"]
    terms: list[Expr] = [expr.le(Int(j), Int(i - low)) for low in facts.delta_low]
    terms += [expr.le(Int(i - j), Int(high)) for high in facts.delta_high]
    terms += [expr.le(Int(j), Int(high)) for high in facts.key_high]
    terms += [expr.le(Int(low), Int(j)) for low in facts.key_low]
    shown = [typeset(term, 3) for term in (*terms, *facts.rest)]
    return row(*(part for k, term in enumerate(shown) for part in ((sign("∧"),) if k else ()) + (term,)))
