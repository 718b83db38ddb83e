"""`Copies`: what the lanes of one trainable layer compute with where experts compute away from their owners.

Weights travel to them before a forward, gradients back in a backward, at most once each a step. What was begun and did not come
to its end is remembered: then this rank takes part in nothing more until all have agreed to begin anew.

Legend: S lanes of this rank, O experts that this rank owns.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moe_kernels.base.once import differentiable_once
from moe_layer.trainable.publish import Route
from moe_layer.weights.owned import OwnedExperts

_WHAT_TO_DO = (
    "Parameters and optimizer state are what the last optimizer.step() made them, here as on every rank that has not stepped "
    "since; gradients may be halves: do not step by them. If all ranks and process_group are in order, call "
    "moe_layer.training.abandon_step(model) on all of them, and repeat the step. After a rank was lost or a deadline passed, "
    "process_group is of no more use: start anew from the last checkpoint (moe_layer.TrainingState)"
)


class Copies:
    """The copies, one a lane, of the parameters of one layer.

    Attributes:
        is_stale: whether the next forward sends the weights. Equal on all ranks, unless a step failed on one of them.
        syncs: False in `moe_layer.training.no_sync`: a backward adds its gradients to the lanes' own.
        num_waiting: the backwards whose gradients wait in the lanes.
    """

    def __init__(self, owned: OwnedExperts, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.is_stale, self.syncs, self.num_waiting = True, True, 0
        self._owned, self._group, self._device = owned, group, device
        self._lanes: list[torch.Tensor] | None = None
        self._waiting: list[torch.Tensor | None] = []
        self._route: Route | None = None
        self._sent: list[tuple[weakref.ref[torch.Tensor], int]] = []  # what the lanes hold: tensors and their versions
        self._begun: str | None = None

    @property
    def route(self) -> Route:
        if self._route is None:
            self._route = Route(self._owned.placement, self._owned.num_owned, self._owned.rank, self._device)
        return self._route

    def of(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The lanes' copies ``[S, …]``, up to date, by name; their gradients come back to `weights`, ``[O, …]``. Collective.

        Raises:
            RuntimeError: parameters were written since, of which the other ranks may know nothing; or what a step began did
                not come to its end.
        """
        self.check_whole()
        for (name, weight), (sent, version) in zip(weights.items(), self._sent, strict=False):
            if sent() is not weight:
                # Other tensors, as on all ranks: a parametrization's, or those of `functional_call`.
                self.is_stale = True
            elif weight._version != version and not self.is_stale:
                raise RuntimeError(
                    f"experts.{name} was written without a backward, a load or place() before, so the copies that compute with "
                    "it are older: call experts.publish() on all ranks after such a write"
                )
        return dict(zip(weights, _Publish.apply(self, *weights.values()), strict=True))

    def moved(self) -> None:
        """Experts compute elsewhere now."""
        self._route, self.is_stale = None, True

    def note_as_sent(self) -> None:
        """Parameters were written with what they held."""
        self._sent = [(sent, version if (one := sent()) is None else one._version) for sent, version in self._sent]

    def abandon(self) -> None:
        """As after a step that has not begun."""
        self.num_waiting, self._waiting, self._begun, self.is_stale = 0, [], None, True

    def check_whole(self) -> None:
        """Raises RuntimeError if something begun did not come to its end on this rank."""
        if self._begun is not None:
            raise RuntimeError(f"{self._begun} did not come to its end on this rank. {_WHAT_TO_DO}")

    def check_nothing_waits(self, what: str) -> None:
        """Raises RuntimeError where `what` would pass over gradients that wait."""
        if self.num_waiting:
            raise RuntimeError(
                f"{what}: the gradients of {self.num_waiting} backwards within no_sync() wait where the experts compute. The "
                "last backward of a step must be outside of it; or drop them by abandon_step(model)"
            )

    @contextmanager
    def begin(self, what: str) -> Iterator[dist.ProcessGroup]:
        """Something that must be done by all ranks or none.

        Another rank that has come to the end of it has met this one inside: so where ranks differ in what they have done, one
        of them remembers that it has not finished, and refuses the next forward.
        """
        assert self._group is not None
        self.check_whole()
        self._begun = what
        try:
            yield self._group
        except Exception as error:
            rank, ranks = dist.get_rank(), dist.get_process_group_ranks(self._group)
            raise RuntimeError(
                f"{what} among the ranks {ranks} failed on rank {rank}. {_WHAT_TO_DO}. ({error})"
            ) from error
        self._begun = None

    @torch.no_grad()
    def _published(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._lanes is None:
            num_lanes = self._owned.num_lanes
            self._lanes = [weight.new_empty((num_lanes, *weight.shape[1:])) for weight in weights]
        if self.is_stale:
            with self.begin("sending weights to the experts' copies") as group:
                for weight, lanes in zip(weights, self._lanes, strict=True):
                    self.route.publish(weight.detach(), lanes, group)
                self._sent = [(weakref.ref(weight), weight._version) for weight in weights]
                self.is_stale = False
        return self._lanes

    def _returned(
        self, grads: Sequence[torch.Tensor | None], wanted: Sequence[bool], route: Route
    ) -> list[torch.Tensor | None]:
        """The owners' gradients; none while they wait in the lanes."""
        self.check_whole()
        if self.num_waiting:
            grads = [_sum(*pair) for pair in zip(self._waiting, grads, strict=True)]
        if not self.syncs:
            self._waiting, self.num_waiting = list(grads), self.num_waiting + 1
            return [None] * len(grads)
        with self.begin("returning gradients from the experts' copies") as group:
            self._waiting, self.num_waiting = [], 0
            found = [
                route.collect(grad, group) if is_wanted and grad is not None else None
                for grad, is_wanted in zip(grads, wanted, strict=True)
            ]
            # An optimizer step may follow. Every rank has come here equally often, so all send alike, as they would not if each
            # looked whether its own parameters have changed.
            self.is_stale = True
        return found


def _sum(waiting: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """In the order of the backwards and in the dtype of the parameters, as autograd adds to `grad`."""
    if waiting is None or grad is None:
        return grad if waiting is None else waiting
    return waiting.add_(grad)  # of the backward that made it, it was the only reader


class _Publish(torch.autograd.Function):
    """The lanes' copies of the owners' parameters; the backward sums the copies' gradients at the owners."""

    @staticmethod
    def forward(ctx: Any, copies: Copies, *owned: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.copies = copies
        ctx.set_materialize_grads(False)
        lanes = copies._published(owned)
        ctx.route = copies.route
        return tuple(copy.detach() for copy in lanes)

    @staticmethod
    @differentiable_once("a trainable MoELayer")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.copies._returned(grads, ctx.needs_input_grad[1:], ctx.route)
