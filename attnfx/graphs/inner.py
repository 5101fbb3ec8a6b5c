"""The rest of the graph: Inductor, or whichever backend the user names, compiles what we hand it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfx import logs, measure
from attnfx.errors import VerificationError
from attnfx.options import Compiler, Options


def compile_inner(gm: fx.GraphModule, original: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """``gm`` compiled by the inner backend; with ``verify``, its first results are compared with ``original``'s."""
    compiled = _compile(gm, inputs, options)
    return _verified(compiled, original, options) if options.verify else compiled


def _compile(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.inner != "inductor":
        compiler: Compiler = options.inner if callable(options.inner) else torch._dynamo.lookup_backend(options.inner)
        return cast(Callable[..., Any], compiler(gm, inputs))
    from attnfx.graphs import inductor

    return inductor.compile_graph(gm, inputs, options.mode, options.timeline)


def _verified(compiled: Callable[..., Any], original: fx.GraphModule, options: Options) -> Callable[..., Any]:
    done = False

    def call(*args: Any) -> Any:
        nonlocal done
        if done:
            return compiled(*args)
        done = True
        copies = measure.copied(args)
        result = compiled(*args)
        with torch.no_grad(), measure.random_numbers_kept(copies) as drawn:
            expected = original.forward(*copies)
            random = drawn()
        if not random:  # a compiled graph draws other numbers than an eager one
            _compare(result, expected, options)
        return result

    return call


def _compare(result: Any, expected: Any, options: Options) -> None:
    for k, (a, b) in enumerate(zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True)):
        if not (isinstance(a, torch.Tensor) and a.is_floating_point()):
            continue
        error, bound = measure.difference(a, b), measure.bound(a.dtype)
        if error <= bound or options.policy.changes_results:
            continue
        message = (
            f"output {k} of the rewritten graph differs from the original's by {error:.3g} (relative L2), more than {bound:.3g}"
        )
        if options.strict:
            raise VerificationError(message)
        logs.warn(message)
