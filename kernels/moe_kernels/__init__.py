"""Triton kernels of a mixture-of-experts layer, each with its PyTorch reference: tensors in, tensors out.

They know slots, lanes and rows; neither which expert a slot holds nor what a rank is. `X.py` has an op and its reference,
`X_triton.py` its kernels and their launches, `X_tma.py` those for Hopper. From below:

- `base`: how kernels are launched, ops registered (`registered`), tensors checked, keys counted (`scan`);
- `operands`: what crosses an op's boundary as one argument: `rule`, `table`, `load`, `matrices`, `config`;
- `routing`: logits → weights and expert ids of each token;
- `replicas`: ids → lanes, by the table's shares; or by the counts of *this* batch (`count_experts`, `solve_shares`,
  `select_by_quota`);
- `tiles`: lanes → rows sorted by lane, in tiles (`schedule`), and how tiles are read and stored;
- `quantised`: rows and experts in FP8 and 4 bits, and the kernels for them;
- `gemms`: `expert_up`, rows → hidden; `expert_down`, hidden → rows; `expert_mlp`, both; `combine`, rows → the output of each
  token;
- `gradients`: `expert_rows`, `expert_mlp` and `combine` as one op that has a gradient, and the kernels of its backward;
- `one_token`: all of it for a single token;
- `peers`: dispatch and combine over the memory of several GPUs.

`local_experts` is everything behind the routing as one op, `local_forward` all of it, with choice and tiles in one
(`local_schedule`); `moe_experts` (in `experts`) is the function for models that keep their weights themselves: no slots, no
load, gradients.
"""

from moe_kernels.base.backend import has_tma, resolve_backend
from moe_kernels.experts import moe_experts
from moe_kernels.gemms.combine import combine, combine_torch
from moe_kernels.gemms.expert_down import expert_down, expert_down_torch
from moe_kernels.gemms.expert_mlp import expert_mlp
from moe_kernels.gemms.expert_up import expert_up, expert_up_torch
from moe_kernels.gradients.expert_rows import expert_rows
from moe_kernels.gradients.gradient_configs import GradientConfigs, gradient_configs
from moe_kernels.local_experts import local_experts, local_experts_torch
from moe_kernels.local_forward import local_forward, local_forward_torch
from moe_kernels.operands.config import GemmConfig, gemm_config, gemm_configs
from moe_kernels.operands.load import LoadCounter
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.operands.quantised_weights import dequantise, pack_nibbles, quantise_weights, unpack_nibbles
from moe_kernels.operands.rule import RoutingRule
from moe_kernels.operands.schemes import SCHEMES
from moe_kernels.operands.table import ReplicaTable
from moe_kernels.operands.words import pack_words, unpack_words
from moe_kernels.quantised.quantise_rows import QuantisedRows, quantise_rows, quantise_rows_torch
from moe_kernels.replicas.circle import GOLDEN, SHARE_BITS
from moe_kernels.replicas.count_experts import count_experts, count_experts_torch
from moe_kernels.replicas.replicas import select_replicas, select_replicas_torch
from moe_kernels.replicas.select_by_quota import select_by_quota, select_by_quota_torch
from moe_kernels.replicas.solve_shares import solve_shares, solve_shares_torch
from moe_kernels.routing.routing import topk_routing, topk_routing_torch
from moe_kernels.tiles.schedule import build_schedule, build_schedule_torch
from moe_kernels.tiles.tiles import TileSchedule

__all__ = [
    "GOLDEN",
    "SCHEMES",
    "SHARE_BITS",
    "ExpertMatrices",
    "GemmConfig",
    "GradientConfigs",
    "LoadCounter",
    "QuantisedRows",
    "ReplicaTable",
    "RoutingRule",
    "TileSchedule",
    "build_schedule",
    "build_schedule_torch",
    "combine",
    "combine_torch",
    "count_experts",
    "count_experts_torch",
    "dequantise",
    "expert_down",
    "expert_down_torch",
    "expert_mlp",
    "expert_rows",
    "expert_up",
    "expert_up_torch",
    "gemm_config",
    "gemm_configs",
    "gradient_configs",
    "has_tma",
    "local_experts",
    "local_experts_torch",
    "local_forward",
    "local_forward_torch",
    "moe_experts",
    "pack_nibbles",
    "pack_words",
    "quantise_rows",
    "quantise_rows_torch",
    "quantise_weights",
    "resolve_backend",
    "select_by_quota",
    "select_by_quota_torch",
    "select_replicas",
    "select_replicas_torch",
    "solve_shares",
    "solve_shares_torch",
    "topk_routing",
    "topk_routing_torch",
    "unpack_nibbles",
    "unpack_words",
]
