"""Parameters: a serving layer's experts are none, a trainable layer's are ordinary ones."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector, parametrize, prune

from moe_layer import MoELayer, make_pool
from tests.moe_layer.reference import give_unit_scale


def make_layer(device: str, **options) -> MoELayer:
    return give_unit_scale(MoELayer(16, 8, 4, 2, device=device, **options))


# ---- a serving layer


def test_nothing_in_pytorch_sees_the_slots(device):
    layer = make_layer(device, router="minimax_m2")
    assert [name for name, _ in layer.named_parameters()] == ["gate.weight"]
    assert [name for name, _ in layer.named_buffers()] == ["gate.e_score_correction_bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = torch.randn(5, 16, device=device)
    y = layer(x)
    assert not y.requires_grad
    layer.experts.apply(lambda module: [nn.init.zeros_(parameter) for parameter in module.parameters()])
    assert torch.equal(layer(x), y)


def test_what_is_put_in_the_place_of_weights_is_refused_and_not_ignored(device):
    layer = make_layer(device)
    x = torch.randn(5, 16, device=device)
    y = layer(x)
    down = torch.zeros(4, 16, 8, device=device)
    for replace in (
        lambda: setattr(layer.experts, "down_proj", nn.Parameter(down)),
        lambda: setattr(layer.experts, "down_proj", down),
        lambda: torch.func.functional_call(layer, {"experts.down_proj": down}, x),
    ):
        with pytest.raises(RuntimeError, match="down_proj cannot be set: the weights of a serving layer live in slots"):
            replace()
    assert not hasattr(layer.experts, "down_proj")
    with pytest.raises(AttributeError, match=r"down_proj cannot be read here: .* live in slots.*state_dict\(\)"):
        prune.l1_unstructured(layer.experts, "down_proj", 0.5)
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrize.register_parametrization(layer.experts, "down_proj", nn.Identity())
    assert torch.equal(layer(x), y)


def test_the_gate_can_be_trained_alone(device):
    layer = make_layer(device)
    layer.requires_grad_()  # of the experts there is nothing to set
    layer(torch.randn(5, 16, device=device)).square().sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    weight = -layer.gate.weight.detach()
    x = torch.randn(5, 16, device=device)
    with torch.no_grad():
        expected = layer(x, router_logits=-layer.gate(x))
        torch.testing.assert_close(torch.func.functional_call(layer, {"gate.weight": weight}, x), expected)


# ---- a trainable layer


def test_as_fast_and_as_right_as_a_serving_layer(device):
    """Its kernels read the parameters; the same bits with and without gradients, and as from slots."""
    layer, serving = make_layer(device, trainable=True), make_layer(device)
    x = torch.randn(12, 16, device=device)
    with torch.no_grad():
        assert torch.equal(layer(x), serving(x))
    assert torch.equal(layer(x), serving(x.clone().requires_grad_()))
    assert torch.equal(layer.resident.load_E, serving.resident.load_E)
    assert layer.experts.matrices().down_SHI is layer.experts.down_proj


def test_parameters_are_ordinary(device, poison):
    layer = make_layer(device, trainable=True)
    parameters = list(layer.parameters())
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in parameters)
    vector = parameters_to_vector(parameters)
    assert vector.isfinite().all() and len(vector) == sum(tensor.numel() for tensor in layer.state_dict().values())
    layer(torch.randn(5, 16, device=device)).sum().backward()
    assert nn.utils.clip_grad_norm_(parameters, 1e-3).isfinite()
    assert torch.cat([parameter.grad.flatten() for parameter in parameters]).norm() < 2e-3


def test_weight_decay_acts_once_on_each_layer(device):
    """Two layers in one model, as two in one pool were one parameter twice."""
    with pytest.raises(ValueError, match=r"pool=.* does not go with trainable=True"):
        MoELayer(16, 8, 4, 2, device=device, trainable=True, pool=make_pool(2, 16, 8, 4, device=device))
    model = nn.ModuleList([make_layer(device, trainable=True) for _ in range(2)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sum(0 * layer(torch.ones(4, 16, device=device)).sum() for layer in model).backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0).step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, 0.9 * before[name])


def test_other_memory_behind_a_parameter(device):
    layer = make_layer(device, trainable=True)
    x = torch.randn(5, 16, device=device)
    y = layer(x).detach()
    layer.experts.down_proj.data = layer.experts.down_proj.data * 2
    torch.testing.assert_close(layer(x), 2 * y)
    twins = make_layer(device, trainable=True), make_layer(device)
    for twin in twins:
        twin.load_state_dict(layer.state_dict())
    for same in (*twins, copy.deepcopy(layer)):
        torch.testing.assert_close(same(x), 2 * y)
    layer.experts.down_proj = nn.Parameter(layer.experts.down_proj.detach() * 2)
    torch.testing.assert_close(layer(x), 4 * y)


def test_gradients_go_to_main_grads_where_there_are_any(device):
    """As Megatron keeps them; the router's and the input's go where they always go."""
    layer, twin = make_layer(device, trainable=True), make_layer(device, trainable=True)
    down = layer.experts.down_proj
    down.main_grad = torch.zeros(down.shape, device=device)
    x = torch.randn(5, 16, device=device)
    for one in (layer, layer, twin):
        one(x).square().sum().backward()
    assert down.grad is None
    torch.testing.assert_close(down.main_grad, 2 * twin.experts.down_proj.grad)
    for ours, theirs in (
        (layer.gate.weight, twin.gate.weight),
        (layer.experts.gate_up_proj, twin.experts.gate_up_proj),
    ):
        torch.testing.assert_close(ours.grad, 2 * theirs.grad)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="adds_to_main_grads=True: must be False"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recomputing_changes_no_bit_and_keeps_less(backend, trainable, device):
    """Beside the output, x in the place of the pre-activation is all that a backward is given."""
    x = torch.randn(6, 16, device=device)
    found, kept = [], []
    for recompute in (False, True):
        layer = make_layer(device, trainable=trainable, backend=backend, recompute=recompute)
        leaf = x.clone().requires_grad_()
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, shapes=shapes: (shapes.append(tensor.shape), tensor)[1], lambda tensor: tensor
        ):
            y = layer(leaf)
        y.square().sum().backward()
        grads = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
        assert len(grads) == (3 if trainable else 0)
        found.append([y.detach(), leaf.grad, *grads])
        kept.append(shapes)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    pre = torch.Size([6 * 2, 2 * 8])
    assert pre in kept[0] and pre not in kept[1]


def test_functional_call_and_parametrizations(device):
    layer = make_layer(device, trainable=True)
    x = torch.randn(5, 16, device=device)
    y = layer(x).detach()
    doubled = (2 * layer.experts.down_proj.detach()).requires_grad_()
    torch.func.functional_call(layer, {"experts.down_proj": doubled}, x).sum().backward()
    assert doubled.grad.abs().sum() > 0

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layer.experts, "down_proj", Double())
    torch.testing.assert_close(layer(x), 2 * y)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), 2 * y)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.double(),
        lambda w: w[:, 1:],
        lambda w: w[:, :, 1:],
        lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
        lambda w: w.to("meta"),
        lambda w: w[1:],
    ],
)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_weights_that_do_not_fit_are_refused(num_tokens, name, change, device):
    layer = make_layer(device, trainable=True)
    replaced = {f"experts.{name}": change(layer.experts.get_parameter(name).detach())}
    x = torch.randn(num_tokens, 16, device=device)
    with torch.no_grad(), pytest.raises(ValueError, match=r"must|give it memory"):
        torch.func.functional_call(layer, replaced, x)


def test_copies_and_casts_are_parameters_too(device):
    layer = make_layer(device, trainable=True)
    layer(torch.randn(5, 16, device=device))
    other = copy.deepcopy(layer).half()
    assert [(name, one.dtype) for name, one in other.named_parameters()] == [
        ("gate.weight", torch.float16),
        ("experts.gate_up_proj", torch.float16),
        ("experts.down_proj", torch.float16),
    ]
    assert other.resident.load_E.sum() == 10
    x = torch.randn(5, 16, device=device)
    y = layer(x)
    other(x.half()).sum().backward()
    assert other.experts.down_proj.grad is not None and layer.experts.down_proj.grad is None
    assert layer.resident.load_E.sum() == 20 == other.resident.load_E.sum()
    assert torch.equal(layer(x), y)


def test_assigned_and_loaded_weights(device):
    layer, other = make_layer(device, trainable=True), MoELayer(16, 8, 4, 2, device=device, trainable=True)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(5, 16, device=device)
    assert torch.equal(layer(x), other(x))
    new = make_layer(device, trainable=True)
    give_unit_scale(new, seed=5)
    layer.load_experts({expert: {"down_proj": new.experts.down_proj[expert]} for expert in range(4)})
    layer.load_experts({expert: {"gate_up_proj": new.experts.gate_up_proj[expert]} for expert in range(4)})
    layer.gate.load_state_dict(new.gate.state_dict())
    assert torch.equal(layer(x), new(x)) and layer.experts.down_proj.requires_grad


@pytest.fixture
def one_rank(tmp_path, device):
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("meta", [False, True])
def test_fsdp2(meta, one_rank, device):
    twin = make_layer(device, trainable=True)
    state = twin.state_dict()
    layer = MoELayer(16, 8, 4, 2, device="meta" if meta else device, trainable=True)
    mesh = dist.device_mesh.init_device_mesh(device, (1,))
    model = fully_shard(nn.Sequential(fully_shard(layer, mesh=mesh)), mesh=mesh)
    if meta:
        layer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.to_local().copy_(state[name])
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (model, twin)]
    for seed in range(3):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)).to(device)
        model(x).square().sum().backward()
        twin(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), twin.get_parameter(name))


def test_fsdp2_of_the_experts_alone_says_what_to_shard(one_rank, device):
    layer = make_layer(device, trainable=True)
    fully_shard(layer.experts, mesh=dist.device_mesh.init_device_mesh(device, (1,)))
    with pytest.raises(ValueError, match="must be a plain tensor in the forward, got a DTensor: shard the layer"):
        layer(torch.randn(5, 16, device=device))
