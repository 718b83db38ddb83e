"""Peer memory: how ranks tell each other a few bytes while they connect."""

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

Exchange = Callable[[bytes], list[bytes]]
"""Says these bytes to all ranks; returns what each has said, by rank. Collective; ends in an error if a rank does not come."""


def over_group(group: dist.ProcessGroup) -> Exchange:
    """Over the group's own collectives, and with their timeout."""

    def exchange(mine: bytes) -> list[bytes]:
        said: list[bytes] = [b""] * dist.get_world_size(group)
        dist.all_gather_object(said, mine, group=group)
        return said

    return exchange


def over_store(store: dist.Store, rank: int, size: int, timeout: float) -> Exchange:
    """Over a store that nothing else uses; each exchange waits up to `timeout` seconds.

    Raises (the exchange):
        TimeoutError: naming the first rank that did not come.
    """
    count = 0

    def exchange(mine: bytes) -> list[bytes]:
        nonlocal count
        count += 1
        store.set(f"{count}/{rank}", mine)  # type: ignore[arg-type]  # bytes work too
        deadline, said = time.monotonic() + timeout, []
        for other in range(size):
            left = max(0.001, deadline - time.monotonic())
            try:
                store.wait([f"{count}/{other}"], timedelta(seconds=left))
            except RuntimeError as error:
                raise TimeoutError(f"rank {other} did not connect within {timeout} s") from error
            said.append(store.get(f"{count}/{other}"))
        return said

    return exchange
