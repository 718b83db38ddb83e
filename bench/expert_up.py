"""``python -m bench.expert_up``: the first grouped GEMM with its activation, source rows to hidden rows by expert."""

import sys

import torch
import torch.nn.functional as F

from bench.kernel import Inputs, Work, main
from bench.providers import torch_grouped_mm
from moe_kernels import expert_up, expert_up_torch


def make_work(inputs: Inputs) -> Work:
    top_k, schedule, config = inputs.top_k, inputs.schedule, inputs.config("up")
    h, i = inputs.shape.hidden_size, inputs.shape.intermediate_size
    x_TH = inputs.normal(inputs.num_tokens, h)
    gate_up_ENH = inputs.weights.gate_up_ENH
    arguments = x_TH, inputs.matrices, inputs.lane_to_slot_L, schedule
    ends_E = inputs.ends_E

    def grouped() -> torch.Tensor:
        product = torch_grouped_mm()(x_TH[schedule.order_N // top_k], gate_up_ENH.transpose(1, 2), offs=ends_E)
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Work(
        runs={"expert_up": lambda: expert_up(*arguments, fanout=top_k, config=config), "torch grouped_mm": grouped},
        expected=lambda: expert_up_torch(*arguments, fanout=top_k),
        num_bytes=inputs.dtype.itemsize * (2 * h * i * inputs.hit + x_TH.numel() + inputs.num_rows * i),
        flops=4 * inputs.num_rows * h * i,
    )


if __name__ == "__main__":
    sys.exit(main("expert_up", __doc__, make_work))
