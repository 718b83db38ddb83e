import pytest
import torch

from moe_kernels.base import backend
from moe_kernels.base.backend import resolve_backend


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ("auto", "cpu", "torch"),
        ("auto", "cuda", "triton"),
        ("auto", torch.device("cuda", 3), "triton"),
        ("torch", "cuda", "torch"),
        ("torch", "cpu", "torch"),
        ("triton", "cuda:1", "triton"),
    ],
)
def test_resolution(asked, device, expected):
    assert resolve_backend(asked, device) == expected


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert resolve_backend("triton", "cpu") == "triton"
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("triton", "cpu")


@pytest.mark.parametrize(("asked", "device"), [("cuda", "cpu"), ("", "cpu"), ("triton", "meta")])
def test_refused(asked, device):
    with pytest.raises(ValueError, match="backend="):
        resolve_backend(asked, device)
