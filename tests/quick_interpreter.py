"""Runs a script under TRITON_INTERPRET=1 as `python SCRIPT ARGUMENT...` would, in a third of the time or less.

Triton's interpreter runs each operation of a kernel in NumPy. Most of its time goes elsewhere: it prepares the language
anew for each call of a device function, within a launch that has done so already; it makes the type and shape of every
tensor anew; and it works out whether integers overflow although only a debugging interpreter looks at the answer. That is
left out here. What a kernel computes, and what the interpreter checks, is as it was.
"""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import language
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


@functools.cache
def languages(function: Callable[..., object]) -> frozenset[str]:
    """The modules of the language that a kernel's file imports, which are those that its call prepares."""
    known = (language, language.core)
    return frozenset(found.__name__ for found in function.__globals__.values() if any(found is module for module in known))


def prepare_once_a_launch() -> None:
    """A launch prepares the language and restores it in the end; what it calls in between finds it prepared."""
    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    launches: list[set[frozenset[str]]] = []

    def quick_prepare(function: Callable[..., object]) -> object:
        if not launches:
            return prepare(function)
        needed, prepared = languages(function), launches[-1]
        if needed in prepared:
            return None
        prepared.add(needed)
        return prepare(function)

    @functools.wraps(launch)
    def quick_launch(*args: Any, **kwargs: Any) -> None:
        launches.append(set())
        try:
            launch(*args, **kwargs)
        finally:
            launches.pop()

    interpreter._patch_lang = quick_prepare
    interpreter.GridExecutor.__call__ = quick_launch


def overflow_only_where_it_is_looked_at() -> None:
    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def quick_check(self: TritonSemantic, *args: Any) -> None:
        if self.builder.options.debug:
            check(self, *args)

    TritonSemantic.binary_op_sanitize_overflow_impl = quick_check


def look_types_up_once() -> None:
    """Of each scalar type; a block has the type of its elements, and what is no plain scalar goes the long way."""
    convert = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def quick_convert(kind: Any) -> Any:
        scalar = kind.scalar
        if type(scalar) is not language.dtype:
            return convert(kind)
        found = known.get(scalar.name)
        if found is None:
            found = known[scalar.name] = convert(scalar)
        return found

    interpreter._get_np_dtype = quick_convert


def make_types_once() -> None:
    """Of blocks that are alike the shape, size and name, and of tensors that are alike the shape: nothing changes them later."""
    make_block, make_tensor = language.core.block_type.__init__, language.core.tensor.__init__
    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    tensors: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def quick_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[n.value if isinstance(n, language.constexpr) else n for n in shape])
        found = blocks.get(key)
        if found is None:
            make_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = found

    def quick_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        found = tensors.get(key)
        if found is None:
            make_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found

    language.core.block_type.__init__ = quick_block
    language.core.tensor.__init__ = quick_tensor


def main(script: str, *arguments: str) -> None:
    prepare_once_a_launch()
    overflow_only_where_it_is_looked_at()
    look_types_up_once()
    make_types_once()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
