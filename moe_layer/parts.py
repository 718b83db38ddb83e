"""How a layer looks at its parts in each forward: as they are now, whatever was put in their places, and quickly."""

from typing import Any

import torch
from torch import nn


def part(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` of a parameter, submodule or buffer, without the half microsecond after which nn.Module finds it.

    Nothing is remembered: what has been replaced is seen, as is a plain attribute or a property in its place.
    """
    if name in module.__dict__ or hasattr(type(module), name):
        return getattr(module, name)
    if name in module._parameters:
        return module._parameters[name]
    if name in module._modules:
        return module._modules[name]
    if name in module._buffers:
        return module._buffers[name]
    return getattr(module, name)


def is_call_changed(module: nn.Module) -> bool:
    """Whether to call the module is more, or other, than its class's `forward`."""
    everywhere = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or "forward" in module.__dict__
    )


def fits(tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> bool:
    return tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device and tensor.is_contiguous()
