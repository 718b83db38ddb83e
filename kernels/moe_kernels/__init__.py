"""Triton kernels of a mixture-of-experts layer, each with its PyTorch reference: tensors in, tensors out.

They know slots, lanes and rows; neither which expert a slot holds nor what a rank is. The way of a forward, and its files
(`X.py`: the op and its reference, `X_triton.py`: its kernels and their launches):

1. `routing`: logits and a `rule` → weights and expert ids of each token;
2. `replicas`: ids and a `table` → lanes, by shares of a `circle`; adds to the `load` counter;
   or, by the counts of *this* batch: `count_experts`, `solve_shares` from the counts of all ranks, `select_by_quota`;
3. `schedule`: lanes → rows sorted by lane (`scan`), in `tiles`;
4. `expert_up`: rows and `matrices` → hidden; 5. `expert_down`: hidden → rows; `_tma`: on Hopper; tile sizes: `config`;
   `_quantised`: of quantised experts (`schemes`, `quantised_weights`), whose rows of x `quantise_rows` may quantise;
   `_fp8`: of fp8_block on Hopper, by a ring (`fp8_ring`);
6. `combine`: rows → the output of each token.

`expert_rows` is 4 to 6 as one op that has a gradient; its backward: `gradient_tiles`, then `experts_grad_hidden`,
`experts_grad_x` and `experts_grad_weights` (`_tma`: on Hopper, with `gather_sorted`); tile sizes: `gradient_configs`. That of
`routing`: `routing_grad`.
`moe_experts` (in `experts`) is the function for models that keep their weights themselves: no slots, no load, gradients.
`local_experts` is 2 to 6 as one op, `local_forward` 1 to 6; `one_token` is the latter for one token. Below them are `launch`
(how a kernel is launched) and `registered` (how an op is registered; `structures`: dataclasses as its arguments).
"""

from moe_kernels.backend import resolve_backend
from moe_kernels.circle import GOLDEN, SHARE_BITS
from moe_kernels.combine import combine, combine_torch
from moe_kernels.config import GemmConfig, gemm_config, gemm_configs, has_tma
from moe_kernels.count_experts import count_experts, count_experts_torch
from moe_kernels.expert_down import expert_down, expert_down_torch
from moe_kernels.expert_rows import expert_rows
from moe_kernels.expert_up import expert_up, expert_up_torch
from moe_kernels.experts import moe_experts
from moe_kernels.gradient_configs import GradientConfigs, gradient_configs
from moe_kernels.load import LoadCounter
from moe_kernels.local_experts import local_experts, local_experts_torch
from moe_kernels.local_forward import local_forward, local_forward_torch
from moe_kernels.matrices import ExpertMatrices
from moe_kernels.quantise_rows import QuantisedRows, quantise_rows, quantise_rows_torch
from moe_kernels.quantised_weights import dequantise, pack_nibbles, quantise_weights, unpack_nibbles
from moe_kernels.replicas import select_replicas, select_replicas_torch
from moe_kernels.routing import topk_routing, topk_routing_torch
from moe_kernels.rule import RoutingRule
from moe_kernels.schedule import build_schedule, build_schedule_torch
from moe_kernels.schemes import SCHEMES
from moe_kernels.select_by_quota import select_by_quota, select_by_quota_torch
from moe_kernels.solve_shares import solve_shares, solve_shares_torch
from moe_kernels.table import ReplicaTable
from moe_kernels.tiles import TileSchedule
from moe_kernels.words import pack_words, unpack_words

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
