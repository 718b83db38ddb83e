"""Makes Triton's interpreter faster, and changes nothing else: tests interpret kernels where there is no GPU.

Before a kernel runs, the interpreter puts its own functions in the place of those of `triton.language`, and takes them away
again at the end. Triton 3.6 and 3.7 look through all names of the language for that. They do it again in each call of a
`triton.jit` function by another, `tl.sum` and `tl.zeros` among them, where everything is in place already. Each time they ask
for the NumPy type of a type, they build the table of all types anew. (`triton/runtime/interpreter.py`: `_patch_lang`,
`InterpretedFunction.__call__`, `_get_np_dtype`.)
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterError

QUICKENED = triton.__version__.startswith(("3.6.", "3.7."))
"""Whether this Triton's interpreter is one that was read for this. Another one stays as it is."""

_slow_np_dtype = interpreter._get_np_dtype
_scalar_np_dtype = functools.cache(_slow_np_dtype)


def quicken_interpreter() -> None:
    """To be called before the first launch of a process. Calls again change nothing."""
    if not QUICKENED:
        return
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _np_dtype
    InterpretedFunction.__call__ = _call


def _call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """As the interpreter's own, but replaces functions only if that is still to do."""
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


@functools.cache
def _languages(function: Any) -> list[ModuleType]:
    """The modules whose functions are replaced for a function, of those that it can see."""
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """As the interpreter's own, but looks through the names of a package only once."""
    for name in _builtin_names(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # not replaced already
            interpreter._patch_attr(package, name, member, builder, scope)


@functools.cache
def _builtin_names(package: Any) -> list[str]:
    found = [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    assert found, f"{package} has no function to replace: asked for too late?"
    return found


def _np_dtype(dtype: Any) -> Any:
    return _scalar_np_dtype(dtype) if type(dtype) is tl.dtype else _slow_np_dtype(dtype)  # others have no hash
