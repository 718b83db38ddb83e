"""`TrainingBalancer`: plans where the experts of trainable layers compute, from the load, between steps.

Legend: L layers, E logical experts, W ranks, P physical experts of a rank.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from eplb.planning.make_plan import shares_in_lanes
from eplb.planning.placement import Placement
from eplb.planning.policy import Policy, Proposal, Topology, make_policy
from moe_kernels.base.checks import check_kind
from moe_layer.arguments import check_integer
from moe_layer.collectives import all_gather_rows
from moe_layer.trainable.trainable_experts import TrainableExperts


class TrainingBalancer:
    """Call `step()` after each optimizer step, on every rank. What the weights' next way is, is all that it changes.

    ::

        balancer = TrainingBalancer(model, process_group, interval=100)
        for batch in batches:
            loss(model(batch)).backward()
            optimizer.step(); optimizer.zero_grad()
            balancer.step()

    Args:
        model: every trainable `MoELayer` in it that spreads its experts over `process_group` is balanced.
        process_group: of several ranks.
        interval: steps from one look at the load to the next.
        policy: name of a registered policy, or an object with `propose` (see `eplb.EplbConfig.policy`). It must be a pure
            function, as every rank plans for itself.
        options: of a policy that is named.

    Attributes:
        num_moved: copies whose place has changed, over all layers and ranks, so far.

    Raises:
        ValueError: no layer of the model can be balanced over the group, or layers differ in their numbers of experts or
            replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: dist.ProcessGroup,
        *,
        interval: int = 100,
        policy: str | Policy = "adaptive",
        **options: object,
    ) -> None:
        check_kind("model", model, nn.Module)
        check_integer("interval", interval, 1)
        self.layers = [
            module
            for module in model.modules()
            if isinstance(module, TrainableExperts)
            and module.process_group is process_group
            and module.owned.num_ranks > 1
        ]
        sizes = {(one.num_experts, one.owned.num_redundant_experts) for one in self.layers}
        if len(sizes) != 1:
            what = "no trainable layer" if not sizes else f"layers with (experts, redundant experts) of {sorted(sizes)}"
            raise ValueError(
                f"model has {what} over process_group: it needs trainable layers of equal numbers of experts"
            )
        self.interval = interval
        self.num_moved = 0
        self._group = process_group
        self._policy = make_policy(policy, **options)
        self._topology = Topology(self.layers[0].owned.num_ranks)
        self._num_steps = 0
        self._seen_LE = self._load()

    def step(self) -> bool:
        """Returns whether it looked at the load, which is collective: every `interval`-th call."""
        self._num_steps += 1
        if self._num_steps % self.interval:
            return False
        window_LE, self._seen_LE = self._window(), self._load()
        self._rebalance(window_LE.cpu().numpy())
        return True

    def state_dict(self) -> dict[str, Any]:
        """What `step()` has counted, in plain Python, for any number of ranks (`TrainingState` saves it). Collective.

        ``num_steps``, ``num_moved``, and ``window`` [L, E]: tokens of all ranks since the last look at the load.
        """
        return {"num_steps": self._num_steps, "num_moved": self.num_moved, "window": self._window().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict()`, on every rank. Where experts compute, `layer.experts.place()` restores.

        Raises:
            ValueError: it is of other numbers of layers or experts.
        """
        load_LE, window_LE = self._load(), torch.tensor(state["window"], dtype=torch.int64)
        if window_LE.shape != load_LE.shape:
            raise ValueError(
                f"the balancer's window must be of (layers, experts) = {tuple(load_LE.shape)}, got {tuple(window_LE.shape)}"
            )
        self._num_steps, self.num_moved = state["num_steps"], state["num_moved"]
        # All of the window is the first rank's, as there may be other ranks than those that counted it.
        is_first = dist.get_rank(self._group) == 0
        self._seen_LE = load_LE - window_LE.to(load_LE.device) if is_first else load_LE

    def _window(self) -> torch.Tensor:
        """int64 [L, E]: tokens of all ranks since the last look."""
        window_LE = self._load() - self._seen_LE
        return all_gather_rows(window_LE.flatten()[None], self._group).sum(dim=0).view_as(window_LE)

    def _load(self) -> torch.Tensor:
        """int64 [L, E], of this rank since the start."""
        return torch.stack([one.owned.load_E for one in self.layers])

    def _rebalance(self, load_LE: np.ndarray) -> None:
        physical_LWP = np.stack([one.owned.placement.compact() for one in self.layers])
        proposal = self._policy.propose(load_LE[:, None, :], physical_LWP, self._topology)
        for experts, physical_WP, shares_WP in zip(
            self.layers, proposal.physical_LWP, proposal.shares_LWP, strict=True
        ):
            old = experts.owned.placement.lanes_WS
            new, shares_WS = _in_place(old, physical_WP, shares_WP)
            self.num_moved += int((new != old).sum())
            if not np.array_equal(new, old) or not np.array_equal(shares_WS, experts.owned.shares_WS):
                experts.place(Placement(new, experts.num_experts), shares_WS)


def _in_place(lanes_WS: np.ndarray, physical_WP: np.ndarray, shares_WP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The wanted experts of each rank in its lanes, those that stay in the lanes that they have.

    Example: lanes `[[3, 1]]`, wanted `[[2, 3]]` → `[[3, 2]]`.
    """
    new_WS = np.empty_like(lanes_WS)
    for rank, (held, wanted) in enumerate(zip(lanes_WS, physical_WP, strict=True)):
        left = wanted.tolist()
        empty = []
        for lane, expert in enumerate(held.tolist()):
            if expert in left:
                left.remove(expert)
                new_WS[rank, lane] = expert
            else:
                empty.append(lane)
        new_WS[rank, empty] = left
    return new_WS, shares_in_lanes(new_WS, Proposal(physical_WP[None], shares_WP[None]), 0)
