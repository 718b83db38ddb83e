"""Fused routing: which rule a router has is found by trying it; a router that we do not have goes on as it did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from moe_kernels.routing import routing
from moe_layer import RouterRule
from moe_layer.hf import swap_experts, unswap_experts
from moe_layer.hf.routing import NotFusedError, find_routing
from tests.moe_layer.hf.models import make_config, make_model, make_tokens
from tests.moe_layer.hf.test_swap import assert_near, experts_of, logits_of

CHOICE_BIAS = {"score_function": "sigmoid", "correction_bias": True}
RULES = {
    "mixtral": RouterRule(),
    "qwen3_moe": RouterRule(renormalize=False),
    "qwen3_moe:normalized": RouterRule(),
    "gpt_oss": RouterRule(),  # a softmax of the chosen logits
    "deepseek_v2:groups": RouterRule(renormalize=False, num_groups=4, top_groups=2, group_score="max"),
    "deepseek_v3": RouterRule(**CHOICE_BIAS, scale=2.5),
    "deepseek_v3:groups": RouterRule(**CHOICE_BIAS, scale=2.5, num_groups=4, top_groups=2),
    "minimax_m2": RouterRule(**CHOICE_BIAS),  # the bias is the block's
    "ernie4_5_moe": RouterRule(correction_bias=True),
    "lfm2_moe": RouterRule(**CHOICE_BIAS, epsilon=1e-6),
}


@pytest.mark.parametrize("family", list(RULES))
def test_the_rule_of_a_config(family):
    assert RouterRule.from_config(make_config(family)) == RULES[family]


def test_the_rule_of_a_config_in_bfloat16():
    config = make_config("qwen3_moe")
    config.dtype = torch.bfloat16
    assert RouterRule.from_config(config) == RouterRule(renormalize=False, weights_dtype=torch.bfloat16)


def test_a_config_without_a_rule():
    with pytest.raises(ValueError, match=r"PhimoeConfig: model\.layers\.0\.mlp\.experts: .* of no rule"):
        RouterRule.from_config(make_config("phimoe"))
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="LlamaConfig: it has no experts"):
        RouterRule.from_config(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1))


class Gate(nn.Module):
    """A router whose rule is what a test says."""

    def __init__(self, choose, num_experts=8, **tensors) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, 16))
        self.choose, self.scale, self.groups = choose, 3.5, 2
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x, *extra):
        logits = nn.functional.linear(x, self.weight)
        weights, ids = self.choose(self, logits, *extra)
        return logits, weights, ids


def softmax_top2(gate, logits, *extra):
    return logits.softmax(-1).topk(2, -1)


def biased(gate, logits, bias):
    return logits.sigmoid().gather(-1, ids := (logits.sigmoid() + bias).topk(2, -1).indices), ids


def test_a_rule_is_found_by_what_it_does():
    scaled = Gate(
        lambda gate, logits: (lambda top: (top.values * gate.scale, top.indices))(logits.sigmoid().topk(3, -1))
    )
    found = find_routing(scaled, (), torch.float32)
    assert found.rule == RouterRule("sigmoid", False, 3.5) and found.top_k == 3 and found.choice_bias is None
    own_bias = Gate(lambda gate, logits: biased(gate, logits, gate.anything), anything=torch.zeros(1, 8))
    found = find_routing(own_bias, (), torch.float32)
    assert found.rule == RouterRule("sigmoid", False, correction_bias=True) and found.choice_bias == "anything"
    found = find_routing(Gate(biased), (torch.zeros(8),), torch.float32)
    assert found.rule == RouterRule("sigmoid", False, correction_bias=True) and found.choice_bias == 0


@pytest.mark.parametrize(
    ("gate", "extra", "reason"),
    [
        (Gate(lambda gate, logits: logits.softmax(-1).topk(2, -1, largest=False)), (), "of no rule"),
        (Gate(lambda gate, logits: (logits.softmax(-1) * 1.001).topk(2, -1)), (), "of no rule"),
        (Gate(lambda gate, logits: (logits.softmax(-1) ** 2).topk(2, -1)), (), "of no rule"),
        (Gate(lambda gate, logits: logits.tanh().topk(2, -1)), (), "of no rule"),
        # The bias is zero in the model, and would show only after training.
        (Gate(lambda g, logits: (logits.softmax(-1) + g.b).topk(2, -1), b=torch.zeros(8)), (), "of no rule"),
        (Gate(softmax_top2, unused=torch.zeros(3)), (), "which are not biases"),
        (Gate(softmax_top2), (torch.zeros(8, 2),), "which are not biases"),
        (Gate(softmax_top2), (7,), "its call takes 7"),
        (Gate(lambda gate, logits: logits.nonexistent), (), "it raised AttributeError"),
        (Gate(lambda gate, logits: (logits[:1], logits.topk(2, -1).indices)), (), "does not return"),
        (nn.Linear(16, 8, bias=False), (), "does not return"),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), (), "has not one weight"),
    ],
)
def test_others_are_not_taken(gate, extra, reason):
    with pytest.raises(NotFusedError, match=reason):
        find_routing(gate, extra, torch.float32)


def test_scores_that_are_rounded_are_not_ours():
    gate, bias = Gate(biased, num_experts=64), torch.zeros(64)
    assert find_routing(gate, (bias,), torch.float32).rule.correction_bias
    with pytest.raises(NotFusedError, match=r"in torch\.bfloat16 its scores are rounded"):
        find_routing(gate.bfloat16(), (bias,), torch.bfloat16)


@pytest.mark.parametrize("family", ["deepseek_v3:groups", "minimax_m2", "qwen3_moe", "afmoe"])
def test_a_fused_model(family, device):
    """Recorded logits, live biases, training, copies, the way back."""
    model, tokens = make_model(family, device=device), make_tokens(device)
    twin = copy.deepcopy(model)
    report = swap_experts(model, fuse_routing=True)
    gates = [gate for gate in model.modules() if "_fused_routing" in vars(gate)]
    assert len(gates) == len(report.fused) == 2
    fused = copy.deepcopy(model)
    assert_near(logits_of(fused, tokens), logits_of(twin, tokens))
    random = torch.Generator().manual_seed(7)
    state = {  # other biases than those that were probed, after the swap
        name: torch.randn(one.shape, generator=random).to(device) if name.endswith("bias") else one
        for name, one in twin.state_dict().items()
    }
    for one in (model, twin):
        one.load_state_dict(state)
    assert_near(logits_of(model, tokens), logits_of(twin, tokens))
    for one in (model, twin):
        one.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    wanted = dict(twin.named_parameters())
    for name, one in model.named_parameters():
        assert one.grad is None or (one.grad - wanted[name].grad).abs().max() <= 1e-4, name
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    assert_near(logits_of(compiled, tokens), logits_of(twin.eval(), tokens))
    unswap_experts(model)
    assert not any("forward" in vars(one) or "_fused_routing" in vars(one) for one in model.modules())
    assert torch.equal(logits_of(model, tokens), logits_of(twin, tokens))


def test_gradients_of_a_fused_router(device):
    """In evaluation mode too, where the kernel chooses."""
    model, tokens = make_model("deepseek_v3:groups", device=device), make_tokens(device)
    twin = copy.deepcopy(model)
    swap_experts(model)
    for one in (model, twin):
        one(tokens, labels=tokens, use_cache=False).loss.backward()
    found, wanted = (one.model.layers[0].mlp.gate.weight.grad for one in (model, twin))
    assert wanted.abs().max() > 0 and (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_what_is_asked_for(device):
    tokens = make_tokens(device)
    model = make_model("qwen3_moe", torch.bfloat16, device)
    report = swap_experts(model)
    assert not report.fused and all("fuse_routing=True" in reason for reason in report.not_fused.values())
    unswap_experts(model)
    assert len(swap_experts(model, fuse_routing=True).fused) == 2
    unswap_experts(model)
    report = swap_experts(model, fuse_routing=False)
    assert not report.fused and not report.not_fused and "fused" not in str(report)
    phi = make_model("phimoe", device=device)
    before = logits_of(phi, tokens)
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*model\.layers\.0\.mlp\.experts: .*no rule"):
        swap_experts(phi, fuse_routing=True)
    assert hasattr(experts_of(phi), "has_gate") and torch.equal(logits_of(phi, tokens), before)


def test_the_backend_is_resolved_in_each_call(monkeypatch):
    """A model that is swapped on a CPU and moved later: "auto" and "torch" mean what they mean there."""
    heard, resolve = [], routing.resolve_backend
    for backend in ("auto", "torch"):
        model = make_model("qwen3_moe")
        swap_experts(model, backend=backend)
        monkeypatch.setattr(routing, "resolve_backend", lambda *asked: heard.append(asked) or resolve(*asked))
        logits_of(model, make_tokens())
        assert heard == [(backend, torch.device("cpu"))] * 2
        heard.clear()
        monkeypatch.undo()


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True])
def test_a_model_that_moves_to_a_gpu_after_the_swap(trainable, monkeypatch):
    model, tokens = make_model("deepseek_v3:groups"), make_tokens()
    expected = logits_of(model, tokens)
    swap_experts(model, trainable=trainable)
    used = []
    resolve = routing.resolve_backend
    monkeypatch.setattr(routing, "resolve_backend", lambda *asked: used.append(resolve(*asked)) or used[-1])
    for device, kernels in (("cuda", "triton"), ("cpu", "torch")):
        used.clear()
        assert_near(logits_of(model.to(device), tokens.to(device)).cpu(), expected)
        assert used == [kernels] * 2
