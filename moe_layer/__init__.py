"""A mixture-of-experts layer whose experts move between ranks while it serves.

The way of a forward: check and route (`layer`, `router`) → choose replicas (`forward.executors`) → dispatch (`dispatch`) →
schedule → GEMMs (`moe_kernels`) → combine (`dispatch`). On one rank all of it is one op.
"""

from moe_layer.checkpoint import load_experts_from, quantisation_of, save_experts_to
from moe_layer.dispatch import AllGatherDispatcher, AllToAllDispatcher, Dispatched, Dispatcher
from moe_layer.forward.batch_shares import BatchShares
from moe_layer.layer import MoELayer
from moe_layer.router import ROUTER_RULES, RouterRule
from moe_layer.trainable.balance import TrainingBalancer
from moe_layer.trainable.checkpoint import TrainingState
from moe_layer.trainable.ddp import ignore_in_ddp, ignore_in_fsdp
from moe_layer.weights.expert_format import Activation, ExpertFormat, ExpertTensor
from moe_layer.weights.quantisation import Quantisation
from moe_layer.weights.quantize import QuantisationReport, quantize_experts
from moe_layer.weights.shared_pool import make_pool

__all__ = [
    "ROUTER_RULES",
    "Activation",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "BatchShares",
    "Dispatched",
    "Dispatcher",
    "ExpertFormat",
    "ExpertTensor",
    "MoELayer",
    "Quantisation",
    "QuantisationReport",
    "RouterRule",
    "TrainingBalancer",
    "TrainingState",
    "ignore_in_ddp",
    "ignore_in_fsdp",
    "load_experts_from",
    "make_pool",
    "quantisation_of",
    "quantize_experts",
    "save_experts_to",
]
