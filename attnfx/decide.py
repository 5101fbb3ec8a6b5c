"""Decisions: what runs each site, and why. The default is the fastest exact lowering; a policy may ask for a variant."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

from attnfx.biases.beside import Beside, Exact, Known
from attnfx.biases.low_rank import low_rank
from attnfx.biases.neural import neural
from attnfx.composing import Composition, composed
from attnfx.errors import Objection, PolicyError
from attnfx.linear_sites import name as linear_name
from attnfx.linear_sites import served
from attnfx.lowering import vendor
from attnfx.lowering.linear.plan import LinearPlan
from attnfx.lowering.plan import KernelPlan, make_plan
from attnfx.policies.conditions import NAMES
from attnfx.policies.rule import Subject
from attnfx.policies.site_kind import kinds
from attnfx.policy import Policy, Rule
from attnfx.reports.considered import Considered, not_chosen
from attnfx.reports.density import work
from attnfx.site import AttentionSite
from attnfx.variants import standing
from attnfx.variants.base import Variant
from attnfx.variants.low_rank_bias import LowRankBias
from attnfx.variants.neural_bias import NeuralBias


@dataclass(frozen=True)
class Decision:
    """``kernel``: a plan, of linear attention or any other, a variant's composition, ``"vendor"`` for torch's own fused attention,
    or None where the site stays as it was; ``beside``: what the kernel is given beside the model's own operands;
    ``considered``: what else could have run, and why it does not."""

    name: str
    kernel: KernelPlan | LinearPlan | Composition | str | None
    reason: str
    site: AttentionSite
    variant: Variant | None = None
    beside: Beside | None = None
    considered: tuple[Considered, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the result is the model's own."""
        return self.variant is None


def decide(site: AttentionSite, policy: Policy, known: Known | None = None, form: str = "linear") -> Decision:
    """What runs ``site``. Raises Objection where a rule names this module's variant and the variant cannot serve it.

    ``known``: what the graph tells of its side tensors, for variants that are computed from them; ``form``: how an attention
    without a softmax over keys is spelled.
    """
    if policy.asks_for_kinds:
        site = site.replace(origin=dataclasses.replace(site.origin, kinds=kinds(site)))
    rule = policy.choose(subject(site), phase(site), _Sizes(site, known))
    if not site.exponential:
        return _linear(site, rule, known, form)
    if rule is None or rule.variant is None:
        return _exact(site)
    return _by_rule(site, rule, known)


def subject(site: AttentionSite) -> Subject:
    """What of a site rules ask for, as it was before a variant changed it."""
    origin = site.origin
    return Subject(origin.module, origin.kinds, origin.pattern or None, site.device, phase(site))


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


def _by_rule(site: AttentionSite, rule: Rule, known: Known | None) -> Decision:
    """The first of the rule's variants that serves the site. Raises Objection where none does, and the rule is no wish."""
    objected: list[tuple[str, tuple[str, ...]]] = []
    for variant in rule.choices:
        if variant is None:
            break
        made = _by_variant(site, rule, variant, known)
        if isinstance(made, Decision):
            refused = tuple(Considered(name, tuple(reasons)) for name, reasons in objected)
            reason = f"{_objections(objected)}{made.reason}"
            return dataclasses.replace(made, reason=reason, considered=(*refused, *made.considered))
        objected.append((type(variant).__name__, made))
    if not rule.is_wish and None not in rule.choices:
        raise Objection(
            site.origin.module, ", ".join(name for name, _ in objected), [text for _, reasons in objected for text in reasons]
        )
    exact = _exact(site)
    refused = tuple(Considered(name, tuple(reasons)) for name, reasons in objected)
    reason = f"{_objections(objected)}{exact.reason}"
    return dataclasses.replace(exact, reason=reason, considered=(*refused, *exact.considered))


def _objections(objected: Sequence[tuple[str, Sequence[str]]]) -> str:
    return "".join(f"{name} objects: {' '.join(reasons)} " for name, reasons in objected)


def _by_variant(site: AttentionSite, rule: Rule, variant: Variant, known: Known | None) -> Decision | tuple[str, ...]:
    """The site served by ``variant``, or why it is not."""
    if site.normaliser != "softmax":
        return (f"The site is a piece of an attention that is divided later; {type(variant).__name__} changes whole ones.",)
    stood = None
    if reasons := variant.objections(site):
        stood = standing.stood(site)
        of_values = isinstance(variant, LowRankBias | NeuralBias)  # which are not computed by a composition
        if stood is None or of_values or variant.objections(stood):
            return reasons
    made = _made(site, variant, known) if stood is None else composed(variant, site, family(site), stood, known)
    if isinstance(made, Exact):
        exact = _exact(site)
        reason = f"{type(variant).__name__} leaves it exact: {made.reason}. {exact.reason}"
        return dataclasses.replace(exact, reason=reason)
    if isinstance(made, tuple):
        return made
    if isinstance(made, Composition):
        return Decision(made.family, made, _asked(rule, variant, site), site, variant, None, _others(site, made.family, rule))
    beside, changed = (made, made.site) if isinstance(made, Beside) else (None, made)
    plan = make_plan(changed, family(site))
    if isinstance(plan, KernelPlan):
        others = _others(site, plan.family, rule)
        return Decision(plan.family, plan, _asked(rule, variant, site), changed, variant, beside, others)
    return plan


def _others(site: AttentionSite, chosen: str, rule: Rule) -> tuple[Considered, ...]:
    return not_chosen(site, chosen, family(site), asked=f"The rule {rule} asks for a variant; this would be exact.")


def _asked(rule: Rule, variant: Variant, site: AttentionSite) -> str:
    asked = f"{variant}, asked for by the rule {rule.selection}"
    return "; ".join(part for part in (asked, work(variant, site)) if part)


def _made(
    site: AttentionSite, variant: Variant, known: Known | None
) -> AttentionSite | Beside | Composition | Exact | tuple[str, ...]:
    """``site`` as ``variant`` has it, or why not."""
    if isinstance(variant, LowRankBias):
        return low_rank(site, variant, None if known is None else known.values)
    if isinstance(variant, NeuralBias):
        return neural(site, variant, known)
    return composed(variant, site, family(site), None, known) if variant.is_composed() else variant.apply(site)


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


def _linear(site: AttentionSite, rule: Rule | None, known: Known | None, form: str) -> Decision:
    """An attention without a softmax over keys runs as linear attention where that is what it is, and costs less."""
    plan, reason, site = served(site, form, None if known is None else known.values)
    if rule is not None and (variants := [v for v in rule.choices if v is not None]):
        which = " or ".join(type(variant).__name__ for variant in variants)
        objection = f"The site is {linear_name(site)}, without a softmax over keys; {which} changes softmax attention."
        if not rule.is_wish and None not in rule.choices:
            raise Objection(site.origin.module, which, (objection,))
        reason = f"{objection} {reason}"
    name = "kept" if plan is None else "linear"
    return Decision(name, plan, reason, site, considered=not_chosen(site, name, family(site), failed=(reason,)))


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
