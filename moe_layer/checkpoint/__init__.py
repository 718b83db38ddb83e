"""Loading experts from a checkpoint on disk, each rank only its own; and saving them as one.

`folder` reads tensors from a folder of safetensors files; `recipe` says which of them make an expert; `names` finds that for a
`MoELayer`, by a plain mapping; `load` checks everything, then streams into the slots; `save` goes back. `stored` knows how
quantised experts are stored there, and `quantised` makes their recipes.
"""

from moe_layer.checkpoint.folder import CheckpointError
from moe_layer.checkpoint.load import load_experts_from
from moe_layer.checkpoint.save import quantisation_of, save_experts_to

__all__ = ["CheckpointError", "load_experts_from", "quantisation_of", "save_experts_to"]
