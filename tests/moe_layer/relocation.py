"""Relocations by hand on one rank: the steps of a wave, one after another, with no worker; and what is run meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from eplb import EplbConfig, EplbController
from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Wave
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import LocalCommunicator
from eplb.relocation.fill import WaveFill
from eplb.relocation.handoff import Handoff
from moe_layer import MoELayer
from tests.moe_layer.reference import give_unit_scale


def moved(placement: Placement, expert: int) -> LayerUpdate:
    """What moves `expert` of a one-rank layer from its lane to an empty one."""
    lanes = placement.lanes_WS[0].tolist()
    source, target = lanes.index(expert), lanes.index(-1)
    lanes[source], lanes[target] = -1, expert
    after = Placement(np.array([lanes]), placement.num_experts)
    return LayerUpdate(0, (Move(expert, 0, source, 0, target),), after, equal_shares(after))


class Relocator:
    """Moves experts of layers that are alone on their rank; every move is one wave with a version of its own."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.residents = [layer.resident for layer in layers]
        self.streams = self.residents[0].streams
        self.version = 0

    def fill(self, layer: int, expert: int) -> WaveFill:
        """Take a slot and copy the expert into it, up to the end."""
        update = moved(self.residents[layer].newest.placement, expert)
        update = LayerUpdate(layer, update.moves, update.placement, update.shares_WS)
        self.version += 1
        communicator = LocalCommunicator(self.streams)
        fill = WaveFill(Wave((update,)), self.version, (self.version, 0), self.residents, communicator, self.streams)
        fill.start()
        while not fill.poll():
            pass
        return fill

    def publish(self, fill: WaveFill) -> Handoff:
        handoff = fill.hand_over()
        fill.publish()
        return handoff

    def flip(self, handoff: Handoff) -> None:
        """On the calling thread's stream, as the main thread would."""
        handoff.flip(self.streams)

    def release(self, fill: WaveFill, handoff: Handoff) -> None:
        """Grace: nobody can name the old slot."""
        while not handoff.flipped.query():
            pass
        assert not any(layer.held_by(handoff.version) for layer in handoff.layers)
        fill.release()

    def move(self, expert: int, layer: int = 0) -> None:
        """The whole way of one expert."""
        fill = self.fill(layer, expert)
        handoff = self.publish(fill)
        self.flip(handoff)
        self.release(fill, handoff)

    def move_without_grace(self, expert: int, layer: int = 0) -> None:
        """Up to the flip. Old versions may be in use."""
        self.flip(self.publish(self.fill(layer, expert)))


def make_pair(device: str, dtype: torch.dtype = torch.float32, **options) -> tuple[MoELayer, MoELayer]:
    """A registered layer, and a twin that never moves."""
    layer, twin = (
        give_unit_scale(MoELayer(32, 16, 8, 2, num_shadow_slots=2, device=device, dtype=dtype, **options))
        for _ in range(2)
    )
    EplbController(EplbConfig(use_async=False)).register(layer)
    settle(device)
    return layer, twin


def settle(device: str) -> None:
    """What the test wrote into slots itself is there, before the side stream reads or writes them."""
    if device == "cuda":
        torch.cuda.synchronize()


def poison(layer: MoELayer, slot: int, device: str) -> None:
    """Nobody may read this slot any more: NaN."""
    layer.resident.pool.slab(slot).fill_(255)
    settle(device)


def as_is(layer, x):
    return layer(x)


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def checkpointed_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)
