"""Replicas chosen by the counts of this batch: outputs, gradients, balance, collectives, ranks whose tables differ."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bench.virtual_ranks import Sizes, VirtualRanks
from eplb.planning.placement import Placement
from eplb.planning.plan import LayerUpdate, Move, Wave
from eplb.planning.shares import equal_shares
from eplb.relocation.communicator import LocalCommunicator
from eplb.relocation.fill import WaveFill
from moe_kernels import count_experts_torch
from moe_layer import AllToAllDispatcher, BatchShares, MoELayer
from moe_layer.forward.batch_shares import resolve_shares
from tests.distributed import distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, TOP_K, Service, make_controller, make_layer, tokens
from tests.moe_layer.test_one_sided import SMALL, batch, run


class Watched(AllToAllDispatcher):
    """Notes the rows that come here, whether ranks had different versions, and calls `meanwhile` after a gather."""

    def __init__(self, group, num_lanes):
        super().__init__(group, num_lanes)
        self.rows, self.had_several_versions, self.meanwhile = 0, 0, None

    def gather_counts(self, counts_E, needs_grad):
        gathered = super().gather_counts(counts_E, needs_grad)
        self.had_several_versions += len(set(gathered[:, -1].tolist())) > 1
        if self.meanwhile is not None:
            self.meanwhile()
        return gathered

    def dispatch(self, *arguments, **options):
        sent = super().dispatch(*arguments, **options)
        self.rows = sent.rows_RH.shape[0]
        return sent


def make_pair(group, device, shares="batch", redundant=None, **options):
    """A layer by batch whose dispatcher is watched, and a twin by window."""
    num_ranks = dist.get_world_size(group)
    redundant = num_ranks if redundant is None else redundant
    lanes = (EXPERTS + redundant) // num_ranks + options.get("num_shadow_slots", 1)
    options["num_redundant_experts"] = redundant
    dispatcher = Watched(group, lanes)
    return make_layer(group, device, shares=shares, dispatcher=dispatcher, **options), make_layer(
        group, device, **options
    )


class Collectives:
    """``with``: counts the collectives of this process that move rows or counts."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("all_to_all_single", "all_gather_into_tensor", "all_gather"):
            original = getattr(dist, name)

            def counted(*arguments, original=original, **options):
                self.count += 1
                return original(*arguments, **options)

            monkeypatch.setattr(dist, name, counted)


@distributed(num_ranks=2)
def test_two_ranks(rank, num_ranks, group, device):
    check_outputs(rank, group, device)
    check_gradients(rank, group, device)
    check_collectives(rank, group, device)
    check_what_differs(rank, group, device)
    check_a_flip_meanwhile(rank, group, device)


@distributed(num_ranks=4, on_cpu=False)
def test_four_ranks(rank, num_ranks, group, device):
    check_outputs(rank, group, device)
    check_balance(rank, group, device)
    check_collectives(rank, group, device)


@distributed(num_ranks=2, backend="nccl")
def test_two_gpus(rank, num_ranks, group, device):
    check_outputs(rank, group, device)
    check_gradients(rank, group, device)
    check_collectives(rank, group, device)


@distributed(num_ranks=2)
def test_i5_experts_move_and_outputs_stay(rank, num_ranks, group, device):
    """Ranks step at different times, so that versions differ in some forwards; and in others they do not."""
    layer, twin = make_pair(group, device, num_shadow_slots=2)
    controller = make_controller(group, [layer])
    service = Service(rank, group, device, [layer], [twin], controller)
    seen = set()

    def step(number):
        seen.add(layer.executor.dispatcher.had_several_versions)
        return (number // 3 + rank) % 2 == 0

    service.serve_until(
        lambda: layer.executor.dispatcher.had_several_versions >= 3 and controller.metrics().waves >= 6,
        "six waves, three forwards with different versions",
        step,
    )
    controller.close()


# ---- the checks; all are collective


@torch.no_grad()
def check_outputs(rank, group, device):
    """I5: the bits of the twin's; each forward counts its load once."""
    for shares in ("batch", BatchShares(expert_cost=40)):
        layer, twin = make_pair(group, device, shares)
        for step in range(4):
            x = tokens(rank, step, device)
            mask = torch.arange(len(x), device=device) % 3 > 0
            assert torch.equal(layer(x), twin(x))
            assert torch.equal(layer(x, mask), twin(x, mask))
        assert torch.equal(layer.resident.load_E, twin.resident.load_E)
        assert layer.resident.load_E.sum() > 0 or rank > 0


def check_gradients(rank, group, device):
    """I3: the backward uses the lanes of the forward, and counts nothing."""
    layer, twin = make_pair(group, device)
    ours, theirs = (tokens(rank, 1, device).requires_grad_() for _ in range(2))
    layer(ours).square().sum().backward()
    twin(theirs).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.resident.load_E, twin.resident.load_E)


@torch.no_grad()
def check_balance(rank, group, device):
    """The rows of a rank are those that the quotas say, and no rank has more than the best split allows, to two rows.

    All tokens choose expert 0 and 1, of which each has two replicas on four ranks: a quarter of the rows each.
    """
    layer, _ = make_pair(group, device)
    lanes_WS = layer.resident.current.placement.lanes_WS
    by_rank = [set(row[row >= 0].tolist()) for row in lanes_WS]
    twice = [expert for expert in range(EXPERTS) if sum(expert in here for here in by_rank) == 2]
    first = next(one for one in twice)
    second = next(
        one for one in twice if not any(one in here and first in here for here in by_rank)
    )  # on the two other ranks
    count = 5 + 4 * rank
    ids = torch.tensor([[first, second]] * count, device=device)
    weights = torch.ones(count, TOP_K, device=device)
    layer(torch.ones(count, HIDDEN, device=device), expert_ids=ids, expert_weights=weights)
    total = sum(5 + 4 * other for other in range(4)) * TOP_K
    assert abs(layer.executor.dispatcher.rows - total / 4) <= 0.5


def check_collectives(rank, group, device):
    """Three a forward, as without; six more for a backward, which repeats the forward with its lanes."""
    with pytest.MonkeyPatch.context() as patch:
        layer, twin = make_pair(group, device)
        collectives = Collectives(patch)
        counts = []
        for one in (layer, twin):
            x = tokens(rank, 2, device).requires_grad_()
            with torch.no_grad():
                one(x)
            counts.append(collectives.count)
            one(x).sum().backward()
            counts.append(collectives.count)
            collectives.count = 0
        assert counts[0] == counts[2] == 3, counts
        assert counts[1] <= counts[3], counts


def check_what_differs(rank, group, device):
    """Only one rank needs a gradient: all say so."""
    layer, _ = make_pair(group, device)
    x = tokens(rank, 1, device).requires_grad_(rank == 0)
    with pytest.raises(ValueError, match=r"require a gradient on all ranks .* the ranks \[0\] do"):
        layer(x)


@torch.no_grad()
def check_a_flip_meanwhile(rank, group, device):
    """A table that another thread flips between what was told and the choice: the told version's lanes are chosen.

    Rank 0 moves an expert between its own lanes. The twin is not told.
    """
    layer, twin = make_pair(group, device, num_shadow_slots=2)
    resident = layer.resident
    old = resident.current
    lanes = old.placement.lanes_WS.copy()
    is_alone = [expert >= 0 and (lanes == expert).sum() == 1 for expert in lanes[0]]  # all its tokens go there
    source, target = is_alone.index(True), int(np.flatnonzero(lanes[0] < 0)[0])
    expert = int(lanes[0, source])
    lanes[0, source], lanes[0, target] = -1, expert
    after = Placement(lanes, EXPERTS)
    update = LayerUpdate(0, (Move(expert, 0, source, 0, target),), after, equal_shares(after))
    if rank == 0:
        communicator = LocalCommunicator(resident.streams)
        fill = WaveFill(Wave((update,)), 1, (1, 0), [resident], communicator, resident.streams)
        fill.start()
        while not fill.poll():
            pass
        handoff = fill.hand_over()
        fill.publish()

        def flip():
            if resident.current is old:
                handoff.flip(resident.streams)

        layer.executor.dispatcher.meanwhile = flip
    seen = []
    dispatch = layer.executor.dispatcher.dispatch

    def noting(x_TH, weights_TK, lanes_TK, counts_L, *arguments, **options):
        seen.append(counts_L.tolist())
        return dispatch(x_TH, weights_TK, lanes_TK, counts_L, *arguments, **options)

    layer.executor.dispatcher.dispatch = noting
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    for _ in range(3):
        assert torch.equal(layer(x), twin(x))
    # The first forward has told the old version and chosen by it; the others see the new one. Rank 1 knows the old one only.
    named = [(counts[source] > 0, counts[target] > 0) for counts in seen]
    assert named == [(True, False), *([(False, True)] * 2 if rank == 0 else [(True, False)] * 2)]
    assert layer.executor.dispatcher.had_several_versions == 2
    if rank == 0:
        assert resident.current is not old
        assert not resident.held_by(1), "no pin is left"


# ---- arguments


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("rows", "shares must be one of 'window', 'batch' or a BatchShares; got 'rows'"),
        (3, "shares must be one of 'window', 'batch' or a BatchShares; got 3"),
        ("batch", r"shares=BatchShares\(expert_cost=0\) needs a process_group of several ranks"),
    ],
)
def test_on_one_rank_it_is_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(8, 8, 4, 2, shares=shares)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 8, True, AllToAllDispatcher), "does not go with trainable=True"),
        ((65, 8, False, AllToAllDispatcher), "at most 64 ranks and num_experts=1024, got 65 and 8"),
        ((2, 1025, False, AllToAllDispatcher), "at most 64 ranks and num_experts=1024, got 2 and 1025"),
        ((2, 8, False, object()), "needs a dispatcher with the method gather_counts"),
    ],
)
def test_what_it_does_not_go_with(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_shares("batch", *arguments)
    assert resolve_shares("window", *arguments) is None


@pytest.mark.parametrize("cost", [-1, 0.5, True, 2**20 + 1])
def test_a_cost_out_of_range(cost):
    with pytest.raises(ValueError, match="expert_cost must be"):
        BatchShares(expert_cost=cost)


def test_rows_by_lane_are_those_that_ranks_choose():
    from moe_kernels import LoadCounter, ReplicaTable, select_by_quota_torch, solve_shares_torch
    from moe_layer.forward.batch_shares import rows_by_lane

    rng = np.random.default_rng(0)
    for _ in range(20):
        lanes = torch.tensor(rng.permutation(12)[:10], dtype=torch.int32)
        offsets = torch.tensor([0, 3, 3, 4, 6, 10 - int(rng.integers(2))], dtype=torch.int32)
        table = ReplicaTable(lanes, lanes, offsets, torch.zeros_like(lanes))
        ids = [torch.tensor(rng.integers(-1, 5, (int(n), 2)), dtype=torch.int32) for n in rng.integers(0, 30, 3)]
        counts_WE = torch.stack([count_experts_torch(one, 5) for one in ids])
        expected = []
        for rank, mine in enumerate(ids):
            quotas, before = solve_shares_torch(counts_WE, table, 4, rank)
            counter = LoadCounter(torch.zeros(5, dtype=torch.int64))
            expected.append(select_by_quota_torch(mine, table, quotas, before, counter, num_lanes=12)[1])
        got = rows_by_lane(counts_WE, table, quotas, 12)
        assert got.dtype == torch.int32
        assert torch.equal(got, torch.stack(expected))


# ---- other dispatchers


def test_virtual_ranks(device):
    """One-sided: the same bits, and the two ranks share the tokens of a hot expert."""
    sizes = Sizes(num_ranks=2, num_redundant_experts=2, dtype=torch.float32, **SMALL)
    x, chosen = batch(sizes, [6, 5], device)
    plain = VirtualRanks(sizes, torch.device(device))
    solved = VirtualRanks(sizes, torch.device(device), batch_shares=BatchShares())
    for again, y in zip(run(solved, x, chosen), run(plain, x, chosen), strict=True):
        assert torch.equal(again, y)
    hot = [torch.zeros_like(ids) for _, ids in chosen]  # expert 0 alone, which has a replica on each rank
    for ids in hot:
        ids[:, 1] = -1
    solved.fork()
    lanes = solved.choose_lanes(hot)
    solved.join()
    per_rank = sum(counts_L.cpu() for _, counts_L in lanes).view(2, -1).sum(1)
    assert sorted(per_rank.tolist()) == [5, 6], "eleven tokens"


@distributed(num_ranks=2)
def test_all_gather(rank, num_ranks, group, device):
    check_dispatcher(rank, group, device, "all_gather", device.type == "cuda")


@distributed(num_ranks=2, on_cpu=False)
def test_one_sided(rank, num_ranks, group, device):
    check_dispatcher(rank, group, device, "symm_mem", True)


def check_dispatcher(rank, group, device, dispatcher, triton):
    options = {
        "dispatcher": dispatcher,
        "max_tokens": 12,
        "num_redundant_experts": 2,
        "backend": "triton" if triton else "torch",
    }
    plain, solved = (make_layer(group, device, shares=shares, **options) for shares in ("window", BatchShares(3)))
    x = tokens(rank, 0, device)
    with torch.no_grad():
        assert torch.equal(solved(x), plain(x))
    gradients = []  # with a gradient, another dispatcher may move the rows: the next forward is then as ever
    for layer in (plain, solved):
        x = tokens(rank, 3, device).requires_grad_()
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert torch.equal(plain.resident.load_E, solved.resident.load_E), "each forward is counted once"
    x = torch.ones(10 + rank, HIDDEN, device=device)  # all tokens choose the same experts
    with torch.no_grad():
        assert torch.equal(solved(x, max_tokens=11), plain(x, max_tokens=11))
