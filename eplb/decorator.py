"""`step_eplb_after`: calls a controller's `step()` after a runner's method."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def step_eplb_after(method: Method | None = None, *, attribute: str = "eplb") -> Any:
    """Decorator for a runner's method that runs a forward: `step()` the runner's controller when it has returned.

    Args:
        method: the method (when used without arguments).
        attribute: name of the runner's attribute that holds its `EplbController`, or None to step nothing.

    Raises:
        ValueError: `method` cannot be called, or `attribute` is no name.
    """
    if method is not None and not callable(method):
        raise ValueError(f"method must be a method, got {method!r}: give the name of an attribute as attribute=...")
    if not isinstance(attribute, str):
        raise ValueError(f"attribute must be the name of an attribute, got {attribute!r}")

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            controller = getattr(self, attribute)
            if controller is not None:
                controller.step()
            return result

        return stepping  # type: ignore[return-value]

    return decorate(method) if method is not None else decorate
