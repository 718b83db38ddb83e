"""All steps of a forward: which kernels run where: Triton's or the PyTorch references, with TMA or without."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton

# Fixed when Triton's decorators run, that is when this package is imported; setting it later changes nothing.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Compute capability, major. Blackwell has TMA too, but whether its products keep equal bits for all variants is not known.
_TMA_ARCHITECTURES = (9,)


def resolve_backend(backend: str, device: torch.device | str) -> Literal["triton", "torch"]:
    """The implementation that `backend` means on `device`.

    Args:
        backend: "auto" is "triton" on CUDA and "torch" elsewhere; "torch" runs anywhere; "triton" runs on CUDA, and on
            a CPU only in Triton's interpreter (`TRITON_INTERPRET=1`, set before this package is imported).
        device: where the tensors are.

    Raises:
        ValueError: unknown `backend`, or "triton" where it can't run (it is never replaced silently).
    """
    device_type = (device if isinstance(device, torch.device) else torch.device(device)).type
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if device_type == "cuda" else "torch"
    if backend == "triton":
        if device_type == "cuda" or (device_type == "cpu" and INTERPRETED):
            return "triton"
        raise ValueError(
            f'backend="triton" can\'t run on device type "{device_type}": Triton kernels need CUDA, or a CPU with '
            "TRITON_INTERPRET=1 set before moe_kernels is imported"
        )
    raise ValueError(f'backend={backend!r}: must be "auto", "triton" or "torch"')


@functools.cache  # asked at each launch
def has_tma(device: torch.device) -> bool:
    """Whether the TMA kernels are for this device: Hopper. The CPU's interpreter runs Triton's too, but gains nothing."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] in _TMA_ARCHITECTURES
