"""Cases of transformers: a configuration class, a model class, and one implementation of attention each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.coverage.registry import Built, case

Inputs = Callable[[], dict[str, Any]]


def models(name: str, spelling: str, config: str, model: str, inputs: Inputs, given: Mapping[str, Any], only: str = "") -> None:
    """Register ``name`` once for each implementation of attention ("sdpa", "eager"), or for ``only`` one.

    ``config`` and ``model`` are names in transformers, or "bert.modeling_bert:BertLayer" for what it does not export.
    """
    for attention in (only,) if only else ("sdpa", "eager"):
        case(f"hf_{name}_{attention}", "transformers", spelling)(_maker(config, model, inputs, given, attention))


def _maker(config: str, model: str, inputs: Inputs, given: Mapping[str, Any], attention: str) -> Callable[[], Built]:
    def make() -> Built:
        made = _named(model)._from_config(_named(config)(**given), attn_implementation=attention)
        return made, (), inputs()

    return make


def _named(name: str) -> Any:
    module, _, found = name.rpartition(":")
    return getattr(importlib.import_module(f"transformers.models.{module}" if module else "transformers"), found)
