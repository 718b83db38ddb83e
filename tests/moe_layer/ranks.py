"""What the tests of several ranks share: a policy that moves a lot, twins that never move, agreement on when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from eplb import EplbConfig, EplbController
from eplb.planning.policy import Proposal, Topology
from moe_layer import MoELayer
from tests.moe_layer.reference import give_unit_scale

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 24, 12, 8, 2
DEADLINE = 30.0  # seconds; what is waited for takes a fraction of one
QUICK = {
    "step_interval": 4,
    "window_size": 4,
    "window_samples": 2,
    "round_interval": 1e-3,
    "heartbeat_interval": 5e-3,
    "backoff": 0.01,
}


class Restless:
    """Another random placement with random shares each time: no expert has a reason to stay. Of any number of layers."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        random, num_ranks = self._random, physical_LWP.shape[1]
        wanted, shares = np.empty_like(physical_LWP), np.zeros(physical_LWP.shape)
        for layer, physical_WP in enumerate(physical_LWP):
            while True:  # no two replicas of an expert on one rank
                wanted[layer] = random.permutation(physical_WP.ravel()).reshape(physical_WP.shape)
                if all(len(set(wanted[layer, rank].tolist())) == physical_WP.shape[1] for rank in range(num_ranks)):
                    break
            weight = random.random(physical_WP.shape) + 0.1
            for expert in range(load_LNE.shape[2]):
                here = wanted[layer] == expert
                shares[layer][here] = weight[here] / weight[here].sum()
        return Proposal(wanted, shares)


def make_layer(group: dist.ProcessGroup | None, device: torch.device, seed: int = 0, **options) -> MoELayer:
    """Equal weights for equal seeds, on any number of ranks. Collective over `group`."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "top_k": TOP_K}
    options = {"device": device, "num_redundant_experts": 0, **sizes, **options}
    layer = give_unit_scale(MoELayer(process_group=group, **options), seed=seed)
    if not layer.experts.trainable:
        layer.experts.state_dict_scope = "all"
    return layer


def make_controller(group: dist.ProcessGroup, models: Sequence[torch.nn.Module], **options) -> EplbController:
    controller = EplbController(EplbConfig(**{**QUICK, "policy": Restless(), **options}), process_group=group)
    for model in models:
        controller.register(model)
    return controller


def tokens(rank: int, step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Another number of tokens on every rank and in every step, often none."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    num_tokens = int(torch.randint(-4, 12, (1,), generator=random).clamp(min=0))
    return torch.randn(num_tokens, HIDDEN, generator=random).to(device, dtype)


def everybody(condition: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `condition` holds on all ranks. Collective."""
    flag = torch.tensor([int(condition)], device=device if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.002)


class Service:
    """Layers that move beside twins that do not, compared bit for bit at every step."""

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
        layers: Sequence[MoELayer],
        twins: Sequence[MoELayer],
        controller: EplbController,
    ) -> None:
        self.rank, self.group, self.device = rank, group, device
        self.layers, self.twins, self.controller = layers, twins, controller
        self.num_steps = 0

    @torch.no_grad()
    def forward(self) -> None:
        """One forward of everything; collective. Calls no `step()`."""
        x = tokens(self.rank, self.num_steps, self.device, self.layers[0].gate.weight.dtype)
        self.num_steps += 1
        for index, (layer, twin) in enumerate(zip(self.layers, self.twins, strict=True)):
            moved, still = layer(x), twin(x)
            assert torch.equal(moved, still), (
                f"rank {self.rank}, step {self.num_steps}, layer {index}: outputs differ by "
                f"{(moved - still).abs().max().item()} at table version {layer.resident.current.number}"
            )

    def serve_until(
        self,
        condition: Callable[[], bool],
        what: str,
        step: Callable[[int], bool] = lambda number: True,
        seconds: float = DEADLINE,
    ) -> None:
        """Forwards and steps (where `step` of their number says so) until `condition` holds on all ranks. Collective."""
        deadline = time.monotonic() + seconds
        while not everybody(condition(), self.group, self.device):
            self.forward()
            if step(self.num_steps):
                self.controller.step()
            assert time.monotonic() < deadline, (
                f"rank {self.rank}: not within {seconds} s: {what}; {self.controller.health()}"
            )

    def assert_well(self) -> None:
        """Health and metrics after relocations, with all of them at rest. Collective."""
        health, metrics = self.controller.health(), self.controller.metrics()
        slot_bytes = self.layers[0].resident.pool.slot_bytes
        assert health.last_error is None and metrics.failures == 0, health
        assert health.state in ("idle", "rebalancing", "held") and health.quarantined_slots == 0, health
        assert health.version == metrics.waves >= metrics.plans >= 1, metrics
        assert metrics.moved_bytes == metrics.moved_experts * slot_bytes > 0, metrics
        assert metrics.rounds >= metrics.proposals >= metrics.plans, metrics
        assert metrics.abandoned == 0 and metrics.windows >= 1, metrics
        assert 0 < (metrics.balancedness or 0) <= 1, metrics
        assert metrics.fill_seconds > 0 and metrics.grace_seconds > 0, metrics
        # Who is done closes its controller, and the others' health then says so: not before they have looked.
        everybody(True, self.group, self.device)
