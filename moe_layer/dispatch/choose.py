"""Forward, dispatch: dispatchers by name."""

import torch.distributed as dist

from moe_layer.arguments import check_choice
from moe_layer.dispatch.all_to_all import AllToAllDispatcher
from moe_layer.dispatch.base import Dispatcher


def make_dispatcher(
    dispatcher: str | Dispatcher, group: dist.ProcessGroup | None, num_ranks: int, num_lanes: int
) -> Dispatcher | None:
    """What `MoELayer`'s argument `dispatcher` means, None for no dispatch; `num_lanes`: of a rank.

    Raises:
        ValueError: it names none, lacks methods, or does not go with the group.
    """
    if num_ranks > 1 and dispatcher == "local":
        raise ValueError(f"dispatcher='local' needs all experts on one rank, but process_group has {num_ranks}")
    methods = ("backend", "dispatch", "combine")
    missing = [name for name in methods if not callable(getattr(dispatcher, name, None))]
    if len(missing) < len(methods) and not isinstance(dispatcher, str):
        missing += [] if hasattr(dispatcher, "max_tokens") else ["max_tokens"]
        if not missing:
            return dispatcher
        raise ValueError(
            f"dispatcher must have the methods {', '.join(methods)} and the attribute max_tokens, but {dispatcher!r} lacks "
            f"{missing}"
        )
    check_choice("dispatcher", dispatcher, ("auto", "local", "all_to_all"), " or a Dispatcher")
    if dispatcher == "all_to_all" and group is None:
        raise ValueError("dispatcher='all_to_all' needs a process_group, got None")
    if dispatcher == "local" or (dispatcher == "auto" and num_ranks == 1):
        return None
    assert group is not None
    return AllToAllDispatcher(group, num_lanes)
