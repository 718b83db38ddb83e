"""One line into a transformers model: `swap_experts(model)` puts our experts in the place of each block's `experts`.

`inspect` says what a block's experts are, `activation` what is between their matrices, `layout` how their tensors lie in a
checkpoint; `swapped` is the module in their place; `swap` does it. `absence`: ranks that do not come to a forward. `deferred`
makes a model without its experts' weights, and `load` streams these from a checkpoint, and saves them as one.
`implementation`: our kernels on the model's own parameters. Only `load` and `implementation` import transformers: a model
brings it.
"""

from moe_layer.hf.deferred import experts_on_meta
from moe_layer.hf.implementation import register_experts_implementation
from moe_layer.hf.load import load_experts_from, save_experts_to
from moe_layer.hf.swap import SwapReport, swap_experts, unswap_experts

__all__ = [
    "SwapReport",
    "experts_on_meta",
    "load_experts_from",
    "register_experts_implementation",
    "save_experts_to",
    "swap_experts",
    "unswap_experts",
]
