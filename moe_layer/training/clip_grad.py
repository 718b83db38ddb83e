"""`clip_grad_norm`: the norm of a model's gradients where experts, or shards, are spread over ranks.

PyTorch's own sums what a rank holds: with other experts on each rank, ranks would clip by different norms, and what is equal on
all of them, routers and attention, would drift apart.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard

from eplb.groups import check_member
from moe_kernels.base.checks import check_kind
from moe_layer.collectives import all_gather_rows
from moe_layer.trainable.trainable_experts import TrainableExperts

_Groups = tuple[dist.ProcessGroup, ...]
"""Over which a gradient is spread, one after the other; none: all ranks hold the whole."""


@torch.no_grad()
def clip_grad_norm(
    model: nn.Module | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Scale all gradients so that their norm is at most `max_norm`: `torch.nn.utils.clip_grad_norm_` over several ranks.

    The norm is that of the whole model, each parameter counted once: trainable experts over the ranks of their layer's
    `process_group`, DTensors (FSDP2) over the ranks that shard them, and others here, as they are equal on all ranks. The
    result has the same bits on all ranks if the gradients of the others have. Collective, except where nothing is spread. No
    host sync, except with `error_if_nonfinite` or gloo.

    Call it after the last backward of a step. A parameter with a `main_grad` and without a `grad` is clipped there.

    Args:
        model: a module, which may be wrapped. It knows which parameters are experts. Or parameters, which are then all taken
            for parts of a whole that is spread over `process_group`, like experts.
        max_norm: at least 0.
        norm_type: p of the p-norm; inf for the largest element.
        error_if_nonfinite: whether a norm that is no finite number is an error; otherwise gradients are scaled by it.
        process_group: only with parameters.

    Returns:
        The norm before, float32 scalar on the device of the first parameter; 0 without gradients.

    Raises:
        ValueError: an argument out of range; `process_group` with a module; or a gradient is a DTensor of partial sums.
        RuntimeError: the norm is not finite, with `error_if_nonfinite`: on all ranks, and no gradient is changed. Or gradients
            wait in `no_sync`.
    """
    try:
        max_norm, norm_type = float(max_norm), float(norm_type)
    except (TypeError, ValueError):
        raise ValueError(f"max_norm and norm_type must be numbers, got {max_norm!r} and {norm_type!r}") from None
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number of at least 0, got {max_norm!r}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a number above 0 or inf, got {norm_type!r}")
    gradients: dict[_Groups, list[torch.Tensor]] = {}
    device = None
    for parameter, groups in _spread_parameters(model, process_group):
        gradient = _gradient_of(parameter)
        device = device or parameter.device
        local = gradients.setdefault(groups, [])  # also without a gradient: the others may have one, and wait
        if gradient is not None:
            local.append(gradient)
    device = device or torch.device("cpu")
    norms = []
    for groups, local in gradients.items():
        norms += _norms_over_ranks(local, groups, norm_type, device)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the gradients' norm of order {norm_type} is {float(total)}, so they cannot be clipped; "
            "error_if_nonfinite=False would scale them by it"
        )
    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as PyTorch's; a product with 1 needs no host sync
    for alike in _by_device_and_dtype([one for local in gradients.values() for one in local]):
        torch._foreach_mul_(alike, coefficient.to(alike[0].device))
    return total


def _spread_parameters(
    model: nn.Module | Iterable[torch.Tensor], process_group: dist.ProcessGroup | None
) -> Iterable[tuple[torch.Tensor, _Groups]]:
    """Each parameter that is trained, once, and what it is spread over; in the same order on all ranks."""
    if not isinstance(model, nn.Module):
        check_kind("model", model, Iterable)
        check_member(process_group)
        own: _Groups = () if process_group is None or process_group.size() == 1 else (process_group,)
        for parameter in model:
            check_kind("a parameter", parameter, torch.Tensor)
            yield parameter, (*_sharded_over(parameter), *own)
        return
    if process_group is not None:
        raise ValueError("process_group must be left out where model is a module: its layers know theirs")
    experts: dict[int, _Groups] = {}
    for module in model.modules():
        if isinstance(module, TrainableExperts) and module.resident.num_ranks > 1:
            module.copies.check_nothing_waits("clip_grad_norm()")
            assert module.process_group is not None
            experts |= dict.fromkeys(map(id, module.parameters()), (module.process_group,))
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter, (*_sharded_over(parameter), *experts.get(id(parameter), ()))


def _sharded_over(parameter: torch.Tensor) -> _Groups:
    if not isinstance(parameter, DTensor):
        return ()
    if any(isinstance(placement, Partial) for placement in parameter.placements):
        raise ValueError(f"model has a parameter of partial sums, {parameter.placements}: it has no norm yet")
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if isinstance(placement, Shard) and mesh.size(dim) > 1
    )


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's part, to be scaled in place."""
    gradient = parameter.grad if parameter.grad is not None else getattr(parameter, "main_grad", None)
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _norms_over_ranks(
    local: list[torch.Tensor], groups: _Groups, norm_type: float, device: torch.device
) -> list[torch.Tensor]:
    """Norms of which all ranks have the same, if what is spread over no group is the same on them."""
    norms = []
    for alike in _by_device_and_dtype(local):
        # In float32: rounded to bfloat16, as PyTorch's is for such gradients, a norm differs by up to 0.2 %.
        dtype = torch.promote_types(alike[0].dtype, torch.float32)
        norms += [norm.to(device, torch.float32) for norm in torch._foreach_norm(alike, norm_type, dtype)]
    if not groups:
        return norms
    norm = torch.zeros((), device=device)
    if norms:
        norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for group in groups:
        # Gathered, not summed: no power of it can overflow, and every rank reduces the same numbers in the same order.
        norm = torch.linalg.vector_norm(all_gather_rows(norm.view(1, 1), group), norm_type)
    return [norm]


def _by_device_and_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())
