"""Trainable experts that are spread over ranks, under DDP and FSDP, which take parameters for copies.

They are to leave these experts alone: each rank has others, whose gradients are whole already, summed over the rows of all
ranks. What DDP and FSDP2 average elsewhere over D ranks, a layer divides by D here (`Experts.gradient_divisor`), so that
all parameters get gradients of one loss: the mean over the ranks.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.base.checks import check_kind
from moe_layer.arguments import is_number
from moe_layer.weights.experts import Experts


def ignore_in_ddp(model: nn.Module, *, gradient_divisor: float | None = None) -> list[str]:
    """Tell `DistributedDataParallel` to leave the experts of `model` alone. Call it on what DDP is to wrap, before that.

    A trainable layer whose experts are spread over ranks has other experts on each. DDP would overwrite them with
    rank 0's and average their gradients; and it asks only the module that it wraps which parameters to ignore. A
    `MoELayer` that is wrapped itself has said so; a model around it needs this call. A layer that finds itself in a DDP
    module that manages its experts raises in its forward.

    Args:
        gradient_divisor: what gradients of these experts are divided by. None: in its first forward under DDP a layer takes
            the number of DDP's ranks, as DDP averages over them. Give 1 where a communication hook sums instead.

    Returns:
        The names of the parameters that DDP will ignore, earlier ones included.

    Raises:
        ValueError: `gradient_divisor` is no number above 0.
    """
    _check_divisor(gradient_divisor)
    check_kind("model", model, nn.Module)
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    for name, module in model.named_modules():
        own = getattr(module, "_ddp_params_and_buffers_to_ignore", []) if module is not model else []
        ignored += [f"{name}.{one}" for one in own]
    for name, experts in _spread_experts(model):
        experts.gradient_divisor = gradient_divisor
        prefix = f"{name}." if name else ""
        ignored += [f"{prefix}{one}" for one, _ in experts.named_parameters()]
    names = sorted(set(ignored))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names


def ignore_in_fsdp(
    model: nn.Module, mesh: DeviceMesh | None = None, *, gradient_divisor: float | None = None
) -> set[nn.Parameter]:
    """The experts that FSDP2 must leave alone: ``fully_shard(module, mesh=mesh, ignored_params=ignore_in_fsdp(model, mesh))``.

    Each rank has other experts, so they are sharded already. Without `ignored_params` they raise in `fully_shard`.

    Give the optimizer ``foreach=False``, or the experts in a parameter group of their own: with `foreach`, the default on a
    GPU, or `fused`, PyTorch's optimizers refuse groups that mix plain tensors, as the experts are, and `DTensor`s.

    Args:
        model: the whole, with trainable layers whose experts are spread over ranks; others are FSDP2's to shard.
        mesh: as given to `fully_shard`; None: all ranks.
        gradient_divisor: what gradients of these experts are divided by from now on. None: the ranks of `mesh`, as FSDP2
            averages over them. Give the factor of `set_gradient_divide_factor()` where that is called.

    Returns:
        Parameters of `model`.

    Raises:
        ValueError: `mesh` has ranks that do not share a layer's experts; they hold copies, which nothing keeps equal. Or
            `gradient_divisor` is no number above 0.
    """
    _check_divisor(gradient_divisor)
    if mesh is not None:
        check_kind("mesh", mesh, DeviceMesh)
    found = [experts for _, experts in _spread_experts(model)]
    ranks = list(range(dist.get_world_size())) if mesh is None else mesh.mesh.flatten().tolist()
    for experts in found:
        if gradient_divisor is None:
            without = _ranks_without(experts, ranks)
            if without:
                raise ValueError(
                    f"mesh must have no ranks but those that share the experts, got also {without}: {_COPIES}"
                )
    for experts in found:
        experts.gradient_divisor = _divisor(experts, ranks) if gradient_divisor is None else gradient_divisor
    return {parameter for experts in found for parameter in experts.parameters()}


_COPIES = (
    "they hold copies of this rank's experts, and nothing would keep them equal. Reduce their gradients yourself and give "
    "gradient_divisor, or share the experts over all ranks"
)


def _check_divisor(gradient_divisor: float | None) -> None:
    if gradient_divisor is not None and not (is_number(gradient_divisor) and gradient_divisor > 0):
        raise ValueError(f"gradient_divisor must be None or a number above 0, got {gradient_divisor!r}")


def _spread_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Names and trainable experts that are spread over ranks: of our layers and of swapped models."""
    check_kind("model", model, nn.Module)
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.trainable and module.resident.num_ranks > 1:
            yield name, module


def _ranks_without(experts: Experts, ranks: Sequence[int]) -> list[int]:
    """Of `ranks` (global), those that are not of the experts' group."""
    assert experts.process_group is not None
    return sorted(set(ranks) - set(dist.get_process_group_ranks(experts.process_group)))


def _divisor(experts: Experts, ranks: Sequence[int]) -> int:
    # Where all ranks hold one batch (`swap_experts(tokens="replicated")`), each of its rows is computed once, not summed over.
    return 1 if getattr(experts, "tokens", "own") == "replicated" else len(ranks)


@torch.compiler.disable
def check_ddp(experts: Experts, process_group: dist.ProcessGroup) -> None:
    """Looks whether a DDP module around this forward treats the experts rightly, and by what it divides gradients.

    DDP over other ranks, each of which has the same experts, is right and allowed.

    Raises:
        RuntimeError: it manages experts over ranks that hold different ones; or it leaves them alone, over ranks that hold
            copies.
    """
    _check_fsdp1(experts)
    around = DistributedDataParallel._get_active_ddp_module()
    if around is None:
        return
    ranks = dist.get_process_group_ranks(around.process_group)
    managed = {id(parameter) for parameter in around._module_parameters}
    if any(id(parameter) in managed for parameter in experts.parameters()):
        if len(set(ranks).intersection(dist.get_process_group_ranks(process_group))) > 1:
            raise RuntimeError(
                "DistributedDataParallel has overwritten the experts of this rank with another rank's, although each rank "
                "has experts of its own. Call moe_layer.ignore_in_ddp(model) before DistributedDataParallel(model), and load "
                "the weights again"
            )
    elif experts.gradient_divisor is None and experts.resident.num_ranks > 1:
        without = _ranks_without(experts, ranks)
        if without and any(parameter.requires_grad for parameter in experts.parameters()):
            raise RuntimeError(
                f"DistributedDataParallel is over ranks that do not share the experts, {without}: {_COPIES}"
            )
        # Remembered: a checkpoint's recomputation runs outside of DDP's forward.
        experts.gradient_divisor = _divisor(experts, ranks)


def _check_fsdp1(experts: Experts) -> None:
    """Raises RuntimeError if `FullyShardedDataParallel` manages experts that are spread over all ranks, whoever they are.

    Over other ranks than the experts' group it may be right; which ranks they are it does not say.
    """
    if not 1 < experts.resident.num_ranks == dist.get_world_size():
        return
    for tensor in experts.format.tensors:
        if getattr(getattr(experts, tensor.name)._base, "_is_flat_param", False):
            raise RuntimeError(
                f"FullyShardedDataParallel has mixed experts.{tensor.name} of this rank with another rank's, although each "
                "rank has experts of its own. Give it ignored_states=moe_layer.ignore_in_fsdp(model)"
            )


def refuse_sharding(name: str, ranks: list[int], process_group: dist.ProcessGroup) -> None:
    """Raises RuntimeError if `ranks` (global), over which experts are to be sharded, hold different experts.

    FSDP2 over other ranks, each of which has the same experts, is right and allowed.
    """
    shared = sorted(set(ranks).intersection(dist.get_process_group_ranks(process_group)))
    if len(shared) > 1:
        raise RuntimeError(
            f"experts.{name} cannot be sharded over the ranks {shared}, which hold different experts: it would mix them. "
            "Call fully_shard(..., ignored_params=moe_layer.ignore_in_fsdp(model)), or shard over other ranks than "
            "process_group's"
        )
