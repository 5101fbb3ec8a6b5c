"""attnfx: finds every attention in a model, describes it exactly, and runs it as the best kernel for what it is."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnfx import errors as errors
    from attnfx import variants as variants
    from attnfx.api import compile as compile
    from attnfx.api import explain as explain
    from attnfx.api import verify as verify
    from attnfx.biases.fitting import fit_neural_bias as fit_neural_bias
    from attnfx.exporting import export as export
    from attnfx.exporting import rewritten as rewritten
    from attnfx.policy import Policy as Policy
    from attnfx.policy import Rule as Rule
    from attnfx.report import Report as Report

__version__ = "0.1.0"

_HOME = {
    "compile": "attnfx.api",
    "explain": "attnfx.api",
    "verify": "attnfx.api",
    "export": "attnfx.exporting",
    "rewritten": "attnfx.exporting",
    "fit_neural_bias": "attnfx.biases.fitting",
    "Policy": "attnfx.policy",
    "Rule": "attnfx.policy",
    "Report": "attnfx.report",
}
_MODULES = ("errors", "variants")

__all__ = [
    "Policy", "Report", "Rule", "__version__", "compile", "errors", "explain", "export", "fit_neural_bias", "rewritten", "variants",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first asked for: `import attnfx` itself takes no time."""
    if name in _MODULES:
        return importlib.import_module(f"attnfx.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
