"""A swap changes nothing that a user of the model sees, in every family of transformers that can be made tiny."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from moe_layer.hf import load_experts_from, swap_experts
from tests.moe_layer.hf.models import (
    FAMILIES,
    FUSED_SINCE,
    NO_CACHE,
    NOT_FUSED,
    REFUSED,
    VERSION,
    families,
    make_model,
    make_tokens,
    relative,
    without_experts,
)

# Of the largest logit, in float32: only the order of sums differs.
TOLERANCE = 1e-5


@pytest.mark.parametrize("family", families([one for one in FAMILIES if one not in REFUSED]))
def test_all_stays_as_it_was(family, tmp_path, device):
    model, tokens = make_model(family, device=device), make_tokens(device)
    options = {"use_cache": False}
    if getattr(model.config, "output_router_logits", None) is not None:
        options["output_router_logits"] = True
    with torch.no_grad():
        before = model(tokens, **options)
        greedy = {"max_new_tokens": 5, "do_sample": False, "use_cache": family not in NO_CACHE}
        told = model.generate(tokens[:1], **greedy)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report = swap_experts(model)
        after = model(tokens, **options)
        assert report.swapped and not report.left
        if family in FUSED_SINCE and FUSED_SINCE[family] > VERSION:
            assert report.not_fused and not report.fused
        elif family in NOT_FUSED:
            assert report.not_fused and all(NOT_FUSED[family] in reason for reason in report.not_fused.values())
        else:
            assert report.fused.keys() == report.swapped.keys() and not report.not_fused
        assert relative(after.logits, before.logits) <= TOLERANCE
        router_logits = getattr(before, "router_logits", None) or ()
        assert len(getattr(after, "router_logits", None) or ()) == len(router_logits)
        for one, other in zip(getattr(after, "router_logits", None) or (), router_logits, strict=True):
            assert relative(one, other) <= TOLERANCE
        if getattr(before, "aux_loss", None) is not None:
            torch.testing.assert_close(after.aux_loss, before.aux_loss)
        assert torch.equal(model.generate(tokens[:1], **greedy), told)

        saved = model.state_dict()
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval().to(device)
        assert relative(again(tokens, **options).logits, before.logits) <= TOLERANCE
        lean = without_experts(again, tmp_path, device)
        swap_experts(lean)
        load_experts_from(lean, tmp_path, progress=False)
        assert relative(lean(tokens, **options).logits, before.logits) <= TOLERANCE


@pytest.mark.parametrize("family", families(list(REFUSED)))
def test_what_is_not_understood_is_refused_before_anything_changes(family, device):
    model, tokens = make_model(family, device=device), make_tokens(device)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=REFUSED[family]) as raised:
        swap_experts(model)
    assert "nothing was changed" in str(raised.value) and "strict=False" in str(raised.value)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        report = swap_experts(model, strict=False)
        assert report.left and any(REFUSED[family] in reason for reason in report.left.values())
        assert relative(model(tokens, use_cache=False).logits, before) <= TOLERANCE


NATIVE = (
    "deepseek_v3:groups",
    "gpt_oss",
    "mixtral",
    "nemotron_h",
    "minimax_m3_vl_text",
    "deepseek_v2:groups",
    "aria_text",
)
NATIVE += ("glm4_moe", "olmoe", "gemma4_text")  # with qwen3_moe


def per_token(found, expected):
    """The median over tokens of the relative error: where a near tie of a router falls otherwise, one token is far off."""
    found, expected = found.float().flatten(0, -2), expected.float().flatten(0, -2)
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def embedding_grads(model, tokens):
    """The gradient of the loss for each token's embedding; none reaches the last one, after which nothing is predicted."""
    kept = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    loss = model(tokens, labels=tokens, use_cache=False).loss
    hook.remove()
    (embedded,) = kept
    (grad,) = torch.autograd.grad(loss, embedded)
    return grad[:, :-1]


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", *[pytest.param(*one.values, marks=[*one.marks, pytest.mark.gpu]) for one in families(list(NATIVE))]],
)
def test_whole_models_in_bfloat16(family, device, tmp_path):
    """By Triton, natively where there is a GPU: as near to float32 as the model in bfloat16 is, saved and read again."""
    exact, model = make_model(family, device=device), make_model(family, torch.bfloat16, device)
    tokens = make_tokens(device, (2, 3 if device == "cpu" else 9))
    twin = make_model(family, torch.bfloat16, device)
    swap_experts(model, backend="triton")
    with torch.no_grad():
        expected, theirs, ours = (one(tokens, use_cache=False).logits for one in (exact, twin, model))
        assert ours.dtype == theirs.dtype  # nemotron_h's logits are float32
        assert per_token(ours, expected) <= 1.5 * per_token(theirs, expected) + 5e-3
        assert per_token(ours, theirs) <= 3e-2
        saved = model.state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in twin.state_dict().items())
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval().to(device)
        assert all(torch.equal(saved[name], tensor) for name, tensor in again.state_dict().items())
        if device == "cpu":  # the interpreter takes seconds for what follows
            return
        if family not in NO_CACHE:
            greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
            told = model.generate(tokens, **greedy)
            assert told.shape == (2, 17) and torch.equal(model.generate(tokens, **greedy), told)
    expected, theirs, ours = (embedding_grads(one, tokens) for one in (exact, twin, model))
    # A token's gradient has the errors of all that follow. Gemma 4's own are 6 % in bfloat16, those of the others 1 to 3 %.
    assert per_token(ours, expected) <= 3 * per_token(theirs, expected) + 5e-3


@pytest.mark.parametrize(
    "family",
    families(
        [
            *("aria_text", "deepseek_v3:groups", "deepseek_v4", "gemma4_text", "gpt_oss", "minimax_m3_vl_text"),
            *("mixtral", "nemotron_h", "qwen3_moe"),
        ]
    ),
)
def test_the_kernels_in_bfloat16(family, device):
    """Every expert format by Triton, natively where there is a GPU: experts alone, as a whole model may route otherwise."""
    model = make_model(family, torch.bfloat16, device)
    report = swap_experts(model, fuse_routing=False, backend="triton")
    name = next(iter(report.swapped))
    random = torch.Generator().manual_seed(3)
    inner = report.swapped[name].format.hidden_size
    original = make_model(family, torch.bfloat16, device).get_submodule(name)
    for num_tokens in (1, 20):
        x = 3 * torch.randn(num_tokens, inner, generator=random).to(device, torch.bfloat16)
        ids = torch.rand(num_tokens, 8, generator=random).topk(2).indices.to(device)
        weights = torch.rand(num_tokens, 2, generator=random).to(device)
        with torch.no_grad():
            expected = original(x, ids, weights.to(x.dtype))
            found = model.get_submodule(name)(x, ids, weights)
        assert relative(found.float(), expected.float()) <= 2e-2
