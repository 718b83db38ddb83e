"""Pools of slots for serving layers: a layer's own, or one for several layers, from `make_pool()`."""

from typing import Any

import torch

from eplb.relocation.pool import SlotPool
from moe_layer.arguments import check_bool, check_integer, check_sizes, physical_per_rank, resolve_device, resolve_dtype
from moe_layer.weights.expert_format import ExpertFormat, gated_format
from moe_layer.weights.quantisation import Quantisation


def make_pool(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    *,
    num_redundant_experts: int = 0,
    num_shadow_slots: int = 1,
    num_ranks: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantisation: str | Quantisation | None = None,
    shared: bool = False,
) -> SlotPool:
    """A pool for `num_layers` like layers of one rank that share `num_shadow_slots` free slots.

    The price of relocation is then a few experts of memory for the whole model, not for each layer.

    Args:
        quantisation: as of the layers.
        shared: put a CPU's memory where other processes of the host can open it, as the communicator "symm_mem" needs it.

    Raises:
        ValueError: an argument out of range, or experts that do not divide by the ranks.
    """
    num_layers, num_ranks = check_integer("num_layers", num_layers, 1), check_integer("num_ranks", num_ranks, 1)
    num_shadow_slots = check_integer("num_shadow_slots", num_shadow_slots, 1)
    check_bool("shared", shared)
    sizes = check_sizes(hidden_size, intermediate_size, num_experts, num_redundant_experts)
    num_physical = physical_per_rank(*sizes[2:], num_ranks)
    format = gated_format(*sizes[:2], resolve_dtype(dtype), "silu", quantisation)
    num_slots = num_layers * num_physical + num_shadow_slots
    return SlotPool(format.specs, num_slots, resolve_device(device), shared=shared)


def resolve_pool(pool: Any, format: ExpertFormat, num_slots: int, device: torch.device) -> SlotPool:
    """`pool`, or a new one of `num_slots` for one layer if it is None.

    Raises:
        ValueError: it is no pool, or its slots hold something else.
    """
    if pool is None:
        return SlotPool(format.specs, num_slots, device)
    if not isinstance(pool, SlotPool):
        raise ValueError(f"pool must be a SlotPool, made with make_pool(), or None; got {pool!r}")
    if pool.specs != format.specs or pool.device != device:
        raise ValueError(
            f"pool holds {pool.specs} on {pool.device}, but the layer's experts are {format.specs} on {device}; "
            "make it with make_pool() and the layer's own sizes"
        )
    return pool
