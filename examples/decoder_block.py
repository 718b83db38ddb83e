"""A decoder block with a mixture of experts in place of its MLP, served while its experts move between ranks.

    torchrun --standalone --nproc-per-node 2 examples/decoder_block.py   # two ranks share the experts
    python examples/decoder_block.py                                     # one rank: it says that there is nothing to move

On CPUs over gloo; with a GPU for every rank over NCCL; on one GPU all ranks share it, over gloo.

Shape letters: B sequences, T tokens of each, H hidden.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from eplb import EplbConfig, EplbController, step_eplb_after
from moe_layer import MoELayer

HIDDEN, HEADS, INTERMEDIATE, EXPERTS, TOP_K = 128, 4, 64, 16, 2
VOCABULARY, BATCH, LENGTH, STEPS = 512, 4, 16, 400


class DecoderBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        super().__init__()
        num_ranks = dist.get_world_size(process_group) if process_group is not None else 1
        self.attention_norm = nn.RMSNorm(HIDDEN, device=device)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False, device=device)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False, device=device)
        self.mlp_norm = nn.RMSNorm(HIDDEN, device=device)
        self.mlp = MoELayer(
            HIDDEN,
            INTERMEDIATE,
            EXPERTS,
            TOP_K,
            num_redundant_experts=num_ranks if num_ranks > 1 else 0,
            process_group=process_group,
            device=device,
        )

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.attention_norm(x_BTH)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTH = x_BTH + self.out(attended.transpose(1, 2).flatten(2))
        return x_BTH + self.mlp(self.mlp_norm(x_BTH))


class Runner:
    """What serves the model. It holds a controller; the decorator steps it after each forward."""

    def __init__(self, model: nn.Module, eplb: EplbController) -> None:
        self.model = model
        self.eplb = eplb

    @step_eplb_after
    @torch.inference_mode()
    def run(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.model(x_BTH)


class Traffic:
    """Words as skewed as those of a language (Zipf), whose topic, so which words are frequent, changes half-way."""

    def __init__(self, rank: int, device: torch.device) -> None:
        random = torch.Generator().manual_seed(1)
        self._embedding = torch.randn(VOCABULARY, HIDDEN, generator=random).to(device)
        self._words = torch.stack([torch.randperm(VOCABULARY, generator=random) for _ in range(2)])
        self._frequency = torch.arange(1, VOCABULARY + 1) ** -1.2
        self._random = torch.Generator().manual_seed(2 + rank)

    def batch(self, step: int) -> torch.Tensor:
        drawn = torch.multinomial(self._frequency, BATCH * LENGTH, replacement=True, generator=self._random)
        words = self._words[int(step >= STEPS // 2)][drawn]
        return self._embedding[words.to(self._embedding.device)].view(BATCH, LENGTH, HIDDEN)


def main() -> int:
    group, rank, device = set_up()
    torch.manual_seed(0)  # the dense parts are equal on all ranks
    block = DecoderBlock(group, device)
    twin = DecoderBlock(group, device)
    twin.load_state_dict(block.state_dict())  # logical order: whatever the placement

    config = EplbConfig(step_interval=16, window_size=16, heartbeat_interval=0.01)
    eplb = EplbController(config, process_group=group)
    eplb.register(block)
    runner, traffic = Runner(block, eplb), Traffic(rank, device)
    before = block.mlp.resident.current.placement.compact()
    largest_difference = 0.0
    for step in range(STEPS):
        x_BTH = traffic.batch(step)
        y_BTH = runner.run(x_BTH)
        with torch.inference_mode():
            largest_difference = max(largest_difference, (y_BTH - twin(x_BTH)).abs().max().item())
    health, metrics = eplb.health(), eplb.metrics()
    after = block.mlp.resident.current.placement.compact()
    eplb.close()

    if rank == 0:
        for number, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            print(f"experts on rank {number}: {old} → {new}")
        print(f"{metrics.flips} flips, {metrics.moved_experts} experts moved ({metrics.moved_bytes / 1024:.0f} KiB)")
        if len(before) == 1:
            print("One rank holds all experts: there is nothing to balance. Start several with torchrun.")
        if health.last_error is not None:
            print(f"the rebalancer met an error: {health.last_error}")
    print(f"rank {rank}: largest difference from a twin that never moves: {largest_difference}", flush=True)
    if group is not None:
        dist.barrier(group)
        dist.destroy_process_group()
    nothing_happened = len(before) > 1 and not metrics.flips
    return int(largest_difference != 0.0 or nothing_happened or health.last_error is not None)


def set_up() -> tuple[dist.ProcessGroup | None, int, torch.device]:
    """The ranks that torchrun started, or this process alone."""
    if "RANK" not in os.environ:
        return None, 0, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        own_gpu = torch.cuda.device_count() >= local_ranks
        device, backend = torch.device("cuda", local_rank if own_gpu else 0), "nccl" if own_gpu else "gloo"
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group(backend)
    return dist.group.WORLD, dist.get_rank(), device


if __name__ == "__main__":
    sys.exit(main())
