"""Decisions: what runs each site, and why. The default is the fastest exact lowering; a policy may ask for a variant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch

from attnfx.beside import Beside, Exact, Known
from attnfx.composing import Composition, composed
from attnfx.conditions import NAMES
from attnfx.considered import Considered, not_chosen
from attnfx.density import work
from attnfx.errors import Objection, PolicyError
from attnfx.expr import Call, Expr, Score, walk
from attnfx.low_rank import low_rank
from attnfx.lowering import vendor
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.neural import neural
from attnfx.policy import Policy, Rule
from attnfx.site import AttentionSite
from attnfx.variants.base import Variant
from attnfx.variants.low_rank_bias import LowRankBias
from attnfx.variants.neural_bias import NeuralBias

#: Globs that speak of everything: their variants are wishes, and a site that objects is left alone.
_DEFAULTS = ("*", "**")


@dataclass(frozen=True)
class Decision:
    """``kernel``: a plan, a variant's composition, ``"vendor"`` for torch's own fused attention, or None where the site stays as it
    was; ``beside``: what the kernel is given beside the model's own operands; ``considered``: what else could have
    run, and why it does not."""

    name: str
    kernel: KernelPlan | Composition | str | None
    reason: str
    site: AttentionSite
    variant: Variant | None = None
    beside: Beside | None = None
    considered: tuple[Considered, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the result is the model's own."""
        return self.variant is None


def decide(site: AttentionSite, policy: Policy, known: Known | None = None) -> Decision:
    """What runs ``site``. Raises Objection where a rule names this module's variant and the variant cannot serve it.

    ``known``: what the graph tells of its side tensors, for variants that are computed from them.
    """
    rule = policy.choose(site.origin.module, phase(site), _Sizes(site, known))
    if not site.exponential:
        return _linear(site, rule)
    if rule is None or rule.variant is None:
        return _exact(site)
    return _by_rule(site, rule, rule.variant, known)


def phase(site: AttentionSite) -> str:
    """Which of :data:`attnfx.policy.PHASES` an attention is compiled for."""
    return "training" if site.requires_grad else "decode" if site.queries == 1 else "prefill"


class _Sizes(Mapping[str, Any]):
    """The sizes of a site by the names that conditions have for them."""

    def __init__(self, site: AttentionSite, known: Known | None) -> None:
        sizes = site.batch, site.heads, site.key_heads, site.queries, site.keys, site.head_dim, site.value_dim
        self.sizes, self.known = dict(zip(NAMES, map(sympy.sympify, sizes), strict=True)), known

    def __getitem__(self, name: str) -> Any:
        size = self.sizes[name]
        if size.is_Integer:
            return int(size)
        if self.known is None or self.known.size is None:
            raise PolicyError(f'A rule with "when" asks for {name}, which is {size}: a length that changes, and no graph is there.')
        return self.known.size(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def _by_rule(site: AttentionSite, rule: Rule, variant: Variant, known: Known | None) -> Decision:
    piece = f"The site is a piece of an attention that is divided later; {type(variant).__name__} changes whole ones."
    reasons = variant.objections(site) if site.normaliser == "softmax" else (piece,)
    if not reasons:
        made = _made(site, variant, known)
        if isinstance(made, Exact):
            exact = _exact(site)
            return replace(exact, reason=f"{type(variant).__name__} leaves it exact: {made.reason}. {exact.reason}")
        if isinstance(made, tuple):
            reasons = made
        elif isinstance(made, Composition):
            return Decision(made.family, made, _asked(rule, variant, site), site, variant, None, _others(site, made.family, rule))
        else:
            beside, changed = (made, made.site) if isinstance(made, Beside) else (None, made)
            plan = make_plan(changed, family(site))
            if isinstance(plan, KernelPlan):
                others = _others(site, plan.family, rule)
                return Decision(plan.family, plan, _asked(rule, variant, site), changed, variant, beside, others)
            reasons = plan
    if rule.modules not in _DEFAULTS:
        raise Objection(site.origin.module, type(variant).__name__, reasons)
    exact = _exact(site)
    reason = f"{type(variant).__name__} objects: {' '.join(reasons)} {exact.reason}"
    return replace(exact, reason=reason, considered=(Considered(str(variant), tuple(reasons)), *exact.considered))


def _others(site: AttentionSite, chosen: str, rule: Rule) -> tuple[Considered, ...]:
    return not_chosen(site, chosen, family(site), asked=f'The rule "{rule.modules}" asks for {rule.variant}; this would be exact.')


def _asked(rule: Rule, variant: Variant, site: AttentionSite) -> str:
    limits = "".join(f" {name} {given}" for name, given in (("when", rule.when), ("in", rule.phase)) if given is not None)
    asked = f'{variant}, asked for by the rule "{rule.modules}"{limits}'
    return "; ".join(part for part in (asked, work(variant, site)) if part)


def _made(
    site: AttentionSite, variant: Variant, known: Known | None
) -> AttentionSite | Beside | Composition | Exact | tuple[str, ...]:
    """``site`` as ``variant`` has it, or why not."""
    if isinstance(variant, LowRankBias):
        return low_rank(site, variant, None if known is None else known.values)
    if isinstance(variant, NeuralBias):
        return neural(site, variant, known)
    return composed(variant, site, family(site)) if variant.is_composed() else variant.apply(site)


def _exact(site: AttentionSite) -> Decision:
    objections = vendor.objections(site)
    if not objections and (decision := _measured(site)) is not None:
        return decision
    if not objections:
        reason = f"plain {_shape(site)} attention: torch's own fused kernel is the fastest"
        return Decision("vendor", "vendor", reason, site, considered=not_chosen(site, "vendor", family(site)))
    plan = make_plan(site, family(site))
    if isinstance(plan, KernelPlan):
        others = not_chosen(site, plan.family, family(site))
        return Decision(plan.family, plan, _why(site, objections), site, considered=others)
    return Decision("kept", None, " ".join(plan), site, considered=not_chosen(site, "kept", family(site), failed=plan))


def _measured(site: AttentionSite) -> Decision | None:
    """The generated kernels for a plain attention, where a search found them to be faster on this device."""
    if family(site) != "flash":
        return None
    from attnfx.lowering.tuning import plain

    won, plan = plain.prefers_generated(site), make_plan(site, "flash")
    if won is None or not isinstance(plan, KernelPlan):
        return None
    reason = f"measured: {won.generated_ms:g} ms, torch's own kernel {won.vendor_ms:g} ms"
    return Decision(plan.family, plan, reason, site, considered=not_chosen(site, plan.family, "flash", measured=reason))


def _proportional(e: Expr) -> bool:
    """Whether a formula is the score times something that does not hold it: then sums over keys come first."""
    if isinstance(e, Score):
        return True
    if not isinstance(e, Call) or e.op not in ("mul", "div"):
        return False
    a, b = e.args
    if e.op == "mul" and any(isinstance(n, Score) for n in walk(b)):
        a, b = b, a
    return _proportional(a) and not any(isinstance(n, Score) for n in walk(b))


def _linear(site: AttentionSite, rule: Rule | None) -> Decision:
    """An attention without a softmax over keys stays as the model computes it: no lowering of it exists."""
    name = "linear attention" if _proportional(site.score) else "attention without a softmax over keys"
    how = {
        "none": "its weights are not normalised", "sum": "its weights are divided by their sum",
        "abs_sum": "its weights are divided by the sum of their magnitudes",
    }[site.normaliser]  # fmt: skip
    reason = f"{name}, {how}: left as the model computes it"
    if rule is not None and rule.variant is not None:
        objection = f"The site is {name}, without a softmax over keys; {type(rule.variant).__name__} changes softmax attention."
        if rule.modules not in _DEFAULTS:
            raise Objection(site.origin.module, type(rule.variant).__name__, (objection,))
        reason = f"{objection} {reason}"
    return Decision("kept", None, reason, site, considered=not_chosen(site, "kept", family(site)))


def _shape(site: AttentionSite) -> str:
    return "causal" if site.facts.causal else "full"


def _why(site: AttentionSite, objections: tuple[str, ...]) -> str:
    facts = site.facts
    if facts.bounded and facts.rest:
        return "keys out of the proved range are never read, the rest of the mask is evaluated in the tile"
    if facts.bounded:
        return "the mask is proved and costs nothing; keys out of range are never read"
    if facts.rest:
        return "the mask is evaluated in the tile, from what it is made of"
    return objections[0]


def family(site: AttentionSite) -> Literal["flash", "portable"]:
    """The lowering family for a device and dtype: Triton kernels on a GPU, plain torch operations elsewhere.

    ``TRITON_INTERPRET=1`` runs the Triton kernels on a CPU, slowly, to look at them.
    """
    interpreted = site.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    kernels = site.dtype in (torch.float16, torch.bfloat16, torch.float32) and (site.device == "cuda" or interpreted)
    return "flash" if kernels and triton_installed() else "portable"


def triton_installed() -> bool:
    """Whether Triton can be imported here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
