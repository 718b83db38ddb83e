"""One line into a transformers model: `swap_experts(model)` puts our experts in the place of each block's `experts`.

`inspect` says what a block's experts are, `activation` what is between their matrices, `layout` how their tensors lie in a
checkpoint; `swapped` is the module in their place; `swap` does it. `implementation`: our kernels on the model's own parameters.
Nothing else here imports transformers: a model brings it.
"""

from moe_layer.hf.implementation import register_experts_implementation
from moe_layer.hf.swap import SwapReport, swap_experts, unswap_experts

__all__ = ["SwapReport", "register_experts_implementation", "swap_experts", "unswap_experts"]
