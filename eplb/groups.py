"""Process groups of our own beside a user's."""

from datetime import timedelta

import torch.distributed as dist

# Our deadlines are states that `health()` shows and that a late peer can still mend; a timeout of torch's own would
# break the group for good. So the groups' timeout is out of reach.
_NEVER = timedelta(days=7)


def check_member(process_group: dist.ProcessGroup | None) -> None:
    """Raises ValueError if this rank is not in the group."""
    if process_group is not None and dist.get_rank(process_group) < 0:
        raise ValueError(f"process_group must be one that rank {dist.get_rank()} is in, got {process_group!r}")


def ranks_of(process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The global ranks of a group, in their order in it; empty for one rank alone, as for None."""
    ranks = dist.get_process_group_ranks(process_group) if process_group is not None else ()
    return tuple(ranks) if len(ranks) > 1 else ()


def new_group_like(process_group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """A new group with the ranks of `process_group`, called by those ranks alone. Collective over them."""
    ranks = dist.get_process_group_ranks(process_group)
    group = dist.new_group(ranks, timeout=_NEVER, backend=backend, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
