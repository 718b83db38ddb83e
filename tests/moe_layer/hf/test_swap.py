"""`swap_experts`: what it refuses, what it leaves, memory, gradients, layouts, several ranks."""

from __future__ import annotations

import copy
import tempfile
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")

from eplb import Placement, load_placements, save_placements
from moe_layer import make_pool
from moe_layer.hf import load_experts_from, register_experts_implementation, swap_experts, unswap_experts
from moe_layer.hf.fuse import find_top_k
from moe_layer.hf.inspect import is_on_interface
from moe_layer.hf.layout import Layout
from tests.distributed import distributed
from tests.moe_layer.hf.models import families, make_model, make_tokens
from tests.moe_layer.ranks import DEADLINE, everybody, make_controller
from tests.moe_layer.test_max_tokens import Turns


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def experts_of(model: nn.Module, layer: int = 0) -> nn.Module:
    return model.get_submodule(f"model.layers.{layer}.mlp.experts")


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_report(device, capsys):
    report = swap_experts(make_model("mixtral", device=device))
    assert list(report.swapped) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"] and not report.left
    assert str(report) == (
        "swapped 2 of 2 blocks of experts\n  2 of 8 experts, silu gated, 32 × 24, float32\n  routing fused in 2 of them"
    )
    assert capsys.readouterr().out == f"{report}\n"


class _Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def _no_forward(model):
    experts = experts_of(model)
    experts.forward = experts.forward


def _hook(model):
    experts_of(model).register_forward_hook(lambda *_: None)


def _clamped(model):
    """An own gate under the old activation's name: what a check by name would let pass."""
    experts = experts_of(model)
    experts._apply_gate = lambda gate_up: torch.nn.functional.silu(gate_up[:, :24].clamp(max=9.5)) * gate_up[:, 24:]


def _other_activation(model):
    experts_of(model).act_fn = _Doubled()


def _learned_activation(model):
    experts = experts_of(model)
    experts.act_fn = nn.SiLU()
    experts.act_fn.register_parameter("slope", nn.Parameter(torch.ones(1)))


def _post_norm(model):
    experts_of(model).has_post_expert_norm = True


def _expert_parallel(model):
    experts_of(model)._is_expert_parallel = True


def _float64(model):
    experts_of(model).double()


def _two_dtypes(model):
    experts_of(model).down_proj.data = experts_of(model).down_proj.data.half()


def _tied(model):
    experts_of(model).down_proj = experts_of(model, 1).down_proj


def _meta(model):
    model.model.layers[0].mlp.to("meta")  # so that nothing says where its experts would go


def _no_interface(model):
    del experts_of(model).has_gate


def _too_few(model):
    experts_of(model).num_experts = 7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_forward, "its forward was replaced on the instance"),
        (_hook, "it has hooks"),
        (_clamped, "its _apply_gate computes none"),
        (_other_activation, "its _apply_gate computes none of the activations that we know .act_fn: _Doubled"),
        (_learned_activation, "its parameters and buffers must be .*are .*act_fn.slope"),
        (_post_norm, "has_post_expert_norm=True"),
        (_expert_parallel, "transformers' own expert parallelism"),
        (_float64, "must be float32, float16 or bfloat16, is torch.float64"),
        (_two_dtypes, "must have one dtype"),
        (_tied, "also those of another module"),
        (_meta, "on the device meta: load the weights before the swap"),
        (_no_interface, "a MixtralExperts is not on transformers' experts interface"),
        (_too_few, "must have num_experts=7 rows"),
    ],
)
def test_a_module_is_judged_by_what_it_is(change, reason):
    model = make_model("mixtral")
    change(model)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*model\.layers\.0\.mlp\.experts: .*" + reason):
        swap_experts(model)
    assert dict(model.named_modules()) == before
    report = swap_experts(model, strict=False)
    assert "model.layers.0.mlp.experts" in report.left
    assert len(report.swapped) == (0 if change is _tied else 1)


def test_what_is_no_model_is_refused(tmp_path):
    for call in (
        lambda: swap_experts(None),
        lambda: unswap_experts(None),
        lambda: load_experts_from(None, tmp_path),
        lambda: register_experts_implementation(nn.Linear(1, 1)),
    ):
        with pytest.raises(
            ValueError, match=r"model is a NoneType: must be a Module|model must be a transformers model or None"
        ):
            call()


def test_other_refusals(device):
    model = make_model("mixtral", device=device)
    wrong = {
        "pool": {"pool": "mine"},
        "num_shadow_slots": {"num_shadow_slots": -1},
        "num_redundant_experts": {"num_redundant_experts": 1},  # on one rank
        "fuse_routing": {"fuse_routing": "yes"},
        "trainable must be True or False, got 1": {"trainable": 1},
        "strict must be True or False, got 'no'": {"strict": "no"},
        "count_padding must be True or False, got None": {"count_padding": None},
        "placements is a int: must be a Sequence": {"placements": 3},
        "backend": {"backend": "cublas"},
        "num_shadow_slots does not go with trainable": {"trainable": True, "num_shadow_slots": 1},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            swap_experts(model, **options)
    with pytest.raises(ValueError, match="it has no experts"):
        swap_experts(nn.Linear(2, 2))
    assert str(swap_experts(nn.Linear(2, 2), strict=False)) == "swapped 0 of 0 blocks of experts"
    whole = experts_of(model)
    with pytest.raises(ValueError, match="model: it is the whole model: give a module around it"):
        swap_experts(whole)
    assert whole.down_proj.numel() > 0
    swap_experts(model)
    with pytest.raises(ValueError, match="it is swapped already"):
        swap_experts(model)
    with pytest.raises(ValueError, match="model is a block's experts: must be a module around them"):
        unswap_experts(experts_of(model))
    with pytest.raises(ValueError, match=r"hidden_states must be \[..., 32\]"):
        experts_of(model)(torch.zeros(3, 31, device=device), *[torch.zeros(3, 2, device=device)] * 2)
    with pytest.raises(ValueError, match="top_k_index must"):
        experts_of(model)(torch.zeros(3, 32, device=device), *[torch.zeros(3, 2, device=device)] * 2)


@pytest.mark.parametrize("family", families(["mixtral", "aria_text"]))  # aria's matrices are transposed
def test_there_and_back(family, device):
    model, tokens = make_model(family, device=device), make_tokens(device)
    before, weights = logits_of(model, tokens), {name: one.clone() for name, one in model.state_dict().items()}
    originals, parameters = experts_of(model), [experts_of(model).gate_up_proj, experts_of(model).down_proj]
    swap_experts(model)
    assert all(one.numel() == 0 for one in parameters), "the old weights still take memory"
    assert not any(".experts." in name for name, _ in model.named_parameters())
    assert unswap_experts(model) == 2 and unswap_experts(model) == 0
    assert experts_of(model) is originals and experts_of(model).down_proj is parameters[1]
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert torch.equal(logits_of(model, tokens), before)


@pytest.mark.parametrize("family", families(["aria_text"]))
def test_unswap_brings_new_weights(family, device):
    model, other, tokens = make_model(family), make_model(family, seed=1), make_tokens()
    swap_experts(model)
    model.load_state_dict(other.state_dict())
    assert_near(logits_of(model, tokens), logits_of(other, tokens))
    expert = {"gate_up_proj": torch.ones(32, 48), "down_proj": torch.full((24, 32), 0.5)}
    experts_of(model).load_experts({3: expert})
    unswap_experts(model)
    assert torch.equal(experts_of(model).gate_up_proj[3], expert["gate_up_proj"])
    assert torch.equal(experts_of(model).down_proj[3], expert["down_proj"])
    assert torch.equal(experts_of(model).down_proj[2], experts_of(other).down_proj[2])
    swap_experts(model)
    with pytest.raises(ValueError, match=r"gate_up_proj of expert 3 must be a tensor of shape \(48, 32\)"):
        experts_of(model).load_experts({3: {"gate_up_proj": torch.ones(48)}})
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.experts\.down_proj"):
        model.load_state_dict({**other.state_dict(), "model.layers.0.mlp.experts.down_proj": torch.ones(3)})


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_layouts(is_transposed, is_interleaved):
    """gate rows 0, 1; up rows 10, 11; each of 3 columns."""
    layout = Layout(is_transposed, is_interleaved)
    ours = torch.tensor([0.0, 1.0, 10.0, 11.0])
    stored = torch.tensor([0.0, 10.0, 1.0, 11.0]) if is_interleaved else ours
    matrix, stored_matrix = (
        ours[:, None] + torch.tensor([0.0, 0.1, 0.2]),
        stored[:, None] + torch.tensor([0.0, 0.1, 0.2]),
    )
    stored_matrix = stored_matrix.T if is_transposed else stored_matrix
    for name, mine, theirs in (("gate_up_proj", matrix, stored_matrix), ("gate_up_proj_bias", ours, stored)):
        for front in ((), (2,)):
            mine_, theirs_ = mine.expand(*front, *mine.shape), theirs.expand(*front, *theirs.shape)
            assert torch.equal(layout.to_ours(name, theirs_), mine_)
            assert torch.equal(layout.to_stored(name, mine_), theirs_) and layout.to_stored(name, mine_).is_contiguous()
    down = torch.randn(5, 3, 2)
    assert torch.equal(layout.to_ours("down_proj", down), down.transpose(1, 2) if is_transposed else down)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("family", families(["qwen3_moe", "aria_text"]))
def test_gradients(family, trainable, device):
    model, tokens = make_model(family, device=device), make_tokens(device)
    twin = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    swap_experts(model, trainable=trainable)
    for one in (model, twin):
        one(tokens, labels=tokens, use_cache=False).loss.backward()
    wanted = {name: one.grad for name, one in twin.named_parameters()}
    found = {name: one.grad for name, one in model.named_parameters()}
    assert wanted.keys() - found.keys() == (set() if trainable else {name for name in wanted if ".experts." in name})
    assert all((found[name] is None) == (wanted[name] is None) for name in found)
    for name, gradient in found.items():
        if family == "aria_text" and ".experts." in name:  # in our layout
            gradient = gradient.transpose(1, 2)
        elif trainable:
            assert dict(model.named_parameters())[name] is parameters[name], "an optimizer holds other parameters"
        if gradient is not None:
            assert (gradient - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max().clamp(min=1e-3), name
    saved = model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in twin.state_dict().items())
    assert unswap_experts(model) == 2
    assert all(torch.equal(one, twin.state_dict()[name]) for name, one in model.state_dict().items())


def test_as_a_module(device):
    """Casts, copies, compiled whole, checkpointed, under autocast."""
    model, tokens = make_model("qwen3_moe", device=device), make_tokens(device)
    before = logits_of(model, tokens)
    swap_experts(model)
    assert_near(logits_of(copy.deepcopy(model), tokens), before)
    assert_near(logits_of(torch.compile(model, backend="aot_eager", fullgraph=True), tokens), before)
    model.gradient_checkpointing_enable()
    model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    model.eval()
    with torch.autocast(device, torch.bfloat16):
        after = logits_of(model, tokens)
    assert (after.float() - before).abs().max() < 0.1 * before.abs().max()
    model.bfloat16()
    assert experts_of(model).dtype == torch.bfloat16
    assert (logits_of(model, tokens).float() - before).abs().max() < 0.1 * before.abs().max()


def test_ids_that_name_no_expert(device):
    """transformers' sentinel E and our -1 are computed nowhere, and their weights have no gradient."""
    model = make_model("mixtral", device=device)
    swap_experts(model)
    x = torch.randn(2, 32, device=device)
    weights = torch.tensor([[0.5, 2.0], [3.0, 0.25]], device=device, requires_grad=True)
    some = experts_of(model)(x, torch.tensor([[1, 8], [-1, 2]], device=device), weights)
    alone = [experts_of(model)(x[t : t + 1], torch.tensor([[e]], device=device), torch.tensor([[w]], device=device))
             for t, e, w in ((0, 1, 0.5), (1, 2, 0.25))]  # fmt: skip
    torch.testing.assert_close(some, torch.cat(alone))
    some.sum().backward()
    assert ((weights.grad != 0) == torch.tensor([[True, False], [False, True]], device=device)).all()


def test_pools(device):
    tokens = make_tokens(device)
    for options, pools, slots in (
        ({}, 2, 8),
        ({"num_shadow_slots": 3}, 1, 19),
        ({"num_shadow_slots": 3, "pool": "own"}, 2, 11),
        ({"pool": make_pool(2, 32, 24, 8, num_shadow_slots=1, device=device)}, 1, 17),
    ):
        model = make_model("mixtral", device=device)
        before = logits_of(model, tokens)
        swap_experts(model, **options)
        found = {id(experts_of(model, layer).pool): experts_of(model, layer).pool for layer in (0, 1)}
        assert len(found) == pools and {one.num_slots for one in found.values()} == {slots}
        assert_near(logits_of(model, tokens), before)
    with pytest.raises(ValueError, match="pool holds"):
        swap_experts(make_model("mixtral", device=device), pool=make_pool(2, 32, 16, 8, device=device))


def test_max_tokens(device):
    """The layers refuse more; a dispatcher is told of it, and takes as many turns as it asks for."""
    model, tokens = make_model("mixtral", device=device), make_tokens(device, (2, 6))
    before = logits_of(model, tokens)
    for wrong in (0, -1, True, 2.5, "12"):
        with pytest.raises(ValueError, match=f"max_tokens must be an integer of at least 1, got {wrong!r}"):
            swap_experts(model, max_tokens=wrong)
    assert torch.equal(logits_of(model, tokens), before)
    dispatcher = Turns(8)
    for options in ({}, {"dispatcher": dispatcher}, {"trainable": True}):
        swap_experts(model, max_tokens=12, **options)
        assert_near(logits_of(model, tokens), before)
        with pytest.raises(
            ValueError, match=r"hidden_states has 13 tokens, more than the max_tokens=12 that swap_experts"
        ):
            logits_of(model, make_tokens(device, (1, 13)))
        assert unswap_experts(model) == 2
    assert dispatcher.turns == [(8, 8), (4, 4)] * 2


@pytest.mark.parametrize(("family", "top_k"), [("minimax_m2", 2), ("deepseek_v2:groups", 3), ("aria_text", 2)])
def test_how_many_experts_a_token_has(family, top_k):
    for model in (make_model(family), make_model(family, torch.bfloat16), make_model(family, device="meta")):
        for one in model.modules():
            if is_on_interface(one):
                assert find_top_k(model, one, one.down_proj.dtype) == top_k
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: x
    found = find_top_k(model, experts_of(model), torch.float32)
    assert found == "the experts of its block are not given ids and weights"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_shadow_slots": 1}], ids=["own pools", "one pool"])
def test_memory_at_the_peak(options):
    """No more than the model and one block of experts."""
    model = make_model("mixtral", device="cuda")
    logits_of(model, make_tokens("cuda", (1, 2)))  # cuBLAS takes 33 MiB for itself with the first product of a process
    experts = [experts_of(model, layer) for layer in (0, 1)]
    for one in experts:  # so that they are nearly all of the model
        one.gate_up_proj = nn.Parameter(torch.randn(8, 1024, 512, device="cuda"))
        one.down_proj = nn.Parameter(torch.randn(8, 512, 512, device="cuda"))
        one.hidden_dim, one.intermediate_dim = 512, 512
    block = sum(parameter.nbytes for parameter in experts[0].parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    swap_experts(model, **options)
    assert torch.cuda.max_memory_allocated() <= before + 1.1 * block
    assert torch.cuda.memory_allocated() <= before + 0.3 * block


@distributed(num_ranks=2)
def test_two_ranks_with_relocation(rank, num_ranks, group, device):
    tokens = make_tokens(str(device), (2, 5 + 3 * rank))
    twin, model = make_model("qwen3_moe", device=str(device)), make_model("qwen3_moe", device=str(device))
    report = swap_experts(model, group, num_redundant_experts=2)
    assert len(report.swapped) == 2
    pool = experts_of(model).pool
    assert pool is experts_of(model, 1).pool and pool.num_slots == 2 * 5 + 4
    expected = logits_of(twin, tokens)
    controller = make_controller(group, [model], num_redundant_experts=2)
    deadline, flips = time.monotonic() + DEADLINE, 0
    while not everybody(flips >= 4, group, device):
        assert time.monotonic() < deadline, controller.health()
        assert_near(logits_of(model, tokens), expected)
        controller.step()
        flips = experts_of(model).resident.current.number
    with pytest.raises(RuntimeError, match=r"close\(\) it first"):
        unswap_experts(model)
    saved = model.state_dict()  # all experts, wherever they are now
    assert all(torch.equal(saved[name].to(device), tensor) for name, tensor in twin.state_dict().items())
    controller.close()
    dist.barrier(group)
    unswap_experts(model)
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("pool", ["shared", "own"])
@distributed(num_ranks=2)
def test_blocks_start_from_a_file(rank, num_ranks, group, device, pool):
    tokens = make_tokens(str(device), (2, 5 + 3 * rank))
    twin, model = make_model("qwen3_moe", device=str(device)), make_model("qwen3_moe", device=str(device))
    placements = [
        Placement(np.array([[7, 6, 5, 4, 0], [3, 2, 1, 0, 7]]), 8),
        Placement(np.array([[0, 2, 4, 6, 1], [1, 3, 5, 7, 0]]), 8),
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_placements(f"{folder}/file", placements)
        saved = load_placements(f"{folder}/file")
    with pytest.raises(ValueError, match="placements has 1 layers: the model has 2 blocks"):
        swap_experts(model, group, num_redundant_experts=2, placements=saved[:1])
    with pytest.raises(ValueError, match=r"placements\[0\] is of 8 .* with 5 .*, but the layer has 8 .* with 4 "):
        swap_experts(model, group, placements=saved)
    expected = logits_of(twin, tokens)
    assert torch.equal(logits_of(model, tokens), expected)  # refused: unchanged
    swap_experts(model, group, num_redundant_experts=2, placements=saved, pool=pool)
    for layer, placement in enumerate(placements):
        current = experts_of(model, layer).resident.current.placement
        np.testing.assert_array_equal(current.compact(), placement.compact())
    assert_near(logits_of(model, tokens), expected)
    saved_state = model.state_dict()
    assert all(torch.equal(saved_state[name].to(device), tensor) for name, tensor in twin.state_dict().items())
