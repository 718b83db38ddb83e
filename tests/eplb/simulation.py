"""Several ranks in one process: the real controller, worker, pool and table code over simulated streams, rounds and transfers.

A seed decides every interleaving: which rank's worker ticks, whose main thread steps, which stream runs its next item,
which bytes of which transfer arrive, who hears a round first, and where an exception strikes. Forwards run on several
streams of a rank, one of which appears late. Some are a second thread's: they choose their replicas, and enqueue the rest
after other forwards and steps of the main thread. Each forward is checked while it "runs": a row that reaches a lane must
find its own expert's bytes in the slot.

Shape letters as in docs/design.md: E logical experts, S lanes of a rank, W ranks.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from eplb.config import EplbConfig
from eplb.relocation.pins import Pin
from eplb.relocation.pool import SlotPool, SlotState, TensorSpec
from eplb.relocation.resident import ResidentExperts
from tests.eplb.simulated import Faults, SimBus, SimController, SimStreams, SimTransport


class SimLayer(nn.Module):
    def __init__(self, resident: ResidentExperts) -> None:
        super().__init__()
        self.resident = resident
        self.dispatch_backend = "gloo"
        self.expert_ranks = tuple(range(resident.num_ranks))

    def why_not_relocatable(self) -> str | None:
        return None

    def dispatch_failure(self) -> str | None:
        return None


class FaultyPolicy:
    def __init__(self, policy: Any, faults: Faults) -> None:
        self._policy, self._faults = policy, faults

    def propose(self, *arguments: Any) -> Any:
        self._faults.maybe("policy.propose")
        return self._policy.propose(*arguments)


class Rank:
    """One simulated rank: its pool, layers, streams and controller."""

    def __init__(self, rank: int, world: "World", policy: Any) -> None:
        shape = world.shape
        self.rank = rank
        self.streams = SimStreams(world.faults)
        num_physical = (shape.num_experts + shape.num_redundant) // world.num_ranks
        self.pool = SlotPool(
            (TensorSpec("weight", (6,), torch.int32), TensorSpec("scale", (3,), torch.int32)),
            shape.num_layers * num_physical + shape.num_shadow,
        )
        self.pool.slab_SB.fill_(0xAB)
        self.layers = [
            ResidentExperts(
                num_experts=shape.num_experts,
                num_redundant_experts=shape.num_redundant,
                num_shadow_slots=shape.num_shadow,
                rank=rank,
                num_ranks=world.num_ranks,
                pool=self.pool,
                streams=self.streams,
            )
            for _ in range(shape.num_layers)
        ]
        for index, layer in enumerate(self.layers):
            for expert, slots in layer.live_slots().items():
                for slot in slots:
                    for tensor in self.pool.tensors.values():
                        tensor[slot] = content(index, expert)
        self._config = EplbConfig(
            step_interval=3,
            window_size=2,
            window_samples=1,
            round_interval=0.002,
            heartbeat_interval=0.01,
            peer_timeout=5.0,
            transfer_timeout=30.0,
            backoff=0.02,
            max_backoff=0.1,
            policy=FaultyPolicy(policy, world.faults),
            max_bytes_in_flight=shape.max_bytes,
        )
        self._world = world
        self.controller = self._new_controller()
        self.forwards = 0
        # Of the second thread's forwards: before which forward it goes on, and what it has still to enqueue.
        self.begun: list[tuple[int, list[Callable[[], None]]]] = []

    def _new_controller(self) -> SimController:
        world = self._world
        controller = SimController(self._config, transport=SimTransport(self.rank, world), clock=lambda: world.now)
        controller.register(nn.ModuleList([SimLayer(layer) for layer in self.layers]))
        return controller

    def replace_controller(self) -> None:
        self.controller.close()
        self.controller = self._new_controller()
        self.controller.step()

    def is_at_rest(self) -> bool:
        worker = self.controller.worker
        return worker.is_idle and worker.relocation.is_at_rest


class Shape:
    def __init__(self, rng: random.Random) -> None:
        self.num_ranks = rng.choice([2, 2, 3, 4])
        self.num_layers = rng.choice([1, 2, 3])
        self.num_redundant = rng.choice([0, 1, 2]) * self.num_ranks
        self.num_experts = self.num_ranks * rng.choice([2, 3])
        self.num_shadow = rng.choice([1, 1, 2, 3])
        self.max_bytes = rng.choice([None, None, 512])


def content(layer: int, expert: int) -> int:
    return 1000 * (layer + 1) + expert


def some_of(action: Callable[[], bool], times: int) -> None:
    for _ in range(times):
        if not action():
            return


class World:
    """N ranks under one seed."""

    def __init__(self, seed: int, make_policy: Callable[[], Any]) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.shape = Shape(self.rng)
        self.num_ranks = self.shape.num_ranks
        self.faults = Faults(self.rng)
        self.bus = SimBus(self.num_ranks, self.rng)
        self.now = 0.0
        self._cut_off: set[int] = set()
        self.ranks = [Rank(rank, self, make_policy()) for rank in range(self.num_ranks)]
        self.max_ahead = self.rng.choice([1, 3, 8])
        self.late = self.rng.choice([0, 5, 20, 60])
        self.messages: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        self.dispatched: set[tuple[int, int, int]] = set()
        self.computed: set[tuple[int, int, int]] = set()
        self.checked_rows = 0
        self.hot = self._new_load()

    # ---- what may happen next

    def act(self) -> None:
        """One action of one rank, chosen by the seed."""
        self.now += self.rng.choice([0.0, 0.0005, 0.001, 0.003])
        rank = self.rng.choice(self.ranks)
        match self.rng.randrange(6):
            case 0 | 1:
                for ticking in self.rng.sample(self.ranks, self.rng.randint(1, self.num_ranks)):
                    self._guarded(ticking.controller.worker.tick)
            case 2:
                self.forward_and_step(rank)
            case 3:
                for stream in self.rng.sample(rank.streams.computes, self.rng.randint(1, 3)):
                    some_of(stream.advance, self.rng.randint(1, 40))
            case 4:
                some_of(rank.streams.side.advance, self.rng.randint(1, 8))
            case 5:
                some_of(self.bus.deliver, self.rng.randint(0, 2 * self.num_ranks))
                some_of(self.bus.carry, self.rng.randint(0, 6))

    def settle(self, rounds: int = 4000, stalled: Rank | None = None) -> None:
        """Everything that can happen does, in the seed's order; main threads adopt tables, but begin no new forwards.

        The main thread of `stalled` does not even adopt.
        """
        last = max(rank.forwards for rank in self.ranks)
        for rank in self.ranks:
            while rank.forwards < last:  # or the others' forwards would wait for it for ever
                self.enqueue_forward(rank)
            self._end_begun(rank, last + 100)
        for _ in range(rounds):
            self.now += 0.004
            for rank in self.rng.sample(self.ranks, self.num_ranks):
                rank.controller.worker.tick()
                if rank is not stalled:
                    rank.controller.worker.inbox.adopt()
                rank.streams.drain()
                self.bus.deliver()
                self.bus.carry()
            if all(rank.is_at_rest() for rank in self.ranks):
                return

    def replace_controllers(self) -> None:
        """Every rank closes its controller, wherever they are, and makes another."""
        while not all(rank.controller.worker.is_done for rank in self.ranks):
            for rank in self.ranks:
                rank.controller.worker.mailbox.leave()
            self.act()
        for rank in self.ranks:
            rank.replace_controller()

    def forward_and_step(self, rank: Rank) -> None:
        done = min(sum((n, 0, other.rank) in self.computed for n in range(other.forwards)) for other in self.ranks)
        if rank.forwards - len(rank.begun) - done >= self.max_ahead:
            return
        if rank.forwards % 6 == 5:
            self.hot = self._new_load()
        self.enqueue_forward(rank)
        self._guarded(rank.controller.step)

    def _guarded(self, call: Callable[[], None]) -> None:
        """Run code under test with faults armed. Nothing may come out of it (I6)."""
        self.faults.armed = True
        try:
            call()
        finally:
            self.faults.armed = False

    def cut_off(self, ranks: Iterable[int]) -> None:
        """These ranks' rounds fail from now on."""
        self._cut_off |= set(ranks)

    def is_cut_off(self, rank: int) -> bool:
        return rank in self._cut_off

    # ---- a forward, and what must hold in it

    def enqueue_forward(self, rank: Rank) -> None:
        """The same forwards in the same order on all ranks, as their collectives meet; the steps between them differ."""
        number = rank.forwards
        self._end_begun(rank, number)
        rank.forwards += 1
        rng = self.random_of(number)
        if number >= self.late and rng.random() < 0.2:
            # A second thread's, on a stream of its own; the main thread goes on for some forwards and steps.
            rank.begun.append((number + rng.randint(1, 4), self._choose(rank, number, 2)))
        else:
            for enqueue in self._choose(rank, number, int(number >= self.late and rng.random() < 0.4)):
                enqueue()

    def random_of(self, number: int) -> random.Random:
        """What is random about a forward, equal on all ranks."""
        return random.Random(f"{self.seed} {number}")

    def _end_begun(self, rank: Rank, number: int) -> None:
        for _, rests in [one for one in rank.begun if one[0] <= number]:
            for enqueue in rests:
                enqueue()
        rank.begun = [one for one in rank.begun if one[0] > number]

    def _choose(self, rank: Rank, number: int, stream: int) -> list[Callable[[], None]]:
        """The choice of all layers; returns what enqueues the rest of each, and lets go of its version."""
        main, rank.streams.now = rank.streams.now, stream
        try:
            rests = []
            for index, layer in enumerate(rank.layers):
                with layer.choice() as pin:
                    rank.streams.current().enqueue(self._dispatch(layer, (number, index, rank.rank)))
                rests.append(self._rest(rank, stream, (number, index, rank.rank), pin))
            return rests
        finally:
            rank.streams.now = main if stream == 2 else stream  # the main thread steps where it ran its forward

    def _dispatch(self, layer: ResidentExperts, key: tuple[int, int, int]) -> Callable[[], None]:
        number, index, _ = key

        def dispatch() -> None:
            layer.load_E += self.hot[index]
            for expert, lane in self.routes(layer):
                to = (number, index, lane // layer.num_lanes)
                self.messages.setdefault(to, []).append((expert, lane % layer.num_lanes))
            self.dispatched.add(key)

        return dispatch

    def _rest(self, rank: Rank, stream: int, key: tuple[int, int, int], pin: Pin) -> Callable[[], None]:
        number, index, _ = key
        layer = rank.layers[index]
        slots: list[tuple[int, int, int]] = []

        def look_up() -> bool:
            if not all((number, index, other) in self.dispatched for other in range(self.num_ranks)):
                return False
            for expert, lane in self.messages.pop(key, []):
                slots.append((expert, lane, int(layer.table.lane_to_slot_S[lane])))
            return True

        def compute() -> None:
            for expert, lane, slot in slots:
                for name, tensor in layer.pool.tensors.items():
                    found = tensor[slot].tolist()
                    expected = [content(index, expert)] * len(found)
                    assert found == expected, f"forward {key}: lane {lane}, slot {slot}, {name}: {found}"
                self.checked_rows += 1
            self.computed.add(key)

        def combine() -> bool:
            return all((number, index, other) in self.computed for other in range(self.num_ranks))

        def enqueue() -> None:
            main, rank.streams.now = rank.streams.now, stream
            items = rank.streams.current().items
            items.append(look_up)
            rank.streams.current().enqueue(compute)
            items.append(combine)
            pin.release()
            rank.streams.now = main

        return enqueue

    def routes(self, layer: ResidentExperts) -> list[tuple[int, int]]:
        """Every (expert, lane) that the current table names; each expert at least once (I2)."""
        offsets, lanes = layer.table.offsets_E1.tolist(), layer.table.lanes_P.tolist()
        named = []
        for expert in range(layer.num_experts):
            replicas = lanes[offsets[expert] : offsets[expert + 1]]
            assert replicas, f"expert {expert} has no replica in a current table (I2)"
            named += [(expert, lane) for lane in replicas]
        return named

    def check_write(self, rank: int, slab: torch.Tensor) -> None:
        """I1: nobody's current, published or in-flight table names the slot that is about to be written."""
        pool = self.ranks[rank].pool
        slot = (slab.data_ptr() - pool.slab_SB.data_ptr()) // pool.slot_bytes
        assert pool.state(slot) in (SlotState.FILLING, SlotState.QUARANTINED), pool.state(slot)
        for index, mine in enumerate(self.ranks[rank].layers):
            for other in self.ranks:
                theirs = other.layers[index]
                for _, lane in self.routes(theirs):
                    if lane // mine.num_lanes == rank:
                        named = int(mine.table.lane_to_slot_S[lane % mine.num_lanes])
                        assert named != slot, (
                            f"slot {slot} of rank {rank} is written but rank {other.rank} names it (I1)"
                        )

    def _new_load(self) -> list[torch.Tensor]:
        rng = np.random.default_rng(self.rng.randrange(2**31))
        loads = rng.lognormal(3.0, 1.2, size=(self.shape.num_layers, self.shape.num_experts))
        return list(torch.from_numpy(loads.astype(np.int64)))

    # ---- what must hold in the end

    def check_at_rest(self) -> None:
        """No slot was lost, every table names what is there, all ranks agree."""
        versions = {rank.controller.health().version for rank in self.ranks}
        assert len(versions) == 1, versions
        for index in range(self.shape.num_layers):
            placements = [rank.layers[index].current.placement for rank in self.ranks]
            assert all(placement == placements[0] for placement in placements)
            assert all(len(rank.layers[index].versions.ungraced) == 1 for rank in self.ranks)
            for rank in self.ranks:
                self.check_layer(rank, index)
        for rank in self.ranks:
            live = sum(layer.num_physical_per_rank for layer in rank.layers)
            assert rank.pool.count(SlotState.LIVE) == live
            assert rank.pool.count(SlotState.FREE) == rank.pool.num_slots - live, rank.pool._census()

    def check_layer(self, rank: Rank, index: int) -> None:
        layer = rank.layers[index]
        for expert, slots in layer.live_slots().items():
            for slot in slots:
                assert rank.pool.state(slot) is SlotState.LIVE
                assert rank.pool.tensors["weight"][slot].tolist() == [content(index, expert)] * 6
                assert rank.pool.tensors["scale"][slot].tolist() == [content(index, expert)] * 3
