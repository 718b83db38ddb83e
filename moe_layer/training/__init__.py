"""What a training loop needs beside the layer: the router's choice with its logits, auxiliary losses, clipping over ranks.

`routed` gives what the losses are made of, `losses` and `correction_bias` keep the load even, `clip_grad` counts each expert
once, `steps` has micro-batches and steps that are given up. They are functions: none keeps a state, and the layer knows nothing
of them. (What DDP and FSDP2 must be told before they wrap a model is `moe_layer.ignore_in_ddp` and `moe_layer.ignore_in_fsdp`.)
"""

from moe_layer.training.clip_grad import clip_grad_norm
from moe_layer.training.correction_bias import update_correction_bias
from moe_layer.training.losses import load_balancing_loss, router_z_loss
from moe_layer.training.routed import Routed, route
from moe_layer.training.steps import abandon_step, no_sync

__all__ = [
    "Routed",
    "abandon_step",
    "clip_grad_norm",
    "load_balancing_loss",
    "no_sync",
    "route",
    "router_z_loss",
    "update_correction_bias",
]
