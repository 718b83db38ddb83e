"""Trainable experts that are spread over ranks, under DDP and FSDP2, which take parameters for copies."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def ignore_in_ddp(model: nn.Module) -> list[str]:
    """Tell `DistributedDataParallel` to leave the experts of `model` alone. Call it on what DDP is to wrap, before that.

    A trainable layer whose experts are spread over ranks has other experts on each. DDP would overwrite them with
    rank 0's and average their gradients; and it asks only the module that it wraps which parameters to ignore. A
    `MoELayer` that is wrapped itself has said so; a model around it needs this call. A layer that finds itself in a DDP
    module that manages its experts raises in its forward.

    Returns:
        The names of the parameters that DDP will ignore, earlier ones included.
    """
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    for name, module in model.named_modules():
        own = getattr(module, "_ddp_params_and_buffers_to_ignore", []) if module is not model else []
        ignored += [f"{name}.{one}" for one in own]
    names = sorted(set(ignored))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names


def refuse_managed_experts(experts: nn.Module, process_group: dist.ProcessGroup) -> None:
    """Raises RuntimeError if a DDP module around this forward manages `experts` over ranks that hold different ones.

    DDP over other ranks, each of which has the same experts, is right and allowed.
    """
    around = DistributedDataParallel._get_active_ddp_module()
    if around is None:
        return
    managed = {id(parameter) for parameter in around._module_parameters}
    if not any(id(parameter) in managed for parameter in experts.parameters()):
        return
    ranks = set(dist.get_process_group_ranks(process_group))
    if len(ranks.intersection(dist.get_process_group_ranks(around.process_group))) > 1:
        raise RuntimeError(
            "DistributedDataParallel has overwritten the experts of this rank with another rank's, although each rank has "
            "experts of its own. Call moe_layer.ignore_in_ddp(model) before DistributedDataParallel(model), and load "
            "the weights again"
        )


def refuse_sharding(name: str, ranks: list[int], process_group: dist.ProcessGroup) -> None:
    """Raises RuntimeError if `ranks` (global), over which experts are to be sharded, hold different experts.

    FSDP2 over other ranks, each of which has the same experts, is right and allowed.
    """
    shared = sorted(set(ranks).intersection(dist.get_process_group_ranks(process_group)))
    if len(shared) > 1:
        raise RuntimeError(
            f"experts.{name} cannot be sharded over the ranks {shared}, which hold different experts: it would mix them. "
            "Call fully_shard(..., ignored_params=set(layer.experts.parameters())), or shard over other ranks than "
            "process_group's"
        )


@torch.compiler.disable
def check_ddp(experts: nn.Module, process_group: dist.ProcessGroup) -> None:
    """`refuse_managed_experts`, outside of compiled code."""
    refuse_managed_experts(experts, process_group)
