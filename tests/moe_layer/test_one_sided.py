"""The one-sided dispatcher with virtual ranks: what arrives, what comes back, and that the placement changes no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.virtual_ranks import Sizes, VirtualRanks
from eplb.planning.placement import Placement
from eplb.planning.shares import equal_shares
from eplb.relocation.table import flip, map_lanes
from moe_kernels.peers import combine_home
from moe_kernels.peers.peers import NO_RANK
from moe_layer.dispatch import one_sided
from moe_layer.forward.executors import choose_replicas

SMALL = {"num_experts": 8, "top_k": 2, "hidden_size": 24, "intermediate_size": 16, "max_tokens": 6}


def batch(sizes: Sizes, tokens: list[int], device: str, seed: int = 0, skewed: bool = False):
    """Hidden states and choices of each rank, some of them of no expert."""
    generator = torch.Generator().manual_seed(seed)
    x, chosen = [], []
    for count in tokens:
        x.append(torch.randn(count, sizes.hidden_size, generator=generator).to(device, sizes.dtype))
        scores = torch.rand(count, sizes.num_experts, generator=generator)
        if skewed:
            scores[:, : sizes.top_k] += 2
        ids = scores.topk(sizes.top_k, dim=1).indices.int()
        ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
        weights = torch.rand(count, sizes.top_k, generator=generator)
        chosen.append((weights.to(device), ids.to(device)))
    return x, chosen


def expected(ranks: VirtualRanks, x, chosen) -> list[torch.Tensor]:
    """float64, expert by expert."""
    gate_up, down = {}, {}
    for experts in ranks.experts:
        for expert, slots in experts.resident.live_slots().items():
            gate_up[expert] = experts.pool.tensors["gate_up_proj"][slots[0]].double()
            down[expert] = experts.pool.tensors["down_proj"][slots[0]].double()
    results = []
    for x_TH, (weights_TK, ids_TK) in zip(x, chosen, strict=True):
        y = torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
        for token in range(len(x_TH)):
            for weight, expert in zip(weights_TK[token], ids_TK[token].tolist(), strict=True):
                if expert >= 0:
                    gate, up = (gate_up[expert] @ x_TH[token].double()).chunk(2)
                    y[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        results.append(y)
    return results


def run(ranks: VirtualRanks, x, chosen, bound: int | None = None) -> list[torch.Tensor]:
    ranks.fork()
    y = ranks.forward(x, chosen, bound)
    ranks.join()
    for dispatcher in ranks.dispatchers:
        dispatcher.raise_if_failed()
    return y


def shuffled(sizes: Sizes, seed: int) -> Placement:
    """A random placement of which every expert has a replica, with some lanes empty."""
    random = np.random.default_rng(seed)
    per_rank = (sizes.num_experts + sizes.num_redundant_experts) // sizes.num_ranks
    while True:
        extra = random.integers(0, sizes.num_experts, sizes.num_redundant_experts)
        experts = random.permutation(np.concatenate([np.arange(sizes.num_experts), extra]))
        lanes = np.full((sizes.num_ranks, per_rank + sizes.num_shadow_slots), -1)
        for rank, own in enumerate(experts.reshape(sizes.num_ranks, per_rank)):
            lanes[rank, random.permutation(lanes.shape[1])[:per_rank]] = own
        if all(len(set(row[row >= 0])) == per_rank for row in lanes):
            return Placement(lanes, sizes.num_experts)


@pytest.mark.parametrize(
    ("num_ranks", "tokens", "sums"),
    [
        (1, [5], "by_rank"),
        (2, [3, 6], "fixed_order"),
        (2, [0, 0], "fixed_order"),
        (4, [6, 0, 1, 5], "by_rank"),
        pytest.param(4, [0, 0, 6, 0], "fixed_order", marks=pytest.mark.gpu),  # slow, where interpreted
    ],
)
def test_outputs(num_ranks, tokens, sums, device, assert_close):
    """Twice, as the second forward meets what the first has left behind."""
    sizes = Sizes(num_ranks=num_ranks, num_redundant_experts=num_ranks * (num_ranks > 1), dtype=torch.float32, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device), sums=sums)
    for step in range(2):
        x, chosen = batch(sizes, tokens[::-1] if step else tokens, device, seed=step)
        for y, wanted in zip(run(ranks, x, chosen), expected(ranks, x, chosen), strict=True):
            assert_close(y, wanted)


@pytest.mark.parametrize(
    ("dtype", "skewed"),
    [(torch.float32, False), (torch.bfloat16, True)],
)
@pytest.mark.gpu  # slow, where interpreted
def test_no_bit_depends_on_the_placement(dtype, skewed, device):
    """I5, also with a smaller bound, and with fewer ranks."""
    sizes = Sizes(num_ranks=4, num_redundant_experts=4, num_shadow_slots=2, dtype=dtype, **SMALL)
    tokens = [6, 2, 0, 5]
    x, chosen = batch(sizes, tokens, device, skewed=skewed)
    first = run(VirtualRanks(sizes, torch.device(device)), x, chosen)
    for seed in range(8 if device == "cuda" else 1):  # the interpreter takes seconds for each
        placement = shuffled(sizes, seed)
        ranks = VirtualRanks(sizes, torch.device(device), placement=placement, shares_WS=equal_shares(placement))
        for again, y in zip(run(ranks, x, chosen), first, strict=True):
            assert torch.equal(again, y)
    assert all(torch.equal(again, y) for again, y in zip(run(ranks, x, chosen, bound=6), first, strict=True))


def test_fp8_rows(device):
    """They arrive as near as e4m3 allows, the same on all ranks, and zeros as zeros; 300 channels are three groups."""
    sizes = Sizes(2, 8, 2, 300, 16, 6, dtype=torch.float32, fp8=True)
    ranks = VirtualRanks(sizes, torch.device(device))
    x, chosen = batch(sizes, [5, 3], device)
    x[0][1] = 0
    x[1][2] *= 1e4
    chosen = [
        (weights, torch.tensor([[0, 4]], dtype=torch.int32, device=device).expand(len(weights), 2).contiguous())
        for weights, _ in chosen
    ]
    sent = [send(ranks, rank, x[rank], chosen[rank]) for rank in range(2)]
    for one in sent:
        one.schedule(16, 0)
    arrived = [one.rows_RH.view(2, 6, 300) for one in sent]
    for source, x_TH in enumerate(x):
        for rows in arrived:
            y = rows[source, : len(x_TH)]
            assert torch.equal(y, arrived[0][source, : len(x_TH)])
            groups = torch.nn.functional.pad(x_TH.abs(), (0, 84)).view(len(x_TH), 3, 128).amax(2)
            scale = groups.repeat_interleave(128, 1)[:, :300] / 448
            assert ((y - x_TH).abs() <= torch.maximum(x_TH.abs() / 16, scale * 2**-10) * 1.0001).all()
            assert not torch.equal(y, x_TH)


@pytest.mark.parametrize("sums", ["fixed_order", "by_rank"])
def test_long_batches_wait_in_one_program(sums, device, monkeypatch):
    """As where all programs wait: the same bits. Here each batch counts as long."""
    sizes = Sizes(num_ranks=2, dtype=torch.float32, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device), sums=sums)
    x, chosen = batch(sizes, [5, 2], device)
    few = [y.clone() for y in run(ranks, x, chosen)]
    met = []
    monkeypatch.setattr(combine_home, "_MOST_TURNS", 0)
    meet_peers = combine_home.meet_peers
    monkeypatch.setattr(
        combine_home, "meet_peers", lambda area, **says: (met.append(area.rank), meet_peers(area, **says))
    )
    assert all(torch.equal(y, wanted) for y, wanted in zip(run(ranks, x, chosen), few, strict=True))
    assert met == [0, 1]


@pytest.mark.parametrize("fp8", [False, True])
def test_few_tokens_are_sent_as_many_are(fp8, device, monkeypatch):
    """One kernel sorts and sends them, or one sorts and another sends: the receivers have the same."""
    sizes = Sizes(num_ranks=2, num_redundant_experts=2, dtype=torch.float32, fp8=fp8, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device))
    x, chosen = batch(sizes, [6, 3], device)
    chosen[0][1][2] = -1
    lanes = [choose_replicas(ranks.experts[rank], chosen[rank][1]) for rank in range(2)]
    found = []
    for few in (one_sided.FEW_ROWS, 0):
        monkeypatch.setattr(one_sided, "FEW_ROWS", few)
        for dispatcher in ranks.dispatchers:
            dispatcher.area.own[ranks.layout.offsets["counts"] :] = 255
        sent = [
            dispatcher.dispatch(x_TH, weights_TK, *of_rank, "triton")
            for dispatcher, x_TH, (weights_TK, _), of_rank in zip(ranks.dispatchers, x, chosen, lanes, strict=True)
        ]
        schedules = [one.schedule(16, 0) for one in sent]
        for one, schedule in zip(sent, schedules, strict=True):
            count = int(schedule.offsets_L1[-1])
            rows = schedule.order_N[:count].long()
            assert one.row_weights_N is not None
            found.append((schedule.offsets_L1, rows, one.row_weights_N[rows], one.rows_RH[rows // sizes.top_k]))
        assert sum(len(rows) for _, rows, _, _ in found[-2:]) == sum(int((ids >= 0).sum()) for _, ids in chosen)
    for first, second in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    weights = torch.cat([chosen[0][0].flatten(), chosen[1][0].flatten()])
    for _, rows, got, _ in found:
        tokens = rows // sizes.top_k
        place = torch.where(tokens < 6, rows, rows - (sizes.max_tokens - 6) * sizes.top_k)
        assert torch.equal(got, weights[place])


def test_a_rank_that_does_not_come_ends_the_wait(device):
    """And from then on nobody waits; the error names the rank."""
    sizes = Sizes(num_ranks=2, dtype=torch.float32, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device), timeout=0.2)
    x, chosen = batch(sizes, [3, 3], device)
    run(ranks, x, chosen)
    sent = send(ranks, 0, x[0], chosen[0])
    sent.schedule(16, 0)
    if device == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(TimeoutError, match=r"rank 1 of the ranks that share the experts did not come .* within 0.2 s"):
        ranks.dispatchers[0].raise_if_failed()
    with pytest.raises(TimeoutError, match="rank 1"):
        send(ranks, 0, x[0], chosen[0])
    ranks.dispatchers[1].raise_if_failed()  # it has waited for nobody


def send(ranks: VirtualRanks, rank: int, x_TH, chosen, bound=None):
    lanes_TK, counts_L = choose_replicas(ranks.experts[rank], chosen[1])
    return ranks.dispatchers[rank].dispatch(x_TH, chosen[0], lanes_TK, counts_L, "triton", bound)


def test_ranks_with_different_bounds_are_told(device):
    sizes = Sizes(num_ranks=2, dtype=torch.float32, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device))
    x, chosen = batch(sizes, [3, 3], device)
    sent = [send(ranks, rank, x[rank], chosen[rank], bound=3 + rank) for rank in range(2)]
    for one in sent:
        one.schedule(16, 0)
    if device == "cuda":
        torch.cuda.synchronize()
    for dispatcher in ranks.dispatchers:
        assert dispatcher.area.failure() == NO_RANK
        with pytest.raises(ValueError, match="max_tokens must be equal on all ranks in each forward"):
            dispatcher.raise_if_failed()


def test_arguments(device):
    sizes = Sizes(num_ranks=2, dtype=torch.float32, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device))
    x, chosen = batch(sizes, [3, 7], device)
    with pytest.raises(ValueError, match=r"bound=6: must be in \[7, 6\]"):
        send(ranks, 1, x[1], chosen[1])
    with pytest.raises(ValueError, match="bound=2"):
        send(ranks, 0, x[0], chosen[0], bound=2)
    with pytest.raises(ValueError, match="this dispatcher moves no gradients, but x or expert_weights requires one"):
        send(ranks, 0, x[0].requires_grad_(), chosen[0])


class Mover:
    """Moves experts between virtual ranks by hand: fill, flip rank after rank, poison what nobody names any more."""

    def __init__(self, ranks: VirtualRanks, seed: int) -> None:
        self.ranks, self.random = ranks, np.random.default_rng(seed)
        self.lanes = ranks.experts[0].resident.current.placement.lanes_WS.copy()
        self.slots = np.array([experts.resident.current.slots_S for experts in ranks.experts])

    def begin(self) -> tuple[int, int]:
        """Fill a free slot with an expert of any rank; returns the place that is free once all ranks have flipped."""
        target = int(self.random.choice(np.nonzero((self.lanes < 0).any(axis=1))[0]))
        missing = [e for e in range(self.ranks.sizes.num_experts) if e not in self.lanes[target]]
        expert = int(self.random.choice(missing))
        source, lane = (int(one[0]) for one in np.nonzero(self.lanes == expert))
        to = int(self.random.choice(np.nonzero(self.lanes[target] < 0)[0]))
        pools = [experts.pool for experts in self.ranks.experts]
        used = set(self.slots[target][self.lanes[target] >= 0].tolist())
        slot = next(one for one in range(pools[target].num_slots) if one not in used)
        resident = self.ranks.experts[target].resident
        pools[target].slab(slot).copy_(pools[source].slab(int(self.slots[source][lane])))
        map_lanes([(resident.table, to, slot)], resident.streams.current())
        self.lanes[target][to], self.slots[target][to] = expert, slot
        self.lanes[source][lane] = -1
        return source, lane

    def flip(self, rank: int) -> None:
        resident = self.ranks.experts[rank].resident
        placement = Placement(self.lanes, self.ranks.sizes.num_experts)
        stream = resident.streams.current()
        resident.table.stage(placement, equal_shares(placement), stream)
        flip([resident.table], stream)
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # the next upload has the same source

    def end(self, source: int, lane: int) -> None:
        self.ranks.experts[source].pool.slab(int(self.slots[source][lane])).fill_(255)


@pytest.mark.gpu
def test_graphs_are_replayed_while_tables_flip(device):
    """1,000 flips on a GPU: every rank flips in a step of its own, and no bit changes."""
    sizes = Sizes(num_ranks=4, num_redundant_experts=4, num_shadow_slots=2, dtype=torch.bfloat16, **SMALL)
    ranks = VirtualRanks(sizes, torch.device(device), placement=shuffled(sizes, 1))
    x, chosen = batch(sizes, [6, 2, 0, 5], device)
    first = [y.clone() for y in run(ranks, x, chosen)]
    mover = Mover(ranks, 2)
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ranks.fork()
            outputs = ranks.forward(x, chosen)
            ranks.join()
    for _ in range(250 if device == "cuda" else 1):
        free = mover.begin()
        for rank in mover.random.permutation(sizes.num_ranks).tolist():
            mover.flip(rank)
            if device == "cuda":
                graph.replay()
            else:
                outputs = run(ranks, x, chosen)
            assert all(torch.equal(y, wanted) for y, wanted in zip(outputs, first, strict=True))
        mover.end(*free)
    for dispatcher in ranks.dispatchers:
        dispatcher.raise_if_failed()
