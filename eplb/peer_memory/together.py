"""Peer memory: a step of connecting that succeeds on all ranks or on none."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from eplb.peer_memory.exchange import Exchange

T = TypeVar("T")


def together(
    exchange: Exchange, work: Callable[[], T], say: Callable[[T], Any] = lambda _: None, what: str = "share its memory"
) -> tuple[T, list[Any]]:
    """What `work()` returned here, and what `say()` made of it on every rank, by rank. Collective, one exchange.

    Args:
        what: the work is to do, for the error.

    Raises:
        RuntimeError: the work failed on a rank; raised on all, and it names the first.
    """
    try:
        mine = work()
        message = pickle.dumps(("", say(mine)))
    except Exception as error:  # whatever it is, the other ranks wait for this one's word
        exchange(pickle.dumps((f"{type(error).__name__}: {error}", None)))
        raise RuntimeError(f"this rank could not {what}: {error}") from error
    said = [pickle.loads(one) for one in exchange(message)]
    for rank, (problem, _) in enumerate(said):
        if problem:
            raise RuntimeError(f"rank {rank} could not {what}: {problem}")
    return mine, [value for _, value in said]
