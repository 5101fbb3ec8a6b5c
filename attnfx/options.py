"""The options of the backend: what ``torch.compile(..., options={...})`` may say, checked and frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from attnfx.errors import UnknownOption, listing, nearest
from attnfx.policy import Policy

Compiler = Callable[..., Any]
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")
TUNE = ("off", "search")
BUFFERS = ("read", "ignore")


@dataclass(frozen=True)
class Options:
    """``policy``: a Policy, rules, or the path of a policy file. ``strict``: internal errors and refusals of a variant
    raise instead of
    leaving a site as it was. ``strict_sites``: a SiteCountError unless exactly so many attentions were rewritten
    (:mod:`attnfx.counting`). ``verify``: "first" or True, the first call runs every rewritten attention and its original side
    by side on the
    real inputs, puts back what differs beyond the bound, and compares the whole graph with the original (:mod:`attnfx.measure`).
    ``inner``: what compiles the rewritten graph, "inductor" or another backend's name or callable. ``mode``: Inductor's mode.
    ``tune``: "search", the first call of each shape looks for the fastest configuration of each kernel and remembers it
    (:mod:`attnfx.lowering.tuning`); "off", kernels run in the shipped configurations, or in those that were found before; None:
    "search" with modes that begin with "max-autotune".
    ``buffers``: "read", masks and positions that a module keeps as buffers
    are read when the graph is compiled, and compiled anew when they change (:mod:`attnfx.graphs.buffers`); "ignore", they are data.
    ``timeline``: attentions that run as torch's own kernels have names in a profiler's timeline under Inductor too, for some
    15 microseconds of the host a call; generated kernels always have theirs.
    """

    policy: Policy = field(default_factory=Policy)
    strict: bool = False
    strict_sites: int | None = None
    verify: bool = False
    inner: str | Compiler = "inductor"
    mode: str = "default"
    tune: str | None = None
    buffers: str = "read"
    timeline: bool = False

    @property
    def searches(self) -> bool:
        """Whether first calls look for the fastest configurations."""
        return self.tune == "search" or (self.tune is None and self.mode.startswith("max-autotune"))

    @staticmethod
    def parse(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """The options of one compile. Raises UnknownOption for keys and values that are not known, PolicyError for a bad policy."""
        given = dict(options or {})
        known = [f.name for f in fields(Options)]
        for key in given:
            if key not in known:
                raise UnknownOption(f'attnfx has no option "{key}"; it has {listing(known)}.{nearest(str(key), known)}')
        if mode is not None:
            given.setdefault("mode", mode)
        for name, also in (("strict", ()), ("timeline", ()), ("verify", ("first",))):
            if not isinstance(given.get(name, False), bool) and given[name] not in also:
                allowed = "".join(f', or "{value}"' for value in also)
                raise UnknownOption(f'The option "{name}" is {given[name]!r}; it must be True or False{allowed}.')
        sites = given.get("strict_sites")
        if sites is not None and (isinstance(sites, bool) or not isinstance(sites, int) or sites < 0):
            raise UnknownOption(f'The option "strict_sites" is {sites!r}; it must be a number of attentions, or None.')
        _among("mode", given.get("mode", "default"), MODES)
        if given.get("tune") is not None:
            _among("tune", given["tune"], TUNE)
        _among("buffers", given.get("buffers", "read"), BUFFERS)
        inner = given.get("inner", "inductor")
        if isinstance(inner, str):
            _among("inner", inner, [name for name in torch._dynamo.list_backends(()) if name != "attnfx"])
        elif not callable(inner):
            raise UnknownOption(f'The option "inner" is {inner!r}; it must be the name of a backend or a callable.')
        return Options(**{**given, "verify": bool(given.get("verify")), "policy": Policy.coerce(given.get("policy"))})


def _among(name: str, value: object, allowed: Any) -> None:
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise UnknownOption(f'The option "{name}" is {value!r}; it must be one of {listing(allowed)}.{hint}')
