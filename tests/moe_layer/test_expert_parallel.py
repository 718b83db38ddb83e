"""Experts spread over ranks that do not move: outputs, gradients, states. Each test has several checks, as starting is slow."""

import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from eplb import EplbController
from moe_layer import AllToAllDispatcher, MoELayer, ignore_in_ddp, ignore_in_fsdp, make_pool
from tests.conftest import TOLERANCES
from tests.distributed import distributed
from tests.moe_layer.ranks import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, make_layer, tokens
from tests.moe_layer.reference import Weights, clear_tokens, dense_forward, give_unit_scale

NUM_STEPS = 4  # batches; each of four ranks has none in one or two of them
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "top_k": TOP_K}


def all_tokens(num_ranks: int, step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([tokens(rank, step, device, dtype) for rank in range(num_ranks)])


def own_rows(all_rows: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    counts = [len(tokens(other, step, torch.device("cpu"))) for other in range(rank + 1)]
    return all_rows[sum(counts[:-1]) : sum(counts)]


@distributed(num_ranks=2)
def test_two_ranks(rank, num_ranks, group, device):
    check_refusals(group, device)
    check_dispatch(rank, group, device)
    for dtype in (torch.float32, torch.bfloat16):
        check_outputs(rank, num_ranks, group, device, dtype)
    check_masks(rank, group, device)
    check_gradients(rank, num_ranks, group, device, trainable=False)
    check_gradients(rank, num_ranks, group, device, trainable=True)
    check_gradients_of_x_on_some_ranks(rank, group, device)
    check_shared_pool(group, device)
    check_range_scope(rank, num_ranks, group, device)
    check_another_ranks_range(rank, group, device)
    check_saving_alone(rank, group, device)
    check_load_experts(rank, group, device)
    check_given_ids(rank, group, device)
    check_seeds(rank, group, device)
    check_starts(rank, num_ranks, group, device)
    check_kept_loss(group, device)
    check_ranks_that_differ_in_gradients(rank, group, device)
    check_ddp(rank, group, device)
    check_export(rank, group, device)
    check_fsdp1(rank, group, device)
    check_fsdp2(rank, group, device)


@distributed(num_ranks=4, on_cpu=False)
def test_four_ranks(rank, num_ranks, group, device):
    check_outputs(rank, num_ranks, group, device, torch.float32)
    check_states_between_rank_counts(rank, num_ranks, group, device)
    check_other_group(rank, device)
    check_copies(rank, group, device)


@distributed(num_ranks=2, backend="nccl")
def test_two_gpus(rank, num_ranks, group, device):
    check_dispatch(rank, group, device)
    for dtype in (torch.float32, torch.bfloat16):
        check_outputs(rank, num_ranks, group, device, dtype)
    check_masks(rank, group, device)
    check_gradients(rank, num_ranks, group, device, trainable=True)
    check_range_scope(rank, num_ranks, group, device)


# ---- the checks; all are collective


def check_refusals(group, device):
    for options, message in (
        ({"num_experts": 7}, "num_redundant_experts=0 with num_experts=7 makes 7 .* divisible by the 2 ranks"),
        (
            {"num_redundant_experts": 1},
            "num_redundant_experts=1 .* 9 physical experts, which must be divisible by the 2",
        ),
        ({"num_redundant_experts": 10}, r"num_redundant_experts=10 must be at most num_experts \* \(ranks - 1\) = 8"),
        ({"dispatcher": "local"}, "dispatcher='local' needs all experts on one rank, but process_group has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            MoELayer(**{**SIZES, **options}, process_group=group, device=device)
    alone = dist.new_group([0])
    if dist.get_rank(group) == 1:
        for make in (
            lambda: MoELayer(**SIZES, process_group=alone, device=device),
            lambda: EplbController(None, alone),
        ):
            with pytest.raises(ValueError, match="process_group must be one that rank 1 is in, got "):
                make()
    layer = make_layer(group, device)
    assert isinstance(layer.executor.dispatcher, AllToAllDispatcher) and layer.dispatch_backend in ("gloo", "nccl")
    with pytest.raises(
        ValueError,
        match=r"process_group has the ranks \[\], but a layer of the model shares its experts among \[0, 1\]",
    ):
        EplbController().register(layer)
    with pytest.raises(
        ValueError,
        match=r"process_group has the ranks \[0, 1\], but a layer of the model shares its experts among \[\]",
    ):
        EplbController(process_group=group).register(make_layer(None, device))
    assert make_layer(None, device).dispatch_backend == "local"


@torch.no_grad()
def check_dispatch(rank, group, device):
    """What is sent where, by hand-made lanes, and back: 3 lanes a rank, rank 0 has 4 tokens, rank 1 none, then the reverse."""
    dispatcher = AllToAllDispatcher(group, num_lanes=3)
    lanes = [[0, 5], [-1, -1], [4, 1], [3, 3]]  # global: rank · 3 + lane
    for sender in (0, 1):
        count = 4 if rank == sender else 0
        lanes_TK = torch.tensor(lanes, dtype=torch.int32, device=device)[:count]
        x_TH = torch.arange(12.0, device=device).view(4, 3)[:count] + 100 * sender
        weights_TK = torch.arange(8.0, device=device).view(4, 2)[:count]
        counts_L = torch.tensor([1, 1, 0, 2, 1, 1] if count else [0] * 6, dtype=torch.int32, device=device)
        sent = dispatcher.dispatch(x_TH, weights_TK, lanes_TK, counts_L, "torch")
        assert sent.num_tokens == 4, "the batch is that of all ranks"
        # (token, k) of the rows for this rank, by lane; the masked token goes nowhere.
        expected = [(0, 0), (2, 1)] if rank == 0 else [(3, 0), (3, 1), (2, 0), (0, 1)]
        x = torch.arange(12.0).view(4, 3) + 100 * sender
        assert sent.rows_RH.tolist() == [x[token].tolist() for token, _ in expected]
        assert sent.row_weights_N.tolist() == [float(2 * token + k) for token, k in expected]
        schedule = sent.schedule(16, 0)
        assert schedule.order_N.tolist() == list(range(len(expected))), "they come by lane"
        assert schedule.offsets_L1.tolist() == [[0, 1, 2, 2], [0, 2, 3, 4]][rank]
        y = dispatcher.combine(sent.rows_RH * sent.row_weights_N[:, None], sent, lanes_TK, "torch")
        sums = torch.tensor([1.0, 0.0, 4.0 + 5.0, 6.0 + 7.0])[:, None] * x
        assert y.tolist() == sums[:count].tolist()


@torch.no_grad()
def check_outputs(rank, num_ranks, group, device, dtype):
    """I5: bitwise the same for any number of replicas; to rounding those of one rank that has all experts and tokens.

    (To rounding: the router's product has other bits for other numbers of rows, and those are the batch's, not the
    placement's. With the own tokens alone a CPU's references give the same bits.)
    """
    rtol, atol = TOLERANCES[dtype]
    alone = make_layer(None, device, dtype=dtype)
    layers = [
        make_layer(group, device, num_redundant_experts=redundant, dtype=dtype) for redundant in (0, num_ranks, EXPERTS)
    ]
    for step in range(NUM_STEPS):
        x = tokens(rank, step, device, dtype)
        expected = layers[0](x)
        for layer in layers[1:]:
            assert torch.equal(layer(x), expected), (
                f"step {step}, {layer.resident.num_redundant_experts} redundant experts"
            )
        whole = own_rows(alone(all_tokens(num_ranks, step, device, dtype)), rank, step)
        if dtype == torch.float32:  # in half precision a near tie may be decided in another way
            torch.testing.assert_close(expected, whole, rtol=rtol, atol=atol)
        if device.type == "cpu":
            assert torch.equal(expected, alone(x)), f"step {step}: not what one rank says"
    for layer in layers:
        load = layer.resident.load_E.clone()
        dist.all_reduce(load if dist.get_backend(group) == "nccl" else (load := load.cpu()), group=group)
        assert load.sum() == TOP_K * sum(len(all_tokens(num_ranks, step, device)) for step in range(NUM_STEPS))
    x = clear_tokens(alone, 10, seed=rank)
    expected = dense_forward(x.cpu(), Weights.of(alone), alone.gate.rule, TOP_K)
    torch.testing.assert_close(layers[1](x).cpu().double(), expected, rtol=2 * rtol, atol=2 * atol)


@torch.no_grad()
def check_masks(rank, group, device):
    layer = make_layer(group, device, num_redundant_experts=2)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    mask = torch.arange(6, device=device) % 3 != rank
    y = layer(torch.where(mask[:, None], x, float("nan")), mask)
    assert not y[~mask].any()
    assert torch.equal(y[mask], layer(x)[mask]), "the padding of a token changes another"
    trained = make_layer(group, device, trainable=True)
    with torch.enable_grad():
        for bad in (float("nan"), float("inf")):
            grads = []
            for value in (0.0, bad):
                trained.zero_grad()
                leaf = torch.where(mask[:, None], x, value).requires_grad_()
                trained(leaf, mask).square().sum().backward()
                grads.append([leaf.grad, *(parameter.grad for parameter in trained.parameters())])
            assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True)), "padding has a gradient"
    mask[:] = rank == 0  # all tokens of the other rank are padding
    y = layer(x, mask)
    assert bool(y.any()) == (rank == 0)


def check_gradients(rank, num_ranks, group, device, trainable):
    """Of this rank's tokens: bitwise the same for any number of replicas. Of the experts: on their own rank, of all tokens."""
    layers = [make_layer(group, device, trainable=trainable)]
    if not trainable:
        layers.append(make_layer(group, device, num_redundant_experts=2))
    alone = make_layer(None, device, trainable=trainable)
    for layer in (*layers, alone):
        layer.gate.requires_grad_()
    for step in range(3):
        every_x = all_tokens(num_ranks, step, device).requires_grad_()
        direction = torch.randn(every_x.shape, generator=torch.Generator().manual_seed(step)).to(device)
        alone.zero_grad()
        alone(every_x).backward(direction)
        grads = []
        runs = [*layers, lambda x: checkpoint(layers[0], x, use_reentrant=False)]
        for layer, run in zip([*layers, layers[0]], runs, strict=True):
            layer.zero_grad()
            x = tokens(rank, step, device).requires_grad_()
            counted = layer.resident.load_E.clone()
            y = run(x)
            y.backward(own_rows(direction, rank, step))
            assert trainable or not layer.resident.is_pinned_before(1), "an output that is kept pins its version"
            assert (layer.resident.load_E - counted).sum() == TOP_K * len(x), "the backward's recomputation was counted"
            grads.append((x.grad, layer.gate.weight.grad))
            del y
        for other in grads[1:]:
            assert all(torch.equal(one, another) for one, another in zip(grads[0], other, strict=True))
        close(grads[0][0], own_rows(every_x.grad, rank, step), "x")
        total = grads[0][1].clone() if dist.get_backend(group) == "nccl" else grads[0][1].cpu()
        dist.all_reduce(total, group=group)
        close(total.to(device), alone.gate.weight.grad, "gate")
        assert alone.gate.weight.grad.abs().max() > 0.01
        if trainable:
            for name in ("gate_up_proj", "down_proj"):
                own = alone.experts.get_parameter(name).grad[list(layers[0].resident.experts)]
                close(layers[0].experts.get_parameter(name).grad, own, name)
                assert own.abs().max() > 0.01


def check_gradients_of_x_on_some_ranks(rank, group, device):
    """A rank without tokens passes an empty tensor of its own, which requires no grad; its backward takes part nevertheless."""
    layer = make_layer(group, device, trainable=True)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    grads = []
    for without in (torch.empty(0, HIDDEN, device=device, requires_grad=True), torch.empty(0, HIDDEN, device=device)):
        mine = x if rank == 0 else without
        mine.grad = None
        layer.zero_grad()
        layer(mine).square().sum().backward()
        grads.append((mine.grad, layer.gate.weight.grad))
    (one, one_gate), (other, other_gate) = grads
    assert torch.equal(one_gate, other_gate)
    assert torch.equal(one, other) if rank == 0 else other is None


def check_ranks_that_differ_in_gradients(rank, group, device):
    """A backward that only some ranks run would wait for ever: all of them say so, in the forward."""
    message = r"on all ranks of process_group or on none: those of the ranks \[0\] do, those of the ranks \[1\] do not"
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    ids, weights = torch.tensor([[0, 7]] * 3, device=device), torch.ones(3, 2, device=device)
    layers = [make_layer(group, device, trainable=trainable, router=None) for trainable in (False, True)]
    for layer in layers:
        for wanting in ("x", "weights"):
            wants = {"x": x, "weights": weights}
            if rank == 0:
                wants[wanting] = wants[wanting].clone().requires_grad_()
            with pytest.raises(ValueError, match=message):
                layer(wants["x"], expert_ids=ids, expert_weights=wants["weights"])
            # Without a backward to come they need not agree.
            with torch.no_grad():
                y = layer(wants["x"], expert_ids=ids, expert_weights=wants["weights"])
            assert torch.equal(y, layer(x, expert_ids=ids, expert_weights=weights))
        # One rank wants that of x, another that of the weights: both take part in the backward.
        wants = [one.clone().requires_grad_(rank == index) for index, one in enumerate((x, weights))]
        layer(wants[0], expert_ids=ids, expert_weights=wants[1]).square().sum().backward()
        assert [one.grad is not None for one in wants] == [rank == 0, rank == 1]
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert not layers[0].resident.is_pinned_before(1), "a forward that was refused pins its version"
    with torch.enable_grad() if rank == 0 else torch.no_grad(), pytest.raises(ValueError, match=message):
        layers[0](x.clone().requires_grad_(), expert_ids=ids, expert_weights=weights)


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"gradient of {name}: {text}")


@torch.no_grad()
def check_shared_pool(group, device):
    pool = make_pool(
        2, HIDDEN, INTERMEDIATE, EXPERTS, num_redundant_experts=2, num_ranks=2, num_shadow_slots=1, device=device
    )
    assert pool.num_slots == 2 * 5 + 1
    for seed in (1, 2):
        layer = make_layer(group, device, seed=seed, num_redundant_experts=2, pool=pool)
        alone = make_layer(None, device, seed=seed)
        rank = dist.get_rank(group)
        expected = own_rows(alone(all_tokens(2, 3, device)), rank, 3)
        assert torch.equal(layer(tokens(rank, 3, device)), expected)


def check_range_scope(rank, num_ranks, group, device):
    layer = make_layer(group, device, num_redundant_experts=2, num_experts=6, seed=3)
    full = layer.state_dict()
    assert full["experts.gate_up_proj"].shape == (6, 2 * INTERMEDIATE, HIDDEN)
    layer.experts.state_dict_scope = "range"
    mine = layer.state_dict()
    first, last = 6 * rank // num_ranks, 6 * (rank + 1) // num_ranks
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert torch.equal(mine[name], full[name][first:last]), name
    assert torch.equal(mine["gate.weight"], full["gate.weight"])

    other = make_layer(group, device, num_redundant_experts=4, num_experts=6, seed=4)
    other.experts.state_dict_scope = "range"
    wrong = {name: tensor[:2] for name, tensor in full.items()}
    with pytest.raises(RuntimeError, match=r"size mismatch .* \(2, .*\) in .* but \(3, .*\) or \(6, .*\)"):
        other.load_state_dict(wrong)
    for state in (mine, full):
        give_unit_scale(other, seed=5)
        other.load_state_dict(state)
        other.experts.state_dict_scope = "all"
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, full[name]), name
        assert_replicas_are_equal(other, full)


def check_another_ranks_range(rank, group, device):
    """A file that rank 0 has saved has the right shapes for all ranks."""
    for trainable in (False, True):
        layer = make_layer(group, device, trainable=trainable, seed=3)
        layer.experts.state_dict_scope = "range"
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        files = [file.getvalue()]
        dist.broadcast_object_list(files, src=0, group=group)
        state = torch.load(io.BytesIO(files[0]), map_location=device)
        other = make_layer(group, device, trainable=trainable, seed=4)
        other.experts.state_dict_scope = "range"
        half = EXPERTS // 2
        if not trainable:  # of all experts, cut to this rank's: what the metadata says is as it was
            layer.experts.state_dict_scope = "all"
            cut = layer.state_dict()
            for name in layer.experts.state_dict():
                cut[f"experts.{name}"] = cut[f"experts.{name}"][rank * half : (rank + 1) * half]
            other.load_state_dict(cut)
            mine = other.experts.state_dict()
            assert all(torch.equal(tensor, cut[f"experts.{name}"]) for name, tensor in mine.items())
        before = other.experts.state_dict()
        if rank == 0:  # loading is collective
            continue
        message = f"experts: the state dict is of another rank, with the experts 0 to {half - 1}, and this rank's are {half} to"
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.experts.state_dict().items())


def check_saving_alone(rank, group, device):
    """A rank that has its range saves it without the others; one that needs them says which did not come."""
    layer = make_layer(group, device, seed=3)
    full = layer.state_dict()
    layer.experts.state_dict_scope = "range"
    if rank == 0:
        mine = layer.state_dict()
        assert torch.equal(mine["experts.down_proj"], full["experts.down_proj"][: len(mine["experts.down_proj"])])
    layer.experts.state_dict_scope, layer.experts.state_dict_timeout = "all", 0.3
    dist.barrier(group)
    if rank == 0:
        with pytest.raises(TimeoutError, match=r"state_dict\(\) is collective here, .* 0.3 s the ranks \[1\] did not"):
            layer.state_dict()
    dist.barrier(group)
    layer.experts.state_dict_timeout = 60.0
    for _ in range(4):  # it is as if that call had not been
        assert all(torch.equal(tensor, full[name]) for name, tensor in layer.state_dict().items())


def check_load_experts(rank, group, device):
    """All replicas on all ranks, when every rank is given the same."""
    layer, other = (make_layer(group, device, num_redundant_experts=2, seed=seed) for seed in (3, 4))
    new = other.state_dict()
    layer.load_experts({e: {name: new[f"experts.{name}"][e] for name in ("gate_up_proj", "down_proj")} for e in (0, 7)})
    state = layer.state_dict()
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert torch.equal(state[name][[0, 7]], new[name][[0, 7]]) and not torch.equal(state[name][1], new[name][1])
    assert_replicas_are_equal(layer, state)


def check_given_ids(rank, group, device):
    layer, alone = (make_layer(one, device, router=None) for one in (group, None))
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(5, HIDDEN, generator=random).to(device)
    ids = torch.tensor([[0, 7], [-1, 3], [-1, -1], [EXPERTS, 5], [2**32 + 1, 4]], device=device)
    weights = torch.rand(5, 2, generator=random).to(device)
    weights[2] = float("nan")  # of nothing
    results = []
    for one in (layer, alone):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        with torch.no_grad():
            y = one(x, expert_ids=ids, expert_weights=weights)
        with_grad = one(leaves[0], expert_ids=ids, expert_weights=leaves[1])
        assert torch.equal(y, with_grad) and y.isfinite().all() and not y[2].any()
        with_grad.square().sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert results[0][2][0].all() and not results[0][2][2].any()


def check_ddp(rank, group, device):
    """DDP takes parameters for copies: experts of other ranks must not be overwritten in silence."""
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)

    def model(**options):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(HIDDEN, HIDDEN, device=device), make_layer(group, device, **options))

    serving = model()
    before, y = serving[1].state_dict(), serving(x).detach()
    wrapped = DistributedDataParallel(serving)
    assert torch.equal(wrapped(x), y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in serving[1].state_dict().items())

    for around in (False, True):  # DDP wraps the layer itself, or a model around it
        trained = model(trainable=True) if around else make_layer(group, device, trainable=True)
        layer = trained[1] if around else trained
        names = ignore_in_ddp(trained)
        assert layer.experts.gradient_divisor is None
        prefix = "1." if around else ""
        assert names == [f"{prefix}experts.down_proj", f"{prefix}experts.gate_up_proj"]
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        y = trained(x).detach()
        wrapped = DistributedDataParallel(trained)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
        assert torch.equal(wrapped(x), y)
        assert layer.experts.gradient_divisor == 2
        wrapped(x).square().sum().backward()
        gate = layer.gate.weight.grad.clone()
        dist.broadcast(gate, 0, group=group)
        assert torch.equal(gate, layer.gate.weight.grad), "the router's gradient is averaged"
        own = layer.experts.down_proj.grad.clone()
        dist.broadcast(own, 0, group=group)
        assert rank == 0 or not torch.equal(own, layer.experts.down_proj.grad), "the experts' gradient is their own"

    DistributedDataParallel(make_layer(group, device, trainable=True))(x)  # wrapped itself, it has said so itself
    forgotten = DistributedDataParallel(model(trainable=True))
    with pytest.raises(
        RuntimeError, match=r"has overwritten the experts.*Call moe_layer.ignore_in_ddp\(model\) before"
    ):
        forgotten(x)
    copies = [dist.new_group([one]) for one in range(2)][rank]  # each rank has all experts, and a copy on each is right
    same = DistributedDataParallel(make_layer(copies, device, trainable=True), process_group=group)
    same(x).sum().backward()


def check_seeds(rank, group, device):
    """Ranks whose random states differ make equal layers: rank 0's decides."""
    torch.manual_seed(77 + rank)
    layer = MoELayer(**SIZES, num_redundant_experts=2, process_group=group, device=device)
    layer.experts.state_dict_scope = "all"
    torch.manual_seed(77)
    alone = MoELayer(**SIZES, device=device)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


def check_starts(rank, num_ranks, group, device):
    """First tokens of all ranks for one expert do not all go to one replica: each rank begins elsewhere on the circle."""
    layer = MoELayer(**SIZES, num_redundant_experts=2, process_group=group, device=device)
    starts = [None] * num_ranks
    dist.all_gather_object(starts, layer.experts.rank_start, group=group)
    assert starts[rank] == layer.experts.rank_start and len(set(starts)) == num_ranks


def check_kept_loss(group, device):
    """A version is held while a backward may come, not as long as somebody keeps the loss."""
    layer = make_layer(group, device)
    loss = layer(torch.ones(3, HIDDEN, device=device, requires_grad=True)).sum()
    for retain, held in ((True, 1), (False, 0)):
        assert sum(layer.resident.held_by(1).values()) == 1, "a backward may come"
        loss.backward(retain_graph=retain)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert sum(layer.resident.held_by(1).values()) == held


def check_states_between_rank_counts(rank, num_ranks, group, device):
    """1 → 4 → 2 → 1 ranks, with other numbers of replicas."""
    pair = dist.new_group([0, 1])
    alone = make_layer(None, device, seed=5)
    state = alone.state_dict()
    four = make_layer(group, device, num_redundant_experts=8, seed=6)
    four.load_state_dict(state)
    assert_replicas_are_equal(four, state)
    saved = four.state_dict()
    if rank < 2:
        two = make_layer(pair, device, num_redundant_experts=2, seed=7)
        two.load_state_dict(saved)
        assert_replicas_are_equal(two, state)
        saved = two.state_dict()
    last = make_layer(None, device, seed=8)
    last.load_state_dict(saved)
    for name, tensor in last.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def check_other_group(rank, device):
    """A controller over other ranks than the layer's, though equally many."""
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    layer = make_layer(rows[rank // 2], device)
    with pytest.raises(ValueError, match="process_group"):
        EplbController(process_group=columns[rank % 2]).register(layer)


def check_copies(rank, group, device):
    """Two groups of two ranks share experts, under DDP over all four: nothing would keep the copies equal."""
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    layer = make_layer(rows[rank // 2], device, trainable=True)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    others = [[2, 3], [0, 1]][rank // 2]
    wrapped = DistributedDataParallel(layer, process_group=group)
    with pytest.raises(RuntimeError, match=rf"over ranks that do not share the experts, \{others}: they hold copies"):
        wrapped(x)
    with pytest.raises(ValueError, match=rf"mesh must have no ranks but .* got also \{others}: they hold copies"):
        ignore_in_fsdp(layer)
    for ignore in (ignore_in_ddp, ignore_in_fsdp):
        with pytest.raises(ValueError, match="gradient_divisor must be None or a number above 0, got 0"):
            ignore(layer, gradient_divisor=0)
    ignore_in_ddp(layer, gradient_divisor=4)  # who reduces them says so
    wrapped(x).sum().backward()
    assert ignore_in_fsdp(layer, gradient_divisor=3) == set(layer.experts.parameters())
    own = layer.experts.down_proj.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(own * 4, layer.experts.down_proj.grad * 3)


def assert_replicas_are_equal(layer, state):
    for expert, slots in layer.resident.live_slots().items():
        for slot in slots:
            for name in ("gate_up_proj", "down_proj"):
                weight = layer.resident.pool.tensors[name][slot]
                assert torch.equal(weight, state[f"experts.{name}"][expert]), f"expert {expert} in slot {slot}"


def check_export(rank, group, device):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.export needs all experts on one rank"):
        torch.export.export(make_layer(group, device), (torch.randn(6, HIDDEN, device=device),), strict=False)


def check_fsdp1(rank, group, device):
    """`FullyShardedDataParallel` does not ask either, and says nothing: the experts look at what they are given."""
    if device.type != "cpu":  # gloo does not gather a GPU's parameters
        return
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)
    for trainable, use_orig_params in ((False, True), (True, False), (True, True)):
        options = {"device_id": device, "use_orig_params": use_orig_params}

        def model(trainable=trainable):
            torch.manual_seed(0)
            layer = make_layer(group, device, trainable=trainable)
            return nn.Sequential(nn.Linear(HIDDEN, HIDDEN, device=device), layer)

        whole = model()
        y = whole(x).detach()
        ignored = ignore_in_fsdp(whole)
        z = FullyShardedDataParallel(whole, ignored_states=list(ignored), **options)(x)
        assert torch.equal(z, y)
        z.square().sum().backward()
        assert all(parameter.grad is not None for parameter in ignored) and len(ignored) == 2 * trainable
        if trainable:
            with pytest.raises(
                RuntimeError, match=r"FullyShardedDataParallel has mixed experts\.gate_up_proj.*ignored_states"
            ):
                FullyShardedDataParallel(model(), **options)(x)


def check_fsdp2(rank, group, device):
    """FSDP2 takes parameters for copies too. Serving experts are none; those of other ranks must not be mixed in silence."""
    if device.type != "cpu":  # gloo does not gather a GPU's parameters
        return
    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(device)

    def model(**options):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(HIDDEN, HIDDEN, device=device), make_layer(group, device, **options))

    serving = model()
    y = serving(x).detach()
    fully_shard(serving, mesh=mesh)
    sharded = serving(x)
    assert torch.equal(sharded, y)
    sharded.square().sum().backward()
    assert serving[0].weight.grad is not None

    trained = model(trainable=True)
    y = trained(x).detach()
    with pytest.raises(
        RuntimeError, match=r"experts.gate_up_proj cannot be sharded over the ranks \[0, 1\], which hold"
    ):
        fully_shard(model(trainable=True), mesh=mesh)
    fully_shard(trained, mesh=mesh, ignored_params=ignore_in_fsdp(trained, mesh))
    sharded = trained(x)
    assert torch.equal(sharded, y)
    sharded.square().sum().backward()
    assert trained[1].experts.down_proj.grad is not None and trained[1].gate.weight.grad is not None
