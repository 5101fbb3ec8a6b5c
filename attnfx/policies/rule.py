"""One rule of a policy: which attentions it selects, and what runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnfx.errors import PolicyError, listing, nearest
from attnfx.policies.conditions import Condition
from attnfx.policies.globs import Glob
from attnfx.policies.number_ranges import NumberRanges
from attnfx.variants.base import Variant

KEEP = "keep"
"""How files and rules spell "leave this attention exact"."""
PHASES = ("training", "prefill", "decode")
"""What a graph is compiled for: gradients are wanted; or not, with several queries, or one."""
KINDS = ("self", "cross", "causal", "decode", "linear")
"""What an attention is: its keys are made of the queries' own tensor, or of another one; no query sees keys after it; it has one
query; it has no softmax over the keys."""
PATTERNS = (
    "scaled_dot_product_attention", "softmax", "flex_attention", "joined softmax", "unnormalised softmax", "linear",
)  # fmt: skip
"""How the model spells an attention, as the report says it."""
DEVICES = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "npu", "xla", "privateuseone")
"""Types of devices, as torch names them; AMD's GPUs are "cuda" as well."""
WORDS = {"kind": KINDS, "pattern": PATTERNS, "device": DEVICES, "phase": PHASES}
"""What selectors made of words may say."""

Words = str | tuple[str, ...]
Choice = Variant | None | tuple[Variant | None, ...]
"""A variant; None, which leaves the attention exact; or several of these in order of preference."""


@dataclass(frozen=True)
class Subject:
    """What of an attention rules may ask for; None is not known, and what is not known is not asked for."""

    module: str
    kinds: frozenset[str] | None = None
    pattern: str | None = None
    device: str | None = None
    phase: str | None = None


@dataclass(frozen=True)
class Rule:
    """`variant` for every attention that all of the selectors select; None (or "keep") leaves it exact.

    `modules` is a glob over module paths: `*` matches any run of characters, dots included, `?` one character, `[abc]` one of
    them, and `[0-31]` or `[0,4,8-11]` a whole number in these ranges: "model.layers.[0-31].self_attn". "re:" begins a regular
    expression. `layers` are numbers such as "0-3,8" or "24-"; the layer is the first number among the parts of a path. `kind`,
    `pattern`, `device` and `phase` are one word, or several of which any may hold, of the :data:`KINDS`, :data:`PATTERNS`,
    :data:`DEVICES` and :data:`PHASES`. `when` is a condition over sizes, such as "kv_len >= 8192"
    (:class:`attnfx.policies.conditions.Condition`); of lengths that change it is a guard, so that a graph is compiled anew only
    where it is crossed.

    `variant` may also be a list: the first one without an objection runs, and "keep" at its end leaves the attention exact where
    all object. With `heads`, such as "0-3,8", it serves these query heads, and all others stay exact.
    """

    modules: str = "*"
    variant: Choice = None
    when: str | None = None
    phase: Words | None = None
    layers: str | None = None
    kind: Words | None = None
    pattern: Words | None = None
    device: Words | None = None
    heads: str | None = None
    glob: Glob = field(init=False, repr=False, compare=False)
    condition: Condition | None = field(init=False, repr=False, compare=False)
    ranges: NumberRanges | None = field(init=False, repr=False, compare=False)
    choices: tuple[Variant | None, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: Any = self.layers, self.heads
        for name, value in zip(("layers", "heads"), given, strict=True):
            self._set(name, str(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else value)
        self._set("variant", choice(self.variant, f'the rule for "{self.modules}"'))
        self._set("glob", Glob(self.modules))
        self._set("condition", None if self.when is None else Condition(self.when))
        self._set("ranges", None if self.layers is None else NumberRanges(self.layers, "layers"))
        for name, known in WORDS.items():
            self._set(name, _words(name, getattr(self, name), known))
        self._set("choices", tuple(self._for_heads(v) for v in preferences(self.variant)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _for_heads(self, variant: Variant | None) -> Variant | None:
        """`variant` on the rule's heads alone."""
        if self.heads is None:
            return variant
        NumberRanges(self.heads, "heads", endless=False)
        if self.variant is None:
            raise PolicyError(f'The heads are "{self.heads}" and the variant is "{KEEP}"; all heads are kept without "heads".')
        from attnfx.variants.per_head import PerHead

        return None if variant is None else PerHead(((self.heads.replace(" ", ""), variant),))

    @property
    def is_wish(self) -> bool:
        """Whether it speaks of every module: what its variants object to is left exact; else an objection is an error."""
        return self.modules in ("*", "**", "re:.*")

    def matches(self, subject: Subject | str) -> bool:
        """Whether the rule speaks about an attention, or what is at a module path; `when` and `phase` are not asked for."""
        if isinstance(subject, str):
            subject = Subject(subject)
        if not self.glob.matches(subject.module):
            return False
        if self.ranges is not None and ((layer := layer_of(subject.module)) is None or layer not in self.ranges):
            return False
        if self.kind is not None and subject.kinds is not None and subject.kinds.isdisjoint(as_tuple(self.kind)):
            return False
        asked = (self.pattern, subject.pattern), (self.device, subject.device)
        return all(want is None or found is None or found in as_tuple(want) for want, found in asked)

    def expected(self, subjects: Sequence[Subject]) -> bool:
        """Whether it should match one of these attentions: it is for their phase, and does more than to keep a kind of them."""
        if self.is_wish and self.variant is None and self.layers is None:
            return self.kind is self.pattern is self.device is None
        phases = {subject.phase for subject in subjects}
        return self.phase is None or None in phases or not phases or not phases.isdisjoint(as_tuple(self.phase))

    def takes(self, subject: Subject, surely: bool) -> bool:
        """Whether it is the rule for an attention, whatever its sizes are (``surely``), or of some sizes."""
        known = subject.phase is None or self.phase is None or subject.phase in as_tuple(self.phase)
        unknown = (
            (self.phase, subject.phase),
            (self.kind, subject.kinds),
            (self.pattern, subject.pattern),
            (self.device, subject.device),
        )
        if surely and (self.condition is not None or any(want is not None and found is None for want, found in unknown)):
            return False
        return known and self.matches(subject)

    def serves(self, subject: Subject | str, phase: str, sizes: Mapping[str, Any]) -> bool:
        """Whether it is the rule for an attention in this phase, of these sizes."""
        if not self.matches(subject) or (self.phase is not None and phase not in as_tuple(self.phase)):
            return False
        return self.condition is None or self.condition.holds(sizes)

    @property
    def selection(self) -> str:
        """The selectors, as messages and reports print them."""
        names = "layers", "kind", "pattern", "device", "when", "phase", "heads"
        given = [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
        return f'"{self.modules}"' + "".join(
            f" {'in' if name == 'phase' else name} {' or '.join(as_tuple(value))}" for name, value in given
        )

    def __str__(self) -> str:
        chosen = ", else ".join(str(variant or KEEP) for variant in preferences(self.variant))
        return f"{self.selection} -> {chosen}"

    def to_dict(self) -> dict[str, Any]:
        """The rule as a policy file holds it: its keys that are not None, and its variant as data."""
        found = {name: _plain(getattr(self, name)) for name in SELECTORS}
        return {name: value for name, value in found.items() if value is not None} | {"variant": choice_data(self.variant)}


SELECTORS = ("modules", "layers", "kind", "pattern", "device", "phase", "when", "heads")
"""The keys of a rule beside "variant", in the order in which files are written."""
assert {f.name for f in dataclasses.fields(Rule) if f.init} == {*SELECTORS, "variant"}


def layer_of(module: str) -> int | None:
    """The first number among the parts of a module path, as in "model.layers.3.self_attn"; None without one."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def as_tuple(words: Words) -> tuple[str, ...]:
    """One word or several, as several."""
    return (words,) if isinstance(words, str) else words


def preferences(given: Choice) -> tuple[Variant | None, ...]:
    """One variant or several, as several."""
    return given if isinstance(given, tuple) else (given,)


def choice(given: Any, of: str) -> Choice:
    """What Python code gives as the variant `of` a rule, checked; a list of one is that one."""
    if not isinstance(given, list | tuple):
        if given is not None and given != KEEP and not isinstance(given, Variant):
            raise PolicyError(
                f"The variant of {of} is {given!r}; it must be an instance of a class of attnfx.variants, a list of such, "
                f'or None or "{KEEP}" to leave the attention exact.'
            )
        return given if isinstance(given, Variant) else None
    found = [choice(variant, of) if not isinstance(variant, list | tuple) else _nested(of) for variant in given]
    if not found:
        raise PolicyError(f'The list of variants of {of} is empty; it must name one, or be "{KEEP}".')
    if None in found[:-1]:
        raise PolicyError(f'The list of variants of {of} has "{KEEP}" before its end; what stands behind it would never run.')
    return tuple(found) if len(found) > 1 else found[0]  # type: ignore[arg-type]  # lists in lists are refused


def choice_data(given: Choice) -> Any:
    """A choice as plain data."""
    if isinstance(given, tuple):
        return [choice_data(variant) for variant in given]
    return KEEP if given is None else {name: _plain(value) for name, value in given.to_dict().items() if value is not None}


def _nested(of: str) -> Choice:
    raise PolicyError(f'The list of variants of {of} holds another list; it must hold variants, and may end with "{KEEP}".')


def _plain(value: Any) -> Any:
    """Tuples as the lists that files have."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _words(name: str, given: Any, known: tuple[str, ...]) -> Words | None:
    if given is None:
        return None
    words = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not words:
        raise PolicyError(f"The {name} is an empty list; known are {listing(known)}.")
    for word in words:
        if not isinstance(word, str) or word not in known:
            raise PolicyError(f"The {name} is {word!r}; known are {listing(known)}.{nearest(str(word), known)}")
    return words[0] if len(words) == 1 else words
