"""The two grouped GEMMs of an expert, by one name."""

from moe_kernels.expert_down import expert_down, expert_down_torch
from moe_kernels.expert_up import expert_up, expert_up_torch

__all__ = ["expert_down", "expert_down_torch", "expert_up", "expert_up_torch"]
