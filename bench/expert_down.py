"""``python -m bench.expert_down``: the second grouped GEMM, hidden rows by expert to weighted rows in flat order."""

import sys

import torch

from bench.kernel import Inputs, Work, main
from bench.providers import torch_grouped_mm
from moe_kernels import expert_down, expert_down_torch


def make_work(inputs: Inputs) -> Work:
    schedule, config = inputs.schedule, inputs.config("down")
    h, i = inputs.shape.hidden_size, inputs.shape.intermediate_size
    hidden_NI = inputs.normal(inputs.num_rows, i)
    down_EHI, weights_N = inputs.weights.down_EHI, inputs.routing[0].flatten()
    arguments = hidden_NI, inputs.matrices, inputs.lane_to_slot_L, schedule, weights_N
    order_N, ends_E = schedule.order_N.long(), inputs.ends_E

    def grouped() -> torch.Tensor:
        rows_NH = torch_grouped_mm()(hidden_NI, down_EHI.transpose(1, 2), offs=ends_E)
        rows_NH = rows_NH * weights_N[order_N, None].to(rows_NH.dtype)
        return torch.empty_like(rows_NH).index_copy_(0, order_N, rows_NH)

    return Work(
        runs={"expert_down": lambda: expert_down(*arguments, config=config), "torch grouped_mm": grouped},
        expected=lambda: expert_down_torch(*arguments),
        num_bytes=inputs.dtype.itemsize * (h * i * inputs.hit + inputs.num_rows * (h + i)),
        flops=2 * inputs.num_rows * h * i,
    )


if __name__ == "__main__":
    sys.exit(main("expert_down", __doc__, make_work))
