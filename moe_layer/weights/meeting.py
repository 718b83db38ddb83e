"""Saving and loading: waits for all ranks before a collective call, with a deadline, over the group's store."""

from collections import Counter
from datetime import timedelta

import torch.distributed as dist

# Meetings that all ranks of a group attended, by its name: equal on all of them, as meetings are collective.
_held: Counter[str] = Counter()


def meet(group: dist.ProcessGroup, what: str, timeout: float, say: str | None = None) -> list[str]:
    """Return when every rank of `group` has called this as often; `timeout` in seconds. Moves no tensors.

    Returns:
        What each rank of the group said, in order; nothing if this one said nothing.

    Raises:
        TimeoutError: some ranks did not come. The message names them, and `what` they should have called.
    """
    name, rank = group.group_name, dist.get_rank(group)
    store = dist.PrefixStore(f"moe_layer/{name}", dist.distributed_c10d._get_default_store())
    number = _held[name]
    # Whoever is here has been at the last meeting, so all have left the one before.
    store.delete_key(f"{number - 2}/{rank}")
    store.set(f"{number}/{rank}", say or what)
    keys = [f"{number}/{other}" for other in range(dist.get_world_size(group))]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        missing = [dist.get_global_rank(group, other) for other, key in enumerate(keys) if not store.check([key])]
        store.delete_key(f"{number}/{rank}")
        raise TimeoutError(
            f"{what} is collective here, but within {timeout} s the ranks {missing} did not call it"
        ) from error
    said = [store.get(key).decode() for key in keys] if say is not None else []
    _held[name] += 1
    return said
