"""Forward, choose replicas: keeps the table's version until the backward of this forward has run (I3).

Eager forwards hold a pin in the autograd graph. Compiled ones hold it under a number, the *token*, which is a tensor:
a compiled graph keeps nothing but tensors.

Legend: T tokens, H hidden, K top-k, L lanes.
"""

import itertools
import weakref
from typing import Any, Protocol

import numpy as np
import torch


class Pin(Protocol):
    """Keeps a version's slots as they are until it is released or freed."""

    def release(self) -> None:
        """Nothing more is enqueued that reads those slots; what was, on the calling thread's stream, may still run."""
        ...


class Weights(Protocol):
    """`Experts`."""

    @property
    def written(self) -> torch.Tensor:
        """A tensor of all weights whose version grows with each write; another one if the weights got other memory."""
        ...


class Held:
    """What a forward keeps until its backward: the pinned version; and which weights it read, and how often they were written.

    It keeps no weights alive.
    """

    def __init__(self, experts: Weights, pin: Pin) -> None:
        self.pin = pin
        written = experts.written
        self._experts, self._written, self._num_writes = weakref.ref(experts), weakref.ref(written), written._version

    def end_backward(self, *, read_again: bool = False) -> None:
        """This backward has enqueued its last read of the version. No other comes, unless the graph is retained.

        Args:
            read_again: the backward has read the weights that the experts have now, not those that the forward saved.

        Raises:
            RuntimeError: it has read other weights than the forward.
        """
        if not is_graph_retained():
            self.pin.release()
        written, experts = self._written(), self._experts()
        is_written = written is not None and written._version != self._num_writes
        if is_written or (read_again and (experts is None or experts.written is not written)):
            raise RuntimeError("the experts were given other weights between a forward and its backward")


def is_graph_retained() -> bool:
    """Whether the backward that runs may run again (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class KeepVersion(torch.autograd.Function):
    """Hidden states and weights as they are. What is computed from them has its backward before this one's.

    What is held is an attribute, as checkpoints and offloading replace saved tensors. A pin whose graph is freed is freed too.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, held: Held
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.held = held
        outputs = x_TH.view_as(x_TH), weights_TK.view_as(weights_TK)
        unwanted = [out for out, wanted in zip(outputs, ctx.needs_input_grad, strict=False) if not wanted]
        ctx.mark_non_differentiable(*unwanted)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.held.end_backward()
        return grad_x, grad_weights, None


# ---- the same for compiled graphs

_numbers = itertools.count(1)
_homes: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_pins: dict[int, Held] = {}


def home_number(home: Any) -> int:
    """A number for what has the attribute `resident`, as a compiled graph cannot hold the object."""
    number = next(_numbers)
    _homes[number] = home
    return number


class _Token(np.ndarray):
    """Memory of a token tensor: dies with the last tensor that shares it, however those were aliased."""


def _token_of(held: Held) -> torch.Tensor:
    number = next(_numbers)
    _pins[number] = held
    memory = np.array([number], dtype=np.int64).view(_Token)
    if not _is_saved_elsewhere():
        # A graph that is freed without a backward must not hold up relocations for ever.
        weakref.finalize(memory, _pins.pop, number, None).atexit = False
    return torch.from_numpy(memory)


def _is_saved_elsewhere() -> bool:
    """Whether hooks keep copies of saved tensors (offloading), so that the tensor's end says nothing of the graph's.

    Activation checkpointing's hooks keep none: it makes saved tensors anew in the backward, by another forward.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ != "torch.utils.checkpoint"


@torch.library.custom_op("moe_layer::hold_version", mutates_args=())
def hold_version(
    x_TH: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor, home: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of the three, so that what reads the table comes after this op and its backward before this op's; a token."""
    with _homes[home].resident.choice() as pin:
        token = _token_of(Held(_homes[home], pin))
    return x_TH.clone(), weights_TK.clone(), expert_ids_TK.clone(), token


@hold_version.register_fake
def _(x_TH: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: torch.Tensor, home: int) -> Any:
    token = torch.empty(1, dtype=torch.int64, device="cpu")
    return torch.empty_like(x_TH), torch.empty_like(weights_TK), torch.empty_like(expert_ids_TK), token


@torch.library.custom_op("moe_layer::release_version", mutates_args=())
def release_version(
    grad_x: torch.Tensor, grad_weights: torch.Tensor, token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the gradients, so that this op is not left out. Ends the backward of the token's version.

    Raises:
        RuntimeError: the version was given up before this backward, whose gradients may then be wrong; see also `Held`.
    """
    number = int(token)
    if number not in _pins:
        raise RuntimeError(
            "the table's version was given up before the backward of a compiled forward: its saved tensors were replaced "
            "(by hooks), or this is a second backward without retain_graph=True"
        )
    held = _pins[number] if is_graph_retained() else _pins.pop(number)
    held.end_backward()
    return grad_x.clone(), grad_weights.clone()


@release_version.register_fake
def _(grad_x: torch.Tensor, grad_weights: torch.Tensor, token: torch.Tensor) -> Any:
    return torch.empty_like(grad_x), torch.empty_like(grad_weights)


def _save_token(ctx: Any, inputs: Any, output: Any) -> None:
    *_, ids_TK, token = output
    ctx.mark_non_differentiable(ids_TK, token)
    ctx.save_for_backward(token)


def _backward(ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor, *_: Any) -> Any:
    (token,) = ctx.saved_tensors
    return *release_version(grad_x, grad_weights, token), None, None


hold_version.register_autograd(_backward, setup_context=_save_token)
