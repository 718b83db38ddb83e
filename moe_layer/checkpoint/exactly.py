"""Saving: a cast that rounds nothing."""

import torch

from moe_layer.checkpoint.folder import CheckpointError


def exactly(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` cast to `dtype`.

    Raises:
        CheckpointError: that changes a value.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise CheckpointError(
            f"{tensor.dtype} values cannot be saved as {dtype}, as the checkpoint has them, without rounding"
        )
    return cast
