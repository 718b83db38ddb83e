"""Before the first rebalance: who the ranks of a user's process group are, and a place in their store to meet."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

_LONGEST_PAUSE = 0.2  # seconds between two looks into the store

# How often this process has begun to meet the ranks of a group: the ranks do so in the same order, as they do everything
# that is collective, so the number tells their meetings apart, also from those that never took place.
_num_meetings: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def check_member(process_group: dist.ProcessGroup | None) -> None:
    """Raises ValueError if this rank is not in the group."""
    if process_group is not None and dist.get_rank(process_group) < 0:
        raise ValueError(f"process_group must be one that rank {dist.get_rank()} is in, got {process_group!r}")


def ranks_of(process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The global ranks of a group, in their order in it; empty for one rank alone, as for None."""
    ranks = dist.get_process_group_ranks(process_group) if process_group is not None else ()
    return tuple(ranks) if len(ranks) > 1 else ()


@dataclass(frozen=True)
class Peers:
    """The ranks of a group, and a store that nothing else uses.

    Attributes:
        rank: this rank's, in the group.
        ranks: their numbers in the default group, by rank.
    """

    store: dist.Store
    rank: int
    ranks: tuple[int, ...]

    def part(self, name: str) -> dist.Store:
        """A part of the store for one use."""
        return dist.PrefixStore(name, self.store)

    def meet(self, cancelled: threading.Event, look: Callable[[], None] = lambda: None) -> bool:
        """Wait until all ranks have called this; False if `cancelled` was set before. Blocks.

        It looks again and again rather than waits in the store: a wait would keep other threads from using the store.

        Args:
            look: called at each look.
        """
        self.store.set(f"came/{self.rank}", "")
        came, pause = self.store.add("came", 1), 0.001
        while came < len(self.ranks):
            look()
            if cancelled.wait(pause):
                if self.store.add("came", -1) < len(self.ranks) - 1:
                    self.store.delete_key(f"came/{self.rank}")
                    return False
                self.store.add("came", 1)  # the others have seen all of us: they count on this rank
                return True
            pause = min(2 * pause, _LONGEST_PAUSE)
            came = self.store.add("came", 0)
        return True

    def missing(self) -> tuple[int, ...]:
        """The global numbers of the ranks that have not called `meet()` yet."""
        return tuple(number for rank, number in enumerate(self.ranks) if not self.store.check([f"came/{rank}"]))


def peers_of(process_group: dist.ProcessGroup) -> Peers:
    """The ranks of a group, to meet once. Local, but every rank calls it as often."""
    number = _num_meetings.get(process_group, 0)
    _num_meetings[process_group] = number + 1
    store = dist.PrefixStore(f"eplb/{number}", _get_process_group_store(process_group))
    return Peers(store, dist.get_rank(process_group), tuple(dist.get_process_group_ranks(process_group)))
