"""Peer memory: a buffer on every rank, and the table of their addresses."""

from eplb.peer_memory.base import PeerMemory
from eplb.peer_memory.virtual import virtual_peers

__all__ = ["PeerMemory", "virtual_peers"]
