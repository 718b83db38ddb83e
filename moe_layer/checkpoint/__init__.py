"""Loading experts from a checkpoint on disk, each rank only its own.

`folder` reads tensors from a folder of safetensors files; `recipe` says which of them make an expert; `names` finds that for a
`MoELayer`, by a plain mapping; `load` checks everything, then streams into the slots.
"""

from moe_layer.checkpoint.folder import CheckpointError
from moe_layer.checkpoint.load import load_experts_from

__all__ = ["CheckpointError", "load_experts_from"]
