"""`torch.export` of a layer: the program has the layer's outputs and, if it is trainable, its gradients."""

import pytest
import torch

from moe_layer import MoELayer
from tests.moe_layer.reference import give_unit_scale


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_an_exported_layer_computes_the_same(trainable, strict, device):
    layer = give_unit_scale(MoELayer(32, 16, 8, 2, trainable=trainable, device=device))
    shapes = ({0: torch.export.Dim("tokens", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(
            layer, (torch.randn(5, 32, device=device),), dynamic_shapes=shapes, strict=strict
        ).module()
        for num_tokens in (2, 5, 33):
            x = torch.randn(num_tokens, 32, device=device)
            assert torch.equal(program(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_exported_layer_trains(recompute, strict, device):
    layer = give_unit_scale(MoELayer(32, 16, 8, 2, trainable=True, recompute=recompute, device=device))
    x = torch.randn(5, 32, device=device)
    program = torch.export.export(layer, (x,), strict=strict).module()
    direction, grads = torch.randn(5, 32, device=device), []
    for one in (layer, program):
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(one(leaf), [leaf, *one.parameters()], direction)
        names = ["x", *(name for name, _ in one.named_parameters())]
        grads.append(dict(zip(names, found, strict=True)))
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-6 * grad.abs().max().item())
