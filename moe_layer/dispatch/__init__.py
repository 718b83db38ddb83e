"""Forward, dispatch and combine: rows travel to the ranks of their experts, and results travel back."""

from moe_layer.dispatch.all_to_all import AllToAllDispatcher
from moe_layer.dispatch.base import Dispatched, Dispatcher
from moe_layer.dispatch.choose import make_dispatcher

__all__ = ["AllToAllDispatcher", "Dispatched", "Dispatcher", "make_dispatcher"]
