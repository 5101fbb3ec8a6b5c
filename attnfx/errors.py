"""Everything attnfx raises or warns with: one small family, so that a caller can catch it by name."""

import difflib
from collections.abc import Iterable


class AttnfxError(Exception):
    """Base of every error that attnfx raises on purpose; its message is a sentence for the person who called."""


class UnknownOption(AttnfxError, ValueError):
    """An option, or the value of one, that attnfx does not know; the message lists what it knows."""


class PolicyError(AttnfxError, ValueError):
    """A policy that cannot be read: a malformed glob, an unknown key, an unknown variant, a parameter out of range."""


class Objection(AttnfxError):
    """A variant was asked for by name and cannot serve the site.

    `module` is the module path of the site, `variant` the name of the variant's class, and `reasons` its objections,
    one sentence each.
    """

    def __init__(self, module: str, variant: str, reasons: Iterable[str]) -> None:
        self.module = module
        self.variant = variant
        self.reasons = tuple(reasons)
        super().__init__(module, variant, self.reasons)

    def __str__(self) -> str:
        return f"{self.variant} cannot serve {self.module or 'the attention at the top of the model'}: " + " ".join(self.reasons)


class VerificationError(AttnfxError):
    """With ``strict``: the rewrite of an attention, or a whole graph, gave something else than the original; the message
    has the numbers."""


class SiteCountError(AttnfxError):
    """Not as many attentions were rewritten as ``strict_sites`` demands.

    `expected` and `found` are the numbers, `sites` and `missed` one line for each attention and for each near miss.
    """

    def __init__(self, expected: int, sites: Iterable[str], missed: Iterable[str], hint: str = "") -> None:
        self.expected, self.sites, self.missed, self.hint = expected, tuple(sites), tuple(missed), hint
        self.found = len(self.sites)
        super().__init__(expected, self.sites, self.missed, hint)

    def __str__(self) -> str:
        lines = [f"{self.found} attentions were rewritten, and strict_sites demands {self.expected}.{self.hint}"]
        for title, entries in (("Rewritten:", self.sites), ("Left as they were:", self.missed)):
            lines += [title, *(f"  {entry}" for entry in entries or ("none",))]
        return "\n".join(lines)


class AttnfxWarning(UserWarning):
    """Something the user should know that is not an error: a rule that matched nothing, a site that stays as it was."""


def nearest(found: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known spelling closest to `found`, or '' where none is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(found.lower(), list(by_lower), n=1, cutoff=0.6)
    return f' Did you mean "{by_lower[close[0]]}"?' if close else ""


def listing(names: Iterable[str]) -> str:
    """The names in order, quoted and separated by commas, as the messages print them; 'none' for no names."""
    return ", ".join(f'"{name}"' for name in names) or "none"
