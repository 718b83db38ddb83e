"""Peer memory: a buffer on every rank, and the table of their addresses."""

from eplb.peer_memory.base import PeerMemory
from eplb.peer_memory.connect import connect_peers, why_not
from eplb.peer_memory.cuda_ipc import share
from eplb.peer_memory.exchange import Exchange, over_group, over_store
from eplb.peer_memory.host_memory import HostMemory, share_host
from eplb.peer_memory.together import together
from eplb.peer_memory.virtual import virtual_peers

__all__ = [
    "Exchange",
    "HostMemory",
    "PeerMemory",
    "connect_peers",
    "over_group",
    "over_store",
    "share",
    "share_host",
    "together",
    "virtual_peers",
    "why_not",
]
