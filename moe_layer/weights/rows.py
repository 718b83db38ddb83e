"""Loading, saving and quantising: joins and turns the rows of matrices, of any dtype."""

from collections.abc import Sequence

import torch


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` along the rows, byte for byte where elements are bytes: it does not know fp8 on every device."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(tensors))
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors]).view(dtype)


def deinterleaved(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Every other of `dim`, and then the rest: 0 1 2 3 becomes 0 2 1 3."""
    dim = dim % tensor.dim()
    return tensor.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def interleaved(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The reverse: the two halves of `dim` take turns."""
    dim = dim % tensor.dim()
    return tensor.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
