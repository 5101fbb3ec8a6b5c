"""Models named on the command line: "package.module:function" to a model and its inputs."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from attnfx.errors import AttnfxError, nearest

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def model_and_inputs(factory: str, inputs: str | None) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What the factory returns, with the inputs of the second function where there is one.

    AttnfxError says what a name or a result should look like. A function that itself fails ends the program with its
    own traceback.
    """
    made = _called(factory)
    if inputs is not None:
        model = made[0] if isinstance(made, tuple) else made
        return model, *_split(_called(inputs), inputs)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise AttnfxError(
            f"{factory} returned {_named(made)}; it must return (model, args, kwargs) or (model, args), or the model "
            "alone together with --inputs."
        )
    return made[0], *_split(made[1:] if len(made) == 3 else made[1], factory)


def _split(given: Any, where: str) -> Inputs:
    """Inputs as (args, kwargs): from (args, kwargs), or a dict of keywords, or a tuple or list of arguments."""
    match given:
        case (tuple() | list() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
        case Mapping():
            return (), dict(given)
        case tuple() | list():
            return tuple(given), {}
    raise AttnfxError(
        f"{where} gives {_named(given)} as the model's inputs; they must be (args, kwargs), a tuple of arguments, or a "
        "dict of keyword arguments."
    )


def _called(spec: str) -> Any:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise AttnfxError(f'"{spec}" does not name a function; write package.module:function.')
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file of the current directory is found
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise AttnfxError(f'There is no module "{error.name}" here or in this environment (from "{spec}").') from None
        _exit_with_own_traceback(error)
    except Exception as error:
        _exit_with_own_traceback(error)
    function = getattr(module, name, None)
    if not callable(function):
        known = [attribute for attribute in vars(module) if not attribute.startswith("_")]
        raise AttnfxError(f'The module "{module_name}" has no function "{name}".{nearest(name, known)}')
    return _result(function)


def _result(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        _exit_with_own_traceback(error)


def own_traceback(call: Callable[[], Any], plain: Callable[[], Any]) -> Any:
    """``call()``. Where it fails, and the user's code ``plain`` fails by itself as well, the program ends with that traceback."""
    try:
        return call()
    except AttnfxError:
        raise
    except Exception as error:
        failure = error
    _result(plain)
    raise failure


def _exit_with_own_traceback(error: Exception) -> Any:
    """Print the traceback from the user's first frame on, without ours above it, and exit."""
    ours = (os.path.dirname(os.path.dirname(__file__)) + os.sep, str(importlib.__file__))
    frame = error.__traceback__
    while frame is not None and (frame.tb_frame.f_code.co_filename.startswith(ours) or _is_importlib(frame)):
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame)
    sys.exit(1)


def _is_importlib(frame: Any) -> bool:
    return str(frame.tb_frame.f_code.co_filename).startswith("<frozen importlib")


def _named(value: Any) -> str:
    return f"a tuple of {len(value)} values" if isinstance(value, tuple) else f"a value of type {type(value).__name__}"
