"""Forward, dispatch: the few collectives, for tensors and groups of any device. Loading uses them too.

gloo takes part in host memory alone here: a GPU's tensor is staged through it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """ "nccl" or "gloo": what moves a tensor of `device` within `group`.

    Raises:
        ValueError: the group has no such backend for the device.
    """
    name = str(dist.get_backend(group))  # "nccl", "gloo", or "cpu:gloo,cuda:nccl"
    by_device = dict(part.split(":") for part in name.split(",")) if ":" in name else {}
    name = by_device.get(device.type, name)
    if name == "gloo" or (name == "nccl" and device.type == "cuda"):
        return name
    raise ValueError(f"process_group has the backend {name!r}, which cannot move tensors of {device}: use gloo or NCCL")


def is_absence(error: BaseException) -> bool:
    """Whether `error` is what a collective ends in if another rank does not come to it."""
    return isinstance(error, (dist.DistBackendError, TimeoutError)) or "gloo" in str(error)


def all_to_all_rows(
    rows: torch.Tensor, receive_splits: Sequence[int], send_splits: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send `send_splits[r]` consecutive rows to each rank r; returns what came, in the order of the ranks.

    Raises:
        RuntimeError: another rank did not come within the group's deadline (over gloo; NCCL ends the process itself).
    """
    staged = backend_of(group, rows.device) == "gloo"
    # Bytes: gloo knows fewer dtypes than torch, and nothing is computed on the way.
    row_bytes = rows.shape[1:].numel() * rows.element_size()
    sent = rows.contiguous().view(torch.uint8).view(rows.shape[0], row_bytes)
    sent = sent.cpu() if staged else sent
    received = torch.empty(sum(receive_splits), row_bytes, dtype=torch.uint8, device=sent.device)
    try:
        dist.all_to_all_single(received, sent, list(receive_splits), list(send_splits), group)
    except (RuntimeError, TimeoutError) as error:
        if not is_absence(error):
            raise
        raise RuntimeError(
            f"another of the {dist.get_world_size(group)} ranks of process_group did not take part in time. Every rank runs "
            "each forward and each backward, also without tokens or with a loss of NaN. This rank's parameters and optimizer "
            "state are those of its last step; to go on, make a new process group, and layers over it, and load them. "
            f"({error})"
        ) from error
    return received.to(rows.device).view(rows.dtype).view(-1, *rows.shape[1:])


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's `rows`, in the order of the ranks; as many on each rank, at least one. No host sync over NCCL."""
    num_ranks = dist.get_world_size(group)
    if backend_of(group, rows.device) == "gloo":
        # gloo's all-gather goes round in W - 1 steps, and on one host what counts is how often a process is waited for: at 4
        # ranks 3.7 ms, and an all-to-all of W copies 2.7 ms (64 rows of 304 bytes, 2 cores).
        splits = [rows.shape[0]] * num_ranks
        return all_to_all_rows(torch.cat([rows] * num_ranks), splits, splits, group)
    gathered = rows.new_empty(num_ranks * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def broadcast_(tensor: torch.Tensor, source: int, group: dist.ProcessGroup) -> None:
    """Overwrite `tensor` on all ranks with rank `source`'s (a rank within the group)."""
    if tensor.element_size() == 1:  # gloo and NCCL know no fp8
        tensor = tensor.view(torch.uint8)
    if backend_of(group, tensor.device) == "gloo" and tensor.device.type != "cpu":
        host = tensor.cpu()
        dist.broadcast(host, group=group, group_src=source)
        if dist.get_rank(group) != source:
            tensor.copy_(host)
    else:
        dist.broadcast(tensor, group=group, group_src=source)


def all_gather_flags(flags: torch.Tensor, device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's `flags` (bool ``[n]``, on the CPU), bool ``[ranks, n]``; NCCL moves them from `device`."""
    mine = flags.to(device="cpu" if backend_of(group, device) == "gloo" else device, dtype=torch.uint8)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    return torch.stack(gathered).cpu().bool()
