"""A mixture-of-experts layer whose experts move between ranks while it serves."""

from moe_layer.dispatch import AllToAllDispatcher, Dispatched, Dispatcher, LocalDispatcher
from moe_layer.layer import MoELayer, make_pool
from moe_layer.router import ROUTER_RULES, RouterRule

__all__ = [
    "ROUTER_RULES",
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "LocalDispatcher",
    "MoELayer",
    "RouterRule",
    "make_pool",
]
