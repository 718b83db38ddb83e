"""What the package's other functions and classes refuse: a `ValueError` names the argument, its value or kind, and the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moe_layer import (
    Activation,
    MoELayer,
    Quantisation,
    RouterRule,
    TrainingBalancer,
    TrainingState,
    ignore_in_ddp,
    ignore_in_fsdp,
    load_experts_from,
    make_pool,
    quantisation_of,
    quantize_experts,
    save_experts_to,
)
from moe_layer.arguments import is_number
from moe_layer.training import (
    abandon_step,
    clip_grad_norm,
    load_balancing_loss,
    no_sync,
    route,
    router_z_loss,
    update_correction_bias,
)

LOGITS, IDS = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int32)
BIAS_E, LOAD_E = torch.zeros(4), torch.zeros(4, dtype=torch.int64)


def make(**options) -> MoELayer:
    return MoELayer(16, 8, 4, 2, **options)


def trained() -> MoELayer:
    return make(trainable=True)


def in_forward(*arguments, **options):
    return lambda: make()(*arguments, **options)


NO_MODULE = "is a NoneType: must be a Module"
REFUSED = {
    "x": (in_forward(None), "x is a NoneType: must be a Tensor"),
    "x as a list": (in_forward([1.0]), "x is a list: must be a Tensor"),
    "token_mask": (in_forward(torch.zeros(1, 16), [True]), "token_mask is a list: must be a Tensor"),
    "weights": (lambda: make().load_experts(None), "weights is a NoneType: must be a Mapping"),
    "weights of one": (lambda: make().load_experts({1: None}), "weights of expert 1 is a NoneType: must be a Mapping"),
    "shared": (lambda: make_pool(1, 16, 8, 4, shared="no"), "shared must be True or False, got 'no'"),
    "config": (lambda: RouterRule.from_config({"a": 1}), "config must be of a transformers model, got {'a': 1}"),
    "Activation.name": (lambda: Activation("relu"), "activation must be one of 'silu', 'gelu', 'gelu_tanh', 'relu2'"),
    "Activation.gated": (lambda: Activation("silu", gated="no"), "Activation.gated must be True or False, got 'no'"),
    "Activation.limit": (lambda: Activation("silu", limit=-1.0), "Activation.limit must be a finite number above 0"),
    "Activation.alpha": (lambda: Activation("silu", alpha=None), "Activation.alpha must be a finite number, got None"),
    "zero_points": (lambda: Quantisation("int4", zero_points=1), "zero_points must be True or False, got 1"),
    "quantize_experts": (lambda: quantize_experts(None, "int4"), f"model {NO_MODULE}"),
    "load_experts_from": (lambda: load_experts_from(None, "."), f"model {NO_MODULE}"),
    "save_experts_to": (lambda: save_experts_to(None, "."), f"model {NO_MODULE}"),
    "folder to load": (lambda: load_experts_from(make(), None), "folder must be a local folder, got None"),
    "folder to save": (lambda: save_experts_to(make(), None), "folder must be a local folder, got None"),
    "folder": (lambda: quantisation_of(3), "folder must be a local folder, got 3"),
    "TrainingBalancer": (lambda: TrainingBalancer(None, None), f"model {NO_MODULE}"),
    "TrainingState": (lambda: TrainingState(None, []), f"model {NO_MODULE}"),
    "optimizers": (lambda: TrainingState(trained(), None), "optimizers is a NoneType: must be a Optimizer or Iterable"),
    "an optimizer": (lambda: TrainingState(trained(), [1]), "optimizers is a int: must be a Optimizer"),
    "balancer": (lambda: TrainingState(trained(), [], "x"), "balancer is a str: must be a TrainingBalancer"),
    "ignore_in_ddp": (lambda: ignore_in_ddp(None), f"model {NO_MODULE}"),
    "gradient_divisor": (
        lambda: ignore_in_ddp(trained(), gradient_divisor="2"),
        "gradient_divisor must be None or a number above 0, got '2'",
    ),
    "mesh": (lambda: ignore_in_fsdp(trained(), "all"), "mesh is a str: must be a DeviceMesh"),
    "layer": (lambda: route(None, LOGITS), "layer is a NoneType: must be a Module"),
    "router_logits": (lambda: load_balancing_loss(None, IDS), "router_logits is a NoneType: must be a Tensor"),
    "expert_ids": (lambda: load_balancing_loss(LOGITS, None), "expert_ids is a NoneType: must be a Tensor"),
    "mask": (lambda: router_z_loss(LOGITS, [1, 1, 0]), "mask is a list: must be a Tensor"),
    "bias": (lambda: update_correction_bias(None, LOAD_E, 0.1), "bias is a NoneType: must be a Tensor"),
    "load": (lambda: update_correction_bias(BIAS_E, None, 0.1), "load is a NoneType: must be a Tensor"),
    "rate": (lambda: update_correction_bias(BIAS_E, LOAD_E, "0.1"), "rate must be a finite number of at least 0, got"),
    "max_norm": (lambda: clip_grad_norm(trained(), None), "max_norm and norm_type must be numbers, got None and 2.0"),
    "parameters": (lambda: clip_grad_norm(None, 1.0), "model is a NoneType: must be a Iterable"),
    "a parameter": (lambda: clip_grad_norm([1, 2], 1.0), "a parameter is a int: must be a Tensor"),
    "no_sync": (lambda: no_sync(None).__enter__(), f"model {NO_MODULE}"),
    "abandon_step": (lambda: abandon_step(None), f"model {NO_MODULE}"),
    "timeout": (lambda: abandon_step(nn.Linear(1, 1), timeout=-1), "timeout must be a finite number above 0, got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    if name.startswith("folder to"):
        pytest.importorskip("safetensors")
        pytest.importorskip("tqdm")
    with pytest.raises(ValueError) as refusal:
        call()
    assert message in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_state_dict_of_quantised_weights_alone_is_refused(dtype):
    """Their scales are elsewhere, so as floats these numbers would mean nothing. Floats are cast."""
    layer = make()
    state = layer.state_dict()
    before = state["experts.down_proj"].clone()
    with pytest.raises(RuntimeError, match="only floats of 16 bits or more are cast"):
        layer.load_state_dict(state | {"experts.down_proj": torch.ones(4, 16, 8).to(dtype)})
    assert torch.equal(layer.state_dict()["experts.down_proj"], before)
    layer.load_state_dict(state | {"experts.down_proj": torch.ones(4, 16, 8, dtype=torch.float64)})
    assert (layer.state_dict()["experts.down_proj"] == 1).all()


def test_a_state_dict_of_no_tensors_is_refused():
    with pytest.raises(ValueError, match=r"experts\.down_proj is a NoneType: must be a Tensor"):
        make().load_state_dict({"experts.down_proj": None}, strict=False)


def test_numbers_of_numpy_and_what_can_be_gone_through_are_taken():
    model = trained()
    optimizer = torch.optim.SGD(model.parameters())
    given = [optimizer]
    state = TrainingState(model, {"all": optimizer}.values())
    assert state.optimizers == given and TrainingState(model, given).optimizers is not given
    assert is_number(np.float32(7)) and is_number(np.int64(2)) and not is_number(10**400) and not is_number(True)
