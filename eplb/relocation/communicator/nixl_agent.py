"""Rebalance, fill: `Agent`, as much of a NIXL agent as is used here; how to make one; whether it can be made."""

import importlib.util
import os
from typing import Any, Protocol

import torch

_PACKAGE = "nixl_cu13"


class Agent(Protocol):
    """https://github.com/ai-dynamo/nixl, docs/python_api.md. Without its progress thread it only moves on in calls.

    The calls wait for no other rank. What raises is a subclass of Exception; `transfer()` and `check_xfer_state()` may say
    "ERR" instead.
    """

    name: str

    def register_memory(self, tensors: list[torch.Tensor], /) -> Any: ...

    def deregister_memory(self, registered: Any, /) -> None: ...

    def get_agent_metadata(self) -> bytes: ...

    def add_remote_agent(self, metadata: bytes, /) -> object: ...

    def remove_remote_agent(self, agent: str, /) -> None: ...

    def get_xfer_descs(self, descs: list[tuple[int, int, int]], mem_type: str, /) -> Any:
        """Of (address, bytes, number of the device) each; the memory is "DRAM" or "VRAM"."""

    def initialize_xfer(self, operation: str, local: Any, remote: Any, remote_agent: str, /) -> Any:
        """A handle. The operation is "READ" or "WRITE"."""

    def transfer(self, handle: Any, /) -> str:
        """Begin: "DONE", "PROC" or "ERR"."""

    def check_xfer_state(self, handle: Any, /) -> str:
        """As `transfer()`; moves all transfers of the agent on."""

    def release_xfer_handle(self, handle: Any, /) -> None:
        """Of a transfer that is over: one under way would be cancelled, and might write still."""

    def send_notif(self, remote_agent: str, message: bytes, /) -> None: ...

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        """What was sent here, by agent; moves all transfers and messages of the agent on."""


def make_agent(name: str) -> Agent:
    """An agent over UCX.

    Its progress thread would take a whole core: whoever waits looks instead.

    Args:
        name: that no other agent has.

    Raises:
        ImportError, Exception: the package or the libraries that it loads do not work here.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else it logs each connection
    from nixl_cu13 import nixl_agent, nixl_agent_config

    made: Agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False))
    return made


def why_no_agent() -> str | None:
    """What to install before an agent can be made; None if it is here."""
    if importlib.util.find_spec(_PACKAGE) is not None:
        return None
    return f"the module {_PACKAGE} is not installed: pip install nixl-cu13, or moe-layer with the extra 'nixl'"
