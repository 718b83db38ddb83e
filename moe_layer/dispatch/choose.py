"""Forward, dispatch: dispatchers by name, and the automatic choice.

Legend: T tokens of a rank, K top-k, H hidden, W ranks.
"""

import functools
import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from eplb.peer_memory import over_group, why_not
from moe_layer.arguments import check_choice
from moe_layer.collectives import backend_of
from moe_layer.dispatch.all_gather import AllGatherDispatcher
from moe_layer.dispatch.all_to_all import AllToAllDispatcher
from moe_layer.dispatch.base import Dispatcher
from moe_layer.dispatch.one_sided import one_sided_of
from moe_layer.dispatch.packed import token_bytes

_logger = logging.getLogger(__name__)

NAMES = ("auto", "local", "all_to_all", "all_gather", "symm_mem")

MOST_PADDING = {"gloo": 1 << 20, "nccl": 32 << 20}
"""Bytes a rank and forward that all_gather may move beyond what all_to_all moves, by what moves them.

all_to_all takes one collective more, and over NCCL it waits for the device and cannot be captured. Over gloo a collective took
0.3 ms (2 ranks) to 2 ms (4 ranks) on two cores; there, at 4 ranks, all_gather was 11 to 29 % faster where it moved 0.3 MB more,
up to 10 % slower with 2.4 MB and 45 % slower with 9.5 MB. Over NVLink 32 MiB take 0.1 ms, about what the host needs to wait
for the counts and to launch anew: an estimate.
"""


@dataclass(frozen=True)
class Situation:
    """What the automatic choice depends on; equal on all ranks.

    Attributes:
        num_ranks: W.
        mover: "gloo" or "nccl": what moves a tensor of the layer's device.
        max_tokens: the layer's; None if it was not given.
        hidden_size, top_k: H and K.
        item: bytes of an element of the hidden states.
        trainable: whether experts are trained.
        peers: whether every rank reaches every other's memory, and kernels can.
    """

    num_ranks: int
    mover: str
    max_tokens: int | None
    hidden_size: int
    top_k: int
    item: int
    trainable: bool = False
    peers: bool = False


def choose_dispatcher(situation: Situation) -> tuple[str, str]:
    """The name behind "auto", and the reason: pure, so that all ranks choose alike."""
    it = situation
    if it.num_ranks == 1:
        return "local", "all experts are on this rank"
    if it.max_tokens is None:
        return "all_to_all", "max_tokens was not given"
    if it.trainable:
        return "all_to_all", "experts that are trained see large batches"
    if it.peers:
        return "symm_mem", "every rank reaches every other's memory"
    extra, most = padding_bytes(it), MOST_PADDING[it.mover]
    compared = f"with max_tokens={it.max_tokens} it moves {max(0, extra):,} bytes a rank more than all_to_all"
    if extra <= most:
        return "all_gather", f"{compared}, of at most {most:,} that one collective less is worth"
    return "all_to_all", f"all_gather would not pay: {compared}, and only {most:,} are worth one collective less"


def padding_bytes(situation: Situation) -> int:
    """Bytes that a rank receives in a forward with all_gather beyond those with all_to_all, all ranks having `max_tokens`.

    Both bring (W - 1) / W of T · K results back over gloo. Over NCCL all_gather brings W times as many.
    """
    it = situation
    assert it.max_tokens is not None
    others = it.num_ranks - 1
    row = it.hidden_size * it.item
    forth = others * it.max_tokens * token_bytes(it.hidden_size, it.item, it.top_k)
    exact = others * it.max_tokens * it.top_k * row // it.num_ranks
    back = exact if it.mover == "gloo" else exact * it.num_ranks
    return forth + back - 2 * exact


def make_dispatcher(
    dispatcher: str | Dispatcher,
    group: dist.ProcessGroup | None,
    num_ranks: int,
    num_lanes: int,
    *,
    num_experts: int,
    backend: str,
    max_tokens: int | None,
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
    trainable: bool,
) -> Dispatcher | None:
    """What `MoELayer`'s argument `dispatcher` means, None for no dispatch.

    Args:
        num_lanes: of a rank.
        num_experts, max_tokens, hidden_size, top_k, dtype, device, trainable: the layer's.
        backend: of its kernels, resolved.

    Raises:
        ValueError: it names none, lacks methods, or does not go with the group or with `max_tokens`.
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
    check_choice("dispatcher", dispatcher, NAMES, " or a Dispatcher")
    name = dispatcher
    if name == "auto" and num_ranks > 1:
        assert group is not None
        mover = _mover(group, device)
        peers = max_tokens is not None and device.type == "cuda" and backend == "triton" and not trainable
        name, reason = choose_dispatcher(
            Situation(
                num_ranks,
                mover,
                max_tokens,
                hidden_size,
                top_k,
                dtype.itemsize,
                trainable,
                peers and _why_no_peers(group, device) is None,
            )
        )
        _say(f"dispatcher='auto' is {name!r} for {num_ranks} ranks over {mover}: {reason}")
    if name in ("auto", "local"):
        return None
    if group is None:
        raise ValueError(f"dispatcher={name!r} needs a process_group, got None")
    if name == "all_to_all":
        return AllToAllDispatcher(group, num_lanes)
    if max_tokens is None:
        raise ValueError(
            f"dispatcher={name!r} needs max_tokens, an integer of at least 1 and equal on all ranks, got None"
        )
    if name == "all_gather":
        return AllGatherDispatcher(group, num_lanes, max_tokens)
    assert name == "symm_mem", name
    if backend != "triton":
        raise ValueError(f"dispatcher='symm_mem' needs the Triton kernels, but backend is {backend!r}")
    if device.type == "meta":
        raise ValueError("dispatcher='symm_mem' needs its device when the layer is built, got 'meta'")
    sizes = (num_lanes, num_experts, max_tokens, hidden_size, top_k, dtype, device)
    return one_sided_of(group, *sizes)


_asked: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, str | None]] = WeakKeyDictionary()


def _why_no_peers(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """`why_not`, asked once for all layers: they are built in the same order on all ranks."""
    answers = _asked.setdefault(group, {})
    if device not in answers:
        answers[device] = why_not(device, over_group(group))
    return answers[device]


def _mover(group: dist.ProcessGroup, device: torch.device) -> str:
    """ "gloo" or "nccl"; for a layer without memory what it will be once it has some, if that is a GPU's."""
    if device.type == "meta":
        return "nccl" if "nccl" in str(dist.get_backend(group)) else "gloo"
    return backend_of(group, device)


@functools.cache
def _say(choice: str) -> None:
    """Once for each choice, not for each of a model's layers."""
    _logger.info(choice)
