"""How the ranks of a controller reach each other."""

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist

from eplb.config import EplbConfig
from eplb.groups import check_member, new_group_like, ranks_of
from eplb.relocation.communicator import Communicator, LocalCommunicator, choose_communicator, make_communicator
from eplb.rounds.exchange import Agreement, GlooAgreement, LocalAgreement
from eplb.streams import DeviceStreams


class Transport(Protocol):
    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks that are reached, in the order of their ranks here; empty if there is one alone."""
        ...

    def check(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> None:
        """Raises ValueError if `connect()` could not do what the config asks for."""
        ...

    def connect(
        self, config: EplbConfig, streams: DeviceStreams, dispatch_backends: Iterable[str]
    ) -> tuple[Agreement, Communicator]:
        """Make the connections of this rank. Collective.

        Args:
            streams: of the device that the slots are on.
            dispatch_backends: what the forwards of the registered layers use: "local", "gloo", "nccl".
        """
        ...


class TorchTransport:
    """Over groups of our own beside a torch.distributed process group; None: one rank, nothing to reach.

    Raises:
        ValueError: this rank is not in the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        check_member(process_group)
        self._group = process_group

    @property
    def ranks(self) -> tuple[int, ...]:
        return ranks_of(self._group)

    def check(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> None:
        self._choose(config, device, dispatch_backends)

    def _choose(self, config: EplbConfig, device: torch.device, dispatch_backends: Iterable[str]) -> str:
        group_backend = str(dist.get_backend(self._group)) if self._group is not None else "gloo"
        return choose_communicator(config.communicator, device, group_backend, set(dispatch_backends))

    def connect(
        self, config: EplbConfig, streams: DeviceStreams, dispatch_backends: Iterable[str]
    ) -> tuple[Agreement, Communicator]:
        if self._group is None or not self.ranks:
            return LocalAgreement(), LocalCommunicator(streams)
        name = self._choose(config, streams.device, dispatch_backends)
        return GlooAgreement(new_group_like(self._group, "gloo")), make_communicator(name, self._group, streams)
