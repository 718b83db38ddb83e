"""Steps of several backwards, and steps that are given up, where experts compute away from their owners."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from moe_kernels.base.checks import check_kind
from moe_layer.arguments import is_number
from moe_layer.trainable.trainable_experts import TrainableExperts
from moe_layer.weights.meeting import meet

_LOGGER = logging.getLogger(__name__)


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside, a backward leaves the gradients of experts' copies where they are: for all micro-batches of a step but the last.

    ::

        with no_sync(model), ddp.no_sync():
            for batch in batches[:-1]:
                loss(model(batch)).backward()
        loss(model(batches[-1])).backward()  # sends the sum to the owners
        optimizer.step()

    Then gradients travel to their owners once a step, and weights to the copies once, instead of once for each micro-batch. The
    sums wait in the dtype of the parameters and in the order of the backwards: bit for bit those of `grad` without this where
    an expert has one replica; with more, sums are made in another order, so equal to rounding. They take the memory of the
    copies once more. Nothing changes for experts that compute at their owners.

    What counts is where the *backward* runs. All ranks enter it alike. Between two such backwards parameters must not change.
    `clip_grad_norm`, `place()` and `TrainingState` raise RuntimeError while gradients wait; `abandon_step` drops them.

    Args:
        model: with trainable `MoELayer`s or swapped experts; may be wrapped.
    """
    copies = [experts.copies for experts in _spread(model)]
    before = [one.syncs for one in copies]
    for one in copies:
        one.syncs = False
    try:
        yield
    finally:
        for one, was in zip(copies, before, strict=True):
            one.syncs = was


def abandon_step(model: nn.Module, *, timeout: float = 60.0) -> None:
    """Gives up the step under way on all ranks: after it, all is as after the last `optimizer.step()`. Collective.

    For a step that is broken off on all ranks: an exception that is caught, a loss that is not finite between two micro-batches
    of `no_sync`. (A step whose backwards are complete can be left out by `zero_grad()` alone.) Gradients are dropped, those too
    that wait at copies; copies get their weights again in the next forward. Where ranks differ in where the experts of a layer
    compute, because one of them failed while they were moved, they go to where they are by default, said at level warning.

    It cannot mend a process group: after a deadline has passed in a collective, or a rank was lost, ranks start anew from a
    checkpoint.

    Args:
        model: with trainable `MoELayer`s or swapped experts; may be wrapped.
        timeout: seconds to wait for the other ranks.

    Raises:
        ValueError: `timeout` is no number above 0.
        TimeoutError: ranks did not come; names them. Nothing has changed then.
    """
    if not is_number(timeout) or timeout <= 0:
        raise ValueError(f"timeout must be a finite number above 0, got {timeout!r}")
    layers = list(_spread(model))
    said: dict[dist.ProcessGroup, list[int]] = {}
    for experts in layers:
        assert experts.process_group is not None
        said.setdefault(experts.process_group, []).append(experts.owned.placement.digest())
    heard = {
        group: [one.split() for one in meet(group, "abandon_step()", timeout, say=" ".join(map(str, digests)))]
        for group, digests in said.items()
    }
    numbers = dict.fromkeys(said, 0)
    for experts in layers:
        group = experts.process_group
        assert group is not None
        number = numbers[group]
        numbers[group] += 1
        if len({digests[number] for digests in heard[group]}) > 1:
            _LOGGER.warning("ranks differ in where the experts of layer %d compute: they go home", number)
            experts.owned.go_home()
        experts.copies.moved()
        experts.copies.abandon()
    for parameter in model.parameters():
        parameter.grad = None
        main_grad = getattr(parameter, "main_grad", None)
        if main_grad is not None:
            main_grad.zero_()


def _spread(model: nn.Module) -> Iterator[TrainableExperts]:
    check_kind("model", model, nn.Module)
    for module in model.modules():
        if isinstance(module, TrainableExperts) and module.owned.num_ranks > 1:
            yield module
