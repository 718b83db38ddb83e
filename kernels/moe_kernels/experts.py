"""The experts of a layer as one function of tensors: hidden states, ids and weights in, outputs out; differentiable.

For models that keep their weights in tensors of their own, ``[E, out, in]``: there is no slot to find, and no load to count.
T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import torch

from moe_kernels.base.backend import has_tma, resolve_backend
from moe_kernels.base.checks import FLOATS, check_kind, check_tensor
from moe_kernels.gemms.combine import combine
from moe_kernels.gemms.expert_mlp import expert_mlp
from moe_kernels.gradients.expert_rows import expert_rows
from moe_kernels.gradients.gradient_configs import gradient_configs
from moe_kernels.operands.config import gemm_configs
from moe_kernels.operands.matrices import ExpertMatrices
from moe_kernels.replicas.count_experts import count_experts
from moe_kernels.tiles.schedule import build_schedule

_INTEGERS = (torch.int32, torch.int64)


@torch.compiler.assume_constant_result
def _has_tma(device: torch.device) -> bool:
    """`has_tma`; a compiled graph does not look at the device itself."""
    return has_tma(device)


def moe_experts(
    x_TH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    expert_weights_TK: torch.Tensor,
    matrices: ExpertMatrices,
    *,
    recompute: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Each token by its experts, times its routing weights, summed in float32 and rounded once.

    Differentiable, once, with respect to `x_TH`, `expert_weights_TK` and the tensors of `matrices` (see `expert_rows`). No host
    sync; works under `torch.compile(fullgraph=True)` and in CUDA graphs. The same bits as a `MoELayer`'s.

    Args:
        x_TH: [T, H] float32, float16 or bfloat16, contiguous.
        expert_ids_TK: [T, K] int32 or int64; ids outside [0, E), like -1 or the E of expert parallelism, are computed nowhere.
        expert_weights_TK: [T, K] of any floating dtype; what is computed nowhere gets the gradient 0.
        matrices: of the dtype of x, expert e in slot e.
        recompute: keep x instead of the pre-activation for the backward, and compute that again there.
        backend: see `resolve_backend`.

    Returns:
        y_TH, of the dtype of x.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_tensor("x_TH", x_TH, (None, None), FLOATS)
    device, (num_tokens, hidden_size) = x_TH.device, x_TH.shape
    check_kind("matrices", matrices, ExpertMatrices)
    matrices.check(hidden_size, x_TH.dtype, device)
    check_tensor("expert_ids_TK", expert_ids_TK, (num_tokens, None), _INTEGERS, device, contiguous=False)
    num_experts, intermediate = matrices.down_SHI.shape[0], matrices.intermediate_size
    top_k = expert_ids_TK.shape[1]
    check_kind("expert_weights_TK", expert_weights_TK, torch.Tensor)
    if not expert_weights_TK.is_floating_point() or expert_weights_TK.shape != expert_ids_TK.shape:
        raise ValueError(
            f"expert_weights_TK has shape {tuple(expert_weights_TK.shape)} and dtype {expert_weights_TK.dtype}: must be "
            f"floating, of the shape of expert_ids_TK, {tuple(expert_ids_TK.shape)}"
        )
    backend = resolve_backend(backend, device)
    exists = (expert_ids_TK >= 0) & (expert_ids_TK < num_experts)
    ids_TK = torch.where(exists, expert_ids_TK, -1).to(torch.int32).contiguous()
    weights_N = expert_weights_TK.to(torch.float32).reshape(-1).contiguous()
    slots_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    batch = (hidden_size, intermediate, x_TH.dtype, num_tokens, top_k, num_experts)
    tma = backend == "triton" and _has_tma(device)
    up, down = gemm_configs(*batch, tma=tma, scheme=matrices.scheme)
    counts_E = count_experts(ids_TK, num_experts, backend=backend)
    schedule = build_schedule(
        ids_TK.view(-1), counts_E, block_m=up.block_m, extra_m=up.schedule_extra_m, backend=backend
    )  # an expert is its lane
    inputs = (x_TH, matrices, slots_E, schedule)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (
            x_TH,
            expert_weights_TK,
            matrices.gate_up_SNH,
            matrices.down_SHI,
            matrices.gate_up_bias_SN,
            matrices.down_bias_SH,
        )
    ):
        return expert_rows(
            *inputs,
            weights_N,
            fanout=top_k,
            configs=(up, down),
            gradient_configs=gradient_configs(*batch, tma=tma),
            combine_into=ids_TK,
            recompute=recompute,
            backend=backend,
        )
    rows_NH = expert_mlp(*inputs, weights_N, fanout=top_k, configs=(up, down), backend=backend)
    return combine(rows_NH, ids_TK, backend=backend)
