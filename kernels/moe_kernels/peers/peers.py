"""Between several GPUs: the memory in which kernels of all ranks meet, and how they wait there.

W ranks, S lanes of a rank, E logical experts, B tokens that a rank may have in a forward (its bound), K experts per token,
H hidden. A *flat row* is (rank · B + token) · K + k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from moe_kernels.base.backend import INTERPRETED
from moe_kernels.base.integers import cdiv, next_power_of_2

_ALIGNMENT = 128  # bytes, of each part
FP8_GROUP = 128  # channels that share a scale
# Numbers of flags, W of each: a rank's rows have arrived; its results have; its counts have.
ARRIVED, RETURNED, COUNTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NUM_FLAGS = 3
# Of the state on each device: forwards whose rows this rank has sent; programs that are done; 1 + the rank that did not come.
EPOCH, DONE, ERROR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_STATE_SIZE = 3
NO_RANK = 1 << 20  # an error that is no rank's: they differ in what they do
# What an exchange is; ranks that are in different ones find out. One without gradients, where FORWARD; of a forward that a
# backward may follow; of its results, or of its gradients of rows, to the tokens' ranks; of gradients of results to the rows.
FORWARD, DIFFERENTIABLE, HOMEWARD, GRADIENTS = range(4)
_KIND_BIT = 28


@dataclass(frozen=True)
class PeerLayout:
    """Which part of a rank's buffer holds what; the same on all ranks. Offsets are in bytes.

    Attributes:
        num_ranks, num_lanes, num_experts, max_tokens, top_k, hidden_size: W, S, E, the largest B, K, H.
        dtype: of the hidden states.
        fp8: whether hidden states travel as e4m3 with a float32 scale for each `FP8_GROUP` channels.
    """

    num_ranks: int
    num_lanes: int
    num_experts: int
    max_tokens: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    fp8: bool = False

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Of each part, and under "end" the size of all."""
        flat = self.num_ranks * self.max_tokens * self.top_k
        row = self.hidden_size * self.dtype.itemsize
        sizes = {
            "flags": 8 * _NUM_FLAGS * self.num_ranks,  # int64 [3, W]
            "counts": 4 * self.num_ranks * (self.num_lanes + 2),  # int32 [W, S + 2]: by lane; tokens; bound
            "experts": 4 * self.num_ranks * self.num_experts,  # int32 [W, E]: tokens of each expert
            "weights": 4 * flat,  # float32, by flat row
            "scalars": 0 if self.fp8 else 4 * self.max_tokens * self.top_k,  # float32 [B, K]: come back with rows
            "lists": 4 * flat,  # int32 [W, B * K]: the flat rows that a rank has sent, by lane
            "rows": self.num_ranks * self.max_tokens * (self.hidden_size if self.fp8 else row),  # [W, B, H]
            "scales": 4 * self.num_ranks * self.max_tokens * self.num_groups if self.fp8 else 0,  # [W, B, groups]
            # [B, K, H]: what this rank's tokens get back; or, summed by rank, [B, W, H]
            "results": self.max_tokens * max(self.top_k, self.num_ranks) * row,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return offsets | {"end": end}

    @property
    def num_groups(self) -> int:
        """Of channels that share a scale."""
        return cdiv(self.hidden_size, FP8_GROUP)

    @property
    def num_bytes(self) -> int:
        """Of a rank's buffer."""
        return self.offsets["end"]


class PeerArea:
    """A rank's buffer among those of its peers, and what its kernels keep between forwards.

    Args:
        addresses_W: int64, where the buffers begin.
        own: this rank's, uint8 ``[layout.num_bytes]``, zero at first.
        rank: this rank.
        layout: of all buffers.
        timeout: seconds that a kernel waits for a peer; then it goes on, and `failure()` says so.
    """

    def __init__(
        self, addresses_W: torch.Tensor, own: torch.Tensor, rank: int, layout: PeerLayout, timeout: float
    ) -> None:
        self.addresses_W, self.own, self.rank, self.layout = addresses_W, own, rank, layout
        device = own.device
        self.state = torch.zeros(_STATE_SIZE, dtype=torch.int64, device=device)
        # Host memory, so that the host sees an error without waiting for the device.
        self.error = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._error_on_host = self.error.numpy()
        # Interpreted kernels have no clock: there it is a number of looks.
        self.patience = max(1, int(timeout * (5e3 if INTERPRETED else 1e9)))
        flat = layout.num_ranks * layout.max_tokens * layout.top_k
        self.here = torch.zeros(flat, dtype=torch.int64, device=device)  # the last forward that had each flat row here
        self.results_W = addresses_W + layout.offsets["results"]

    def part(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The first elements of a part of the own buffer, contiguous."""
        at, size = self.layout.offsets[name], dtype.itemsize
        for length in shape:
            size *= length
        return self.own[at : at + size].view(dtype).view(shape)

    def failure(self) -> int | None:
        """Whom some wait was given up for first, `NO_RANK` if ranks do different things, None if all is well. No sync."""
        found = int(self._error_on_host[0])
        return found - 1 if found else None


@triton.jit
def peer_at(addresses_ptr, peer, at, like_ptr):
    """A pointer like `like_ptr` to byte `at` (a multiple of 16) of a peer's buffer, or of several."""
    return tl.multiple_of((tl.load(addresses_ptr + peer) + at).to(like_ptr.dtype), 16)


@triton.jit
def raise_flags(addresses_ptr, flags_at, flag, rank, epoch, flags_ptr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Tell every rank that this rank's part of `epoch` is there. All threads of this program have written before."""
    tl.debug_barrier()
    peer = tl.arange(0, BLOCK_W)
    address = tl.load(addresses_ptr + peer, mask=peer < W, other=0)
    at = (address + flags_at).to(flags_ptr.dtype) + flag * W + rank
    tl.atomic_xchg(at, tl.zeros((BLOCK_W,), dtype=tl.int64) + epoch, mask=peer < W, sem="release", scope="sys")


@triton.jit
def is_last_program(state_ptr):
    """Whether all other programs have come here; then what they wrote is ordered before what this one releases.

    The programs of a GPU order their writes among themselves; the last one's release orders all of them for its peers, because
    causality is transitive over scopes (PTX ISA, memory consistency model).
    """
    tl.debug_barrier()
    before = tl.atomic_add(state_ptr + DONE, 1, sem="acq_rel", scope="gpu")
    is_last = before == tl.num_programs(0) - 1
    tl.store(state_ptr + DONE, 0, mask=is_last)
    return is_last


@triton.jit
def wait_for_flags(
    flags_ptr,
    state_ptr,
    error_ptr,
    flag,
    epoch,
    patience,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TIMED: tl.constexpr,
):
    """Wait until every rank has raised its flag for `epoch`; then what they wrote before is visible.

    After `patience` (ns; looks, if not TIMED) it goes on, and leaves word for the host. From then on nobody waits.
    """
    peer = tl.arange(0, BLOCK_W)
    at = flags_ptr + flag * W + peer
    raised = tl.load(at, mask=peer < W, other=epoch, volatile=True)
    failed = tl.load(state_ptr + ERROR, volatile=True) != 0
    begin = globaltimer() if TIMED else tl.cast(0, tl.int64)
    spent = tl.cast(0, tl.int64)
    while (tl.min(raised, axis=0) < epoch) & (spent < patience) & (failed == 0):
        raised = tl.load(at, mask=peer < W, other=epoch, volatile=True)
        spent = globaltimer() - begin if TIMED else spent + 1
    missing = tl.max(tl.where(raised < epoch, peer + 1, 0), axis=0)
    if (missing > 0) & (failed == 0):
        leave_word(state_ptr, error_ptr, missing)
    tl.atomic_add(at, tl.zeros((BLOCK_W,), dtype=tl.int64), mask=peer < W, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def token_ends(counts_ptr, first, num_lanes, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """How many tokens ranks have, added up: of the rank `first`, of it and the next one, and so on around."""
    turn = tl.arange(0, BLOCK_W)
    peer = (first + turn) % W
    tokens = tl.load(counts_ptr + peer * (num_lanes + 2) + num_lanes, mask=turn < W, other=0)
    return tl.cumsum(tokens, axis=0)


@triton.jit
def find_token(ends, index, first, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The rank and the token that `index` is, by `token_ends`; past the last one they mean nothing.

    Example (2 ranks with 3 and 2 tokens, first 1): ends [2, 5]; index 1 is token 1 of rank 1, index 2 is token 0 of rank 0.
    """
    turn = tl.arange(0, BLOCK_W)
    # One maximum for both: how many ranks end before, and where the last of them ends.
    both = tl.max(tl.where(ends <= index, ((turn + 1).to(tl.int64) << 32) + ends, 0), axis=0)
    return (first + (both >> 32).to(tl.int32)) % W, index - both.to(tl.int32)


@triton.jit
def leave_word(state_ptr, error_ptr, what):
    tl.store(state_ptr + ERROR, what.to(tl.int64))
    tl.store(error_ptr, what.to(tl.int64))


def exchange_word(kind: int, number: int) -> int:
    """What the ranks tell each other of an exchange, int32.

    Args:
        kind: FORWARD, DIFFERENTIABLE, HOMEWARD or GRADIENTS.
        number: of the former two the bound; of the others what tells forwards apart. It goes round at 2 ** 28.
    """
    return kind << _KIND_BIT | number & (1 << _KIND_BIT) - 1


def kind_of(word: int) -> int:
    """The reverse of `exchange_word`."""
    return word >> _KIND_BIT


def rank_options(area: PeerArea) -> dict[str, int]:
    """Constants of kernels that look at all ranks."""
    num_ranks = area.layout.num_ranks
    return {"W": num_ranks, "BLOCK_W": next_power_of_2(num_ranks)}


def sync_options(area: PeerArea) -> dict[str, int | bool]:
    """Constants of kernels that wait."""
    return rank_options(area) | {"TIMED": not INTERPRETED}
