"""Training: what is differentiable once, and in reverse mode, says so when other derivatives are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad


def refuse_tangents(what: str, tensors: Iterable[torch.Tensor | None]) -> None:
    """Raises RuntimeError if a tensor has a tangent, which would be dropped without a word."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{what} has no derivative in forward mode (torch.func.jvp, forward_ad)")


def differentiable_once(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of the backward of a `torch.autograd.Function` that is linear in its inputs; else there is `refuse_second`.

    Args:
        what: what the user has differentiated.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            known = any(isinstance(grad, torch.Tensor) and grad.requires_grad for grad in grads)
            return refuse_second(what, found, grads) if known else found

        return checked

    return decorate


def refuse_second(what: str, found: Iterable[Any], inputs: Iterable[Any]) -> tuple[Any, ...]:
    """The gradients that a backward has found from `inputs`; a gradient of theirs is asked for in vain, which is an error.

    For a backward with `create_graph=True`. `torch.autograd.function.once_differentiable` looks only at the gradients that come
    in. Where those require none, but what was saved for the backward does, it leaves terms out without a word.
    """
    known = [one for one in inputs if isinstance(one, torch.Tensor) and one.requires_grad]
    known = known or [torch.empty(0, requires_grad=True)]  # not all inputs need have been saved
    return _Second.apply(what, tuple(found), *known)


class _Second(torch.autograd.Function):
    """`found` as they are, and as if computed from `inputs`."""

    @staticmethod
    def forward(ctx: Any, what: str, found: tuple[Any, ...], *inputs: torch.Tensor) -> tuple[Any, ...]:
        del inputs
        ctx.what = what
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.what} is differentiable once: gradients of its gradients (create_graph=True) cannot be had"
        )
