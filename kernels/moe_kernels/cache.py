"""What L2 should keep and what it should let go, as Triton's eviction policies. Both limits were measured on an H200.

Weights that stream through would push out what the next kernel is about to read, and dirty lines that must then be
written first. (Triton has no policy for loads by TMA; so what is to be read soon is written as worth keeping.)
"""

from __future__ import annotations

import torch

from moe_kernels.integers import next_power_of_2

# Weights up to this size replace each other, and not what was there before; more of them take longer so.
_MOST_TO_STREAM = 256 << 20  # bytes
# An output up to this size is kept until it has been read; larger ones gain nothing.
_MOST_TO_KEEP = 24 << 20  # bytes, of the 50 to 60 MB that a Hopper GPU's L2 holds


def policy_of_weights(num_bytes: int) -> str:
    """For weights that are read once."""
    return "evict_first" if num_bytes <= _MOST_TO_STREAM else ""


def policy_of_output(output: torch.Tensor) -> str:
    """For rows that the next kernel reads.

    By the next power of two of their number, where the tiles change too: kernels are compiled for a policy, so it should
    not change between batches of like size.
    """
    rows, columns = output.shape
    num_bytes = next_power_of_2(rows) * columns * output.element_size()
    return "evict_last" if num_bytes <= _MOST_TO_KEEP else ""
