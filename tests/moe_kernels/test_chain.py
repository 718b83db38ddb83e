"""All ops in a row, as the layer uses them: numerics, gradients, torch.compile, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import (
    SHARE_BITS,
    ExpertMatrices,
    LoadCounter,
    ReplicaTable,
    RoutingRule,
    build_schedule,
    combine,
    expert_down,
    expert_rows,
    expert_up,
    gemm_config,
    gradient_configs,
    select_replicas,
    topk_routing,
)
from moe_kernels.base import scan

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 11, 5, 2, 24, 20
SLOTS = 8  # lane l is in slot (3 * l + 1) % 8; experts 0 and 1 have two replicas
LANES = [0, 5, 1, 6, 2, 3, 4]
EXPERT_OF_LANE = [0, 1, 2, 3, 4, 0, 1]
GRADIENT_CONFIGS = {
    dtype: gradient_configs(HIDDEN, INTERMEDIATE, dtype, TOKENS, TOP_K, EXPERTS)
    for dtype in (torch.float32, torch.bfloat16)
}


def chain(x, logits, mask, gate_up, down, lane_to_slot, table, count, increment, config, backend="auto"):
    weights, ids = topk_routing(logits, TOP_K, RoutingRule(), token_mask_T=mask, backend=backend)
    offsets, lanes, cumulative = table
    replicas, load = ReplicaTable(lanes, lane_to_slot, offsets, cumulative), LoadCounter(count, increment)
    lanes, counts = select_replicas(ids, replicas, load, 12345, num_lanes=lane_to_slot.numel(), backend=backend)
    schedule = build_schedule(lanes.view(-1), counts, block_m=config.block_m, backend=backend)
    matrices = ExpertMatrices(gate_up, down)
    if torch.is_grad_enabled() and x.requires_grad:
        return expert_rows(
            x, matrices, lane_to_slot, schedule, weights.view(-1),
            fanout=TOP_K, configs=(config, config), gradient_configs=GRADIENT_CONFIGS[x.dtype], combine_into=lanes,
            backend=backend,
        )  # fmt: skip
    hidden = expert_up(x, matrices, lane_to_slot, schedule, fanout=TOP_K, config=config, backend=backend)
    rows = expert_down(hidden, matrices, lane_to_slot, schedule, weights.view(-1), config=config, backend=backend)
    return combine(rows, lanes, backend=backend)


def arguments(device, dtype=torch.float32, requires_grad=False, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    gate_up = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5
    down = normal(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5
    lane_to_slot = [(3 * lane + 1) % SLOTS for lane in range(len(EXPERT_OF_LANE))]
    in_slot = [EXPERT_OF_LANE[lane_to_slot.index(slot)] if slot in lane_to_slot else 0 for slot in range(SLOTS)]
    one = 1 << SHARE_BITS

    def int32(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    floats = [tensor.to(device, dtype) for tensor in (normal(TOKENS, HIDDEN), gate_up[in_slot], down[in_slot])]
    logits = normal(TOKENS, EXPERTS).to(device)
    for tensor in (*floats, logits):
        tensor.requires_grad_(requires_grad)
    x, gate_up_SNH, down_SHI = floats
    mask = torch.ones(TOKENS, dtype=torch.bool, device=device)
    mask[-2:] = False
    return {
        "x": x,
        "logits": logits,
        "mask": mask,
        "gate_up": gate_up_SNH,
        "down": down_SHI,
        "lane_to_slot": int32(lane_to_slot),
        "table": (int32([0, 2, 4, 5, 6, 7]), int32(LANES), int32([one // 3, one, one // 2, one, one, one, one])),
        "count": torch.zeros(EXPERTS, dtype=torch.int64, device=device),
        "increment": torch.ones(1, dtype=torch.int64, device=device),
        "config": gemm_config(2 * INTERMEDIATE, HIDDEN, dtype, TOKENS, TOP_K, EXPERTS),
    }


def dense(x, logits, mask, gate_up, down):
    """float64, without slots: every expert of every token."""
    lane_to_slot = [(3 * lane + 1) % SLOTS for lane in range(EXPERTS)]  # the first five lanes are the five experts
    weights, ids = logits.softmax(-1).topk(TOP_K)
    weights = weights / weights.sum(-1, keepdim=True) * mask[:, None]
    total = 0
    for k in range(TOP_K):
        slot = torch.tensor(lane_to_slot, device=x.device)[ids[:, k]]
        gate, up = torch.einsum("tnh,th->tn", gate_up[slot], x).chunk(2, dim=1)
        total = total + torch.einsum("thi,ti->th", down[slot], F.silu(gate) * up) * weights[:, k, None]
    return total


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward(device, assert_close, dtype, backend):
    inputs = arguments(device, dtype)
    y = chain(**inputs, backend=backend)
    exact = [inputs[name].double() for name in ("x", "logits", "mask", "gate_up", "down")]
    assert_close(y, dense(*exact), scale=2)
    assert (y[-2:] == 0).all()
    assert inputs["count"].sum() == (TOKENS - 2) * TOP_K


def test_forward_of_many_rows(small_chunks, device):
    """Choice and schedule in chunks: the same bits and counts as in one launch."""
    in_chunks, inputs = arguments(device, torch.bfloat16), arguments(device, torch.bfloat16)
    y = chain(**in_chunks, backend="triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "MANY_KEYS", 1 << 30)
        assert torch.equal(y, chain(**inputs, backend="triton"))
    assert torch.equal(in_chunks["count"], inputs["count"])


def test_on_meta_only_shapes_are_computed():
    inputs = arguments("meta", torch.bfloat16)
    y = chain(**inputs)
    assert y.is_meta and y.shape == (TOKENS, HIDDEN) and y.dtype == torch.bfloat16
    lanes = inputs["lane_to_slot"]
    schedule = build_schedule(lanes, lanes, block_m=inputs["config"].block_m)
    matrices = ExpertMatrices(inputs["gate_up"], inputs["down"])
    hidden = expert_up(inputs["x"][:7], matrices, lanes, schedule, fanout=1, config=inputs["config"])
    assert hidden.is_meta and hidden.shape == (7, INTERMEDIATE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients(device, assert_close, backend):
    inputs = arguments(device, requires_grad=True)
    y = chain(**inputs, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(upstream)
    names = ("x", "logits", "gate_up", "down")
    exact = {name: inputs[name].detach().double().requires_grad_() for name in names}
    dense(mask=inputs["mask"], **exact).backward(upstream.double())
    for name in ("x", "logits"):
        assert_close(inputs[name].grad, exact[name].grad, scale=4)
    for name in ("gate_up", "down"):  # replicas share the gradient of their expert
        for expert in range(EXPERTS):
            lanes = [lane for lane, of in enumerate(EXPERT_OF_LANE) if of == expert]
            slots = [(3 * lane + 1) % SLOTS for lane in lanes]
            assert_close(inputs[name].grad[slots].sum(0), exact[name].grad[slots].sum(0), scale=4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(device, backend):
    """The tensors' own dtypes decide, in the forward and where its backward runs inside the context too."""

    def run(enabled):
        inputs = arguments(device, requires_grad=True)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled):
            y = chain(**inputs, backend=backend)
            y.square().sum().backward()
        return y, *(inputs[name].grad for name in ("x", "logits", "gate_up", "down"))

    for plain, under_autocast in zip(run(False), run(True), strict=True):
        assert under_autocast.dtype == torch.float32
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize(
    ("compiler", "backend", "requires_grad"),
    [
        ("inductor", "auto", True),
        ("aot_eager", "torch", True),
        ("aot_eager", "triton", True),  # the host code of the CUDA path, on any machine
        ("aot_eager", "triton", False),
    ],
)
def test_compiles_as_one_graph(device, assert_close, compiler, backend, requires_grad):
    torch.compiler.reset()
    eager, compiled = (arguments(device, requires_grad=requires_grad) for _ in range(2))
    expected = chain(**eager, backend=backend)
    y = torch.compile(chain, fullgraph=True, backend=compiler)(**compiled, backend=backend)
    assert torch.equal(y, expected)
    assert torch.equal(compiled["count"], eager["count"])
    if not requires_grad:
        return
    expected.square().sum().backward()
    y.square().sum().backward()
    for name in ("x", "logits", "gate_up", "down"):
        assert_close(compiled[name].grad, eager[name].grad, scale=4)


def test_compiles_for_any_number_of_tokens(device):
    """Dynamic shapes: the second size is not a new graph."""
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 7, 9):
        few, same = arguments(device), arguments(device)
        for inputs in (few, same):
            for name in ("x", "logits", "mask"):
                inputs[name] = inputs[name][:tokens].clone()
        with torch.compiler.set_stance("fail_on_recompile" if tokens > 4 else "default"):
            y = compiled(**few)
        assert torch.equal(y, chain(**same))


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(device):
    """Capture with one input, replay with others, and with experts that moved to other slots in between."""
    static = arguments(device, torch.bfloat16)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        chain(**static, backend="triton")
    torch.cuda.current_stream().wait_stream(warm_up)
    static["count"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(**static, backend="triton")
    count = torch.zeros_like(static["count"])
    for seed in range(1, 4):
        other = arguments(device, torch.bfloat16, seed=seed)
        order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed)).to(device)
        for name in ("x", "logits"):
            static[name].copy_(other[name])
        for name in ("gate_up", "down"):
            static[name].copy_(other[name][order])
        static["lane_to_slot"].copy_(order.argsort()[other["lane_to_slot"].long()])
        graph.replay()
        expected = chain(**(other | {"count": count}), backend="triton")
        assert torch.equal(y, expected)
        assert torch.equal(static["count"], count)
