"""`route`: the choice of a layer's own router with the logits that it was made of, which losses are computed from.

Legend: T tokens, H hidden, E logical experts, K top-k.
"""

from typing import NamedTuple

import torch
from torch import nn

from moe_kernels.base.checks import check_kind
from moe_layer.arguments import as_rows, check_mask, check_x, is_autocast_enabled
from moe_layer.layer import MoELayer


class Routed(NamedTuple):
    """What a router says of each token.

    Attributes:
        logits: ``[..., E]``, in the router's dtype.
        expert_ids: int32 ``[..., K]``; -1 where the mask says padding.
        expert_weights: float32 ``[..., K]``; gradients flow through them to the logits.
    """

    logits: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor


def route(layer: MoELayer, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> Routed:
    """What `layer`'s router chooses for `x`, for the forward and for losses.

    ``layer(x, mask, expert_ids=routed.expert_ids, expert_weights=routed.expert_weights)`` is then the same, bit for bit, as
    ``layer(x, mask)`` with gradients. Under FSDP2 shard a module around the layer, not the layer alone: its router is used here
    before the layer is called.

    Args:
        layer: with a router of its own.
        x: hidden states ``[..., H]``, as the layer's forward takes them.
        token_mask: bool ``[...]``, as the layer's forward takes it.

    Raises:
        ValueError: the layer has no router, or shape, dtype or device do not fit.
    """
    check_kind("layer", layer, nn.Module)
    gate = layer.gate
    if gate is None:
        raise ValueError("layer must have a router of its own, but it was built with router=None")
    if is_autocast_enabled(x):  # as the layer's forward: in its own dtype
        with torch.autocast(x.device.type, enabled=False):
            return route(layer, x.to(layer.experts.dtype) if x.is_floating_point() else x, token_mask)
    check_x(x, layer.hidden_size, layer.experts.dtype, layer.experts.device)
    x_TH, mask_T, tokens = as_rows(x), None, x.shape[:-1]
    if token_mask is not None:
        check_mask(token_mask, x)
        mask_T = token_mask.reshape(-1).contiguous()
        x_TH = x_TH.masked_fill(~mask_T[:, None], 0)  # or the router's gradient would be 0 · NaN
    logits_TE = as_rows(gate(x_TH))
    weights_TK, ids_TK = gate.choose(logits_TE, mask_T)
    return Routed(*(one.view(*tokens, one.shape[1]) for one in (logits_TE, ids_TK, weights_TK)))
