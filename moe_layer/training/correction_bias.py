"""An even load without a loss: the bias that a router's choice, but not its weights, goes by.

Legend: E logical experts.
"""

import torch
import torch.distributed as dist

from eplb.groups import check_member
from moe_kernels.base.checks import check_kind
from moe_layer.arguments import is_number
from moe_layer.collectives import all_gather_rows
from moe_layer.layer import MoELayer


@torch.no_grad()
def update_correction_bias(
    bias: torch.Tensor | MoELayer, load: torch.Tensor, rate: float, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Add `rate` to the bias of experts with less load than the mean, take it from those with more; in place.

    bias_e += rate · sign(mean(load) - load_e), once after each optimizer step. Source: arXiv:2408.15664, algorithm 1, where
    `rate` is 0.001; DeepSeek-V3 does the same (arXiv:2412.19437, section 2.1.2). For rules with a `correction_bias`.

    Args:
        bias: float32 ``[E]``, or a layer: its `gate.e_score_correction_bias` then.
        load: ``[E]``, integers or floats: tokens of each expert in the step on this rank, from `count_experts` of the ids, or
            as a difference of `layer.resident.load_E`, which only grows.
        rate: at least 0.
        group: the ranks whose loads are summed first. Collective. The bias stays equal on all of them if it was.

    Returns:
        The bias.

    Raises:
        ValueError: an argument does not fit, naming it.
    """
    if isinstance(bias, MoELayer):
        found = None if bias.gate is None else bias.gate.e_score_correction_bias
        if found is None:
            raise ValueError(
                "bias must be a tensor or a layer whose router's rule has correction_bias=True; this has not"
            )
        bias_E = found
    else:
        bias_E = bias
    check_kind("bias", bias_E, torch.Tensor)
    check_kind("load", load, torch.Tensor)
    if bias_E.dtype != torch.float32 or bias_E.dim() != 1:
        raise ValueError(f"bias must be float32 [E], got {bias_E.dtype} {tuple(bias_E.shape)}")
    if load.shape != bias_E.shape or load.device != bias_E.device or load.is_complex() or load.dtype == torch.bool:
        raise ValueError(
            f"load must be numbers [{len(bias_E)}] on {bias_E.device}, one for each expert, as bias has, got {load.dtype} "
            f"{tuple(load.shape)} on {load.device}"
        )
    if not is_number(rate) or rate < 0:
        raise ValueError(f"rate must be a finite number of at least 0, got {rate!r}")
    if group is not None:
        check_member(group)
        load = all_gather_rows(load[None], group).sum(dim=0)
    # Exact for integers: a mean in float32 could differ from a load that equals it.
    above_E = load * load.numel() - load.sum()
    return bias_E.sub_(above_E.sign().float(), alpha=rate)
