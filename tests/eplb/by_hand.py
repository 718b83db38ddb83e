"""One layer on one rank, and its waves step by step, over simulated streams."""

import random

import torch

from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Wave
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import LocalCommunicator
from eplb.relocation.fill import WaveFill
from eplb.relocation.handoff import Handoff
from eplb.relocation.pool import SlotPool, TensorSpec
from eplb.relocation.resident import ResidentExperts
from eplb.streams import DeviceStreams
from tests.eplb.simulated import Faults, SimStreams


def sim_streams(num_computes: int = 2) -> SimStreams:
    return SimStreams(Faults(random.Random(0)), num_computes)


def make_layer(
    streams: DeviceStreams, num_experts: int = 2, num_shadow_slots: int = 1, pool: SlotPool | None = None
) -> ResidentExperts:
    """Expert e's weights are 100 + e; in a pool of its own if none is given."""
    pool = pool or SlotPool([TensorSpec("weight", (4,), torch.int32)], num_experts + num_shadow_slots)
    layer = ResidentExperts(
        num_experts=num_experts,
        num_redundant_experts=0,
        num_shadow_slots=num_shadow_slots,
        rank=0,
        num_ranks=1,
        pool=pool,
        streams=streams,
    )
    for expert, (slot,) in layer.live_slots().items():
        pool.tensors["weight"][slot] = 100 + expert
    return layer


def filled(layer: ResidentExperts, expert: int) -> WaveFill:
    """A wave that moves `expert` to the first empty lane, up to the end of its transfers."""
    streams, old = layer.streams, layer.newest
    lanes = old.placement.lanes_WS.copy()
    source, target = lanes[0].tolist().index(expert), lanes[0].tolist().index(-1)
    lanes[0, source], lanes[0, target] = -1, expert
    placement = Placement(lanes, layer.num_experts)
    update = LayerUpdate(0, (Move(expert, 0, source, 0, target),), placement, equal_shares(placement))
    number = old.number + 1
    fill = WaveFill(Wave((update,)), number, (number, 0), [layer], LocalCommunicator(streams), streams)
    fill.start()
    while not fill.poll():
        streams.side.advance()  # type: ignore[attr-defined]
    return fill


def published(layer: ResidentExperts, expert: int) -> tuple[WaveFill, Handoff]:
    """A wave whose version waits to be flipped, with its table uploaded."""
    fill = filled(layer, expert)
    handoff = fill.hand_over()
    fill.publish()
    if isinstance(layer.streams, SimStreams):
        while layer.streams.side.advance():
            pass
    return fill, handoff


def is_graced(fill: WaveFill, handoff: Handoff) -> bool:
    """As the worker sees it: if nothing before the wave's version can be in use, it is released."""
    assert handoff.flipped is not None
    if not handoff.flipped.query() or any(layer.held_by(handoff.version) for layer in handoff.layers):
        return False
    fill.release()
    return True


def is_graced_in_the_end(fill: WaveFill, handoff: Handoff, streams: SimStreams) -> bool:
    """After all that the device has to do, also what the first look at the pins records."""
    streams.drain()
    if is_graced(fill, handoff):
        return True
    streams.drain()
    return is_graced(fill, handoff)
