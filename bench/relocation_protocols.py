"""Three ways to relocate every expert of a stack, over the same layers, communicator and dispatch; for `bench.relocation`.

Each has a `step()` that the serving thread calls after a forward. A rebalance begins with each `interval`-th step and moves
every expert to the next rank.
"""

import threading
import time
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist

from bench.rotation import Rotation
from eplb import EplbConfig, EplbController
from eplb.groups import peers_of
from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import KEEP_A_BOUND, Transfer, choose_communicator, make_communicator
from eplb.relocation.handoff import Handoff
from eplb.relocation.resident import ResidentExperts
from eplb.relocation.versions import Version

CONNECT_SECONDS = 60.0
TRANSFER_SECONDS = 60.0


class Relocating(Protocol):
    """One protocol on one rank."""

    def __enter__(self) -> "Relocating": ...

    def __exit__(self, *_: Any) -> None: ...

    def step(self) -> None: ...

    @property
    def is_relocating(self) -> bool:
        """Whether a rebalance is under way, as this rank knows."""
        ...

    @property
    def is_moving(self) -> bool:
        """The same without planning, which the other protocols do in no time here."""
        ...

    @property
    def num_flips(self) -> int:
        """Tables that this rank has switched."""
        ...


class Ours:
    """`EplbController`: fills free slots in the background; `step()` flips tables."""

    def __init__(
        self,
        model: Any,
        group: dist.ProcessGroup,
        interval: int,
        communicator: str,
        rate: int | Literal["auto"] | None = "auto",
    ) -> None:
        self._residents = [layer.resident for layer in model.moe_layers]
        config = EplbConfig(
            step_interval=interval,
            window_size=interval,
            window_samples=1,
            policy=Rotation(),
            planning="process",
            communicator=communicator,
            max_bytes_per_second=rate,
        )
        self.controller = EplbController(config, group)
        self.controller.register(model)
        self.step = self.controller.step

    def __enter__(self) -> "Ours":
        return self

    def __exit__(self, *_: Any) -> None:
        self.controller.close()

    @property
    def bytes_per_second(self) -> int | None:
        """The bound of what a rank copies, once the ranks are connected; None: there is none."""
        worker = self.controller._worker
        communicator = worker.rounds.communicator if worker else None
        if communicator is None:  # the ranks never connected, or lost each other
            return None
        return self.controller.config.bytes_per_second if communicator.name in KEEP_A_BOUND else None

    @property
    def is_relocating(self) -> bool:
        return self.controller.health().phase != "IDLE"

    @property
    def is_moving(self) -> bool:
        return self.controller.health().phase in ("PREPARE", "FILL", "GRACE")

    @property
    def num_flips(self) -> int:
        return sum(resident.current.number for resident in self._residents)


class _WithBuffer:
    """What the two other protocols share: a second buffer for one layer's experts, and the step that writes it into the slots.

    Args:
        communicator: by name, as `EplbConfig.communicator`.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup, interval: int, communicator: str) -> None:
        self.group = group
        self.interval = interval
        self.residents: list[ResidentExperts] = [layer.resident for layer in model.moe_layers]
        self.streams = self.residents[0].streams
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        first = self.residents[0]
        self.buffer_PB = torch.zeros(
            first.num_physical_per_rank, first.pool.slot_bytes, dtype=torch.uint8, device=first.pool.device
        )
        backends = {layer.dispatch_backend for layer in model.moe_layers}
        name = choose_communicator(communicator, first.pool.device, str(dist.get_backend(group)), backends)
        peers = peers_of(group)
        peers.meet(threading.Event())
        self.communicator = make_communicator(name, peers, self.streams, CONNECT_SECONDS, [first.pool])
        self.cpu_group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        self.num_steps = self.num_flips = 0

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.communicator.close()

    def receive(self, layer: ResidentExperts) -> None:
        """The experts of the rank before into the buffer; returns when this rank has all of them and has sent its own."""
        nexts, before = (self.rank + 1) % self.num_ranks, (self.rank - 1) % self.num_ranks
        slots = [slot for slot in layer.current.slots_S if slot >= 0]
        transfers = [Transfer(layer.pool.slab(slot), None, nexts) for slot in slots]
        transfers += [Transfer(None, slab, before) for slab in self.buffer_PB]
        batch = self.communicator.prepare(transfers)
        batch.start()
        deadline = time.monotonic() + TRANSFER_SECONDS
        while not batch.poll():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the transfers of a layer took more than {TRANSFER_SECONDS} s")
            time.sleep(0.0002)

    def copy_into_slots(self, layer: ResidentExperts) -> None:
        """The second copy, and the new table; waits for its upload, as engines do that upload from pageable memory."""
        old = layer.current
        slots = [slot for slot in old.slots_S if slot >= 0]
        for slot, slab in zip(slots, self.buffer_PB, strict=True):
            layer.pool.slab(slot).copy_(slab, non_blocking=True)
        placement = Placement(np.roll(old.placement.lanes_WS, 1, axis=0), old.placement.num_experts)
        version = Version(old.number + 1, placement, equal_shares(placement), old.slots_S)
        compute = self.streams.current()
        layer.table.stage(placement, version.shares_WS, compute)
        layer.versions.publish(version)
        Handoff(version.number, [(layer, version)]).flip(self.streams)
        self.wait()
        layer.versions.grace_before(version.number)
        self.num_flips += 1

    def wait(self) -> None:
        """Until the compute stream has done all that was enqueued."""
        event = self.streams.current().record_event()
        while not event.query():
            time.sleep(0)


class Pause(_WithBuffer):
    """Stops serving, moves everything, goes on: vLLM's and SGLang's synchronous rebalance."""

    is_relocating = is_moving = False  # between steps

    def step(self) -> None:
        self.num_steps += 1
        if self.num_steps % self.interval == 0:
            dist.barrier(self.cpu_group)
            for layer in self.residents:
                self.wait()  # nobody may still read what is overwritten
                self.receive(layer)
                self.copy_into_slots(layer)


class Lockstep(_WithBuffer):
    """vLLM's asynchronous rebalance: a thread receives a layer into a buffer; when all ranks have it, all copy in one step.

    In every step of a rebalance the serving threads agree by an all-reduce on the CPU whether all have it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._layer: int | None = None
        self._go, self._have = threading.Event(), threading.Event()
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._receive_all, name="lockstep", daemon=True)
        self._thread.start()

    def _receive_all(self) -> None:
        try:
            self.streams.adopt_thread()
            while True:
                self._go.wait()
                self._go.clear()
                if self._closing:
                    return
                assert self._layer is not None
                self.receive(self.residents[self._layer])
                self._have.set()
        except BaseException as error:
            self._error = error

    def __exit__(self, *arguments: Any) -> None:
        self._closing = True
        self._go.set()
        self._thread.join(TRANSFER_SECONDS)
        super().__exit__(*arguments)

    @property
    def is_relocating(self) -> bool:
        return self._layer is not None

    is_moving = is_relocating

    def step(self) -> None:
        self.num_steps += 1
        if self._error is not None:
            raise RuntimeError("the thread that receives experts failed") from self._error
        if self._layer is not None:
            everybody = torch.tensor([int(self._have.is_set())], device="cpu")
            dist.all_reduce(everybody, dist.ReduceOp.MIN, self.cpu_group)
            if everybody.item():
                self._have.clear()
                self.copy_into_slots(self.residents[self._layer])
                self._begin(self._layer + 1)
        elif self.num_steps % self.interval == 0:
            self._begin(0)

    def _begin(self, layer: int) -> None:
        self._layer = layer if layer < len(self.residents) else None
        if self._layer is not None:
            # The last forwards read the slots that are sent, the last copy wrote them: behind both.
            self.streams.side.wait_event(self.streams.current().record_event())
            self._go.set()


PROTOCOLS: dict[str, Any] = {"pause": Pause, "lockstep": Lockstep, "ours": Ours}
