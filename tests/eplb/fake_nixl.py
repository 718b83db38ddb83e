"""What stands for NIXL where its package is not installed: agents of one process, which move bytes when they are asked to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch


class FakeDisconnectError(Exception):
    """As NIXL's own, which is no RuntimeError."""


@dataclass(eq=False)
class FakeRead:
    """Attributes: parts: (to, from, bytes) of each that is still to come; state: as the agent says it."""

    owner: FakeAgent
    parts: list[tuple[int, int, int]]
    state: str = "new"
    is_released: bool = False


@dataclass(eq=False)
class FakeAgent:
    """As `Agent` says. It checks what NIXL would refuse, and moves half of what is asked for in each call.

    Attributes:
        holds: reads do not move on.
        error: what the next call raises that begins a read or asks for its state.
        corrupts: reads bring something else.
        is_dead: the process is gone, for the others.
    """

    name: str
    network: dict[str, FakeAgent]
    holds: bool = False
    error: Exception | None = None
    corrupts: bool = False
    is_dead: bool = False
    registered: list[tuple[int, int]] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    inbox: dict[str, list[bytes]] = field(default_factory=dict)
    outbox: list[tuple[str, bytes]] = field(default_factory=list)
    reads: list[FakeRead] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.name not in self.network
        self.network[self.name] = self

    # ---- memory and names

    def register_memory(self, tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
        assert all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)
        ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        self.registered += ranges
        return ranges

    def deregister_memory(self, registered: list[tuple[int, int]]) -> None:
        for one in registered:
            self.registered.remove(one)

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self.known.add(metadata.decode())
        return metadata

    def remove_remote_agent(self, agent: str) -> None:
        self.known.remove(agent)

    def has(self, address: int, num_bytes: int) -> bool:
        return any(first <= address and address + num_bytes <= end for first, end in self.registered)

    def _reach(self, agent: str) -> FakeAgent:
        if agent not in self.known:
            raise KeyError(f"{agent} is not known to {self.name}")
        if self.network[agent].is_dead:
            raise FakeDisconnectError("NIXL_ERR_REMOTE_DISCONNECT")
        return self.network[agent]

    # ---- reads

    def get_xfer_descs(self, descs: list[tuple[int, int, int]], mem_type: str) -> list[tuple[int, int, int]]:
        assert mem_type == "DRAM" and all(device == 0 and num_bytes > 0 for _, num_bytes, device in descs)
        return descs

    def initialize_xfer(
        self,
        operation: str,
        local: list[tuple[int, int, int]],
        remote: list[tuple[int, int, int]],
        remote_agent: str,
    ) -> FakeRead:
        assert operation == "READ"
        assert remote_agent in self.known
        owner = self.network[remote_agent]
        assert [num_bytes for _, num_bytes, _ in local] == [num_bytes for _, num_bytes, _ in remote]
        assert all(self.has(address, num_bytes) for address, num_bytes, _ in local)
        assert all(owner.has(address, num_bytes) for address, num_bytes, _ in remote)
        parts = [(to, of, num_bytes) for (to, num_bytes, _), (of, _, _) in zip(local, remote, strict=True)]
        read = FakeRead(owner, parts)
        self.reads.append(read)
        return read

    def transfer(self, handle: FakeRead) -> str:
        assert handle.state == "new"
        handle.state = "PROC"
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: FakeRead) -> str:
        assert not handle.is_released
        self._progress()
        if self.error is not None:
            error, self.error, handle.state = self.error, None, "ERR"
            raise error
        if handle.state == "PROC":
            self._reach(handle.owner.name)
            self._move(handle)
        return handle.state

    def _move(self, read: FakeRead) -> None:
        if self.holds:
            return
        if read.parts:
            to, of, num_bytes = read.parts.pop(0)
            count = max(1, num_bytes // 2)
            ctypes.memmove(to, of, count)
            if self.corrupts:
                ctypes.memset(to, 77, count)
            if count < num_bytes:
                read.parts.insert(0, (to + count, of + count, num_bytes - count))
        if not read.parts:
            read.state = "DONE"

    def release_xfer_handle(self, handle: FakeRead) -> None:
        assert handle.state == "DONE", "a read under way is never cancelled, and nobody knows what one that failed does"
        handle.is_released = True
        self.reads.remove(handle)

    # ---- messages

    def send_notif(self, remote_agent: str, message: bytes) -> None:
        """It leaves in a later call: a transport may not be able to take it at once."""
        self._reach(remote_agent)
        self.outbox.append((remote_agent, message))

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        self._progress()
        heard, self.inbox = self.inbox, {}
        return heard

    def _progress(self) -> None:
        sent, self.outbox = self.outbox, []
        for agent, message in sent:
            if not self.network[agent].is_dead:
                self.network[agent].inbox.setdefault(self.name, []).append(message)
