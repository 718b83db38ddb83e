"""Forward, dispatch and combine: rows travel to the ranks of their experts, and results travel back.

`base` says what a dispatcher does, `choose` which one "auto" is. `all_to_all` and `all_gather` are the dispatchers; of the
latter `packed` has what travels, and `ways` the way back. `lanes` and `gradients` are small parts of theirs.
"""

from moe_layer.dispatch.all_gather import AllGatherDispatcher
from moe_layer.dispatch.all_to_all import AllToAllDispatcher
from moe_layer.dispatch.base import Dispatched, Dispatcher
from moe_layer.dispatch.choose import make_dispatcher

__all__ = ["AllGatherDispatcher", "AllToAllDispatcher", "Dispatched", "Dispatcher", "make_dispatcher"]
