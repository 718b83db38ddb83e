"""What `save_load_trace()` writes is what was routed, and what the simulator reads."""

import numpy as np
import pytest
import torch
from torch import nn

from eplb import EplbConfig, EplbController
from eplb.simulate.traces import load_trace
from moe_layer import MoELayer


def make_controller(*num_experts, **options):
    layers = nn.ModuleList([MoELayer(8, 4, count, 2) for count in num_experts])
    config = EplbConfig(step_interval=4, window_size=4, window_samples=2, use_async=False, **options)
    controller = EplbController(config)
    controller.register(layers)
    return controller, layers


def test_a_trace_is_what_was_routed(tmp_path):
    controller, layers = make_controller(6, 6, load_trace_windows=2)
    assert controller.save_load_trace(tmp_path / "early.npz") == 0
    assert not (tmp_path / "early.npz").exists()
    counts = []
    with torch.no_grad():
        for _ in range(12):
            for layer in layers:
                layer(torch.randn(5, 8))
            counts.append(torch.stack([layer.resident.load_E for layer in layers]).numpy().copy())
            controller.step()
    assert (
        controller.save_load_trace(tmp_path / "trace.npz") == 4
    )  # two windows of two; the first of three is forgotten
    expected = np.diff(np.stack(counts)[[3, 5, 7, 9, 11]], axis=0)
    assert np.array_equal(load_trace(tmp_path / "trace.npz").load_BLE, expected)
    assert expected.sum() == 8 * 2 * 5 * 2


def test_layers_of_different_sizes_make_no_trace(tmp_path):
    controller, _ = make_controller(6, 4)
    with pytest.raises(ValueError, match=r"equally many experts, got \[4, 6\]"):
        controller.save_load_trace(tmp_path / "trace.npz")
