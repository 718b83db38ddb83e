"""``python -m bench.routing``: `topk_routing`, logits to weights and expert ids."""

import sys

import torch

from bench.kernel import Inputs, Work, main
from moe_kernels import RoutingRule, topk_routing, topk_routing_torch


def make_work(inputs: Inputs) -> Work:
    logits_TE, top_k = inputs.logits_TE, inputs.top_k

    def softmax_topk() -> tuple[torch.Tensor, torch.Tensor]:
        weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
        return weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK

    return Work(
        runs={
            "topk_routing": lambda: topk_routing(logits_TE, top_k, RoutingRule()),
            "torch softmax, topk": softmax_topk,
        },
        expected=lambda: topk_routing_torch(logits_TE, top_k, RoutingRule()),
        num_bytes=logits_TE.nbytes + inputs.num_rows * (4 + 4),
        unchecked=frozenset({"torch softmax, topk"}),  # equal logits in another order
    )


if __name__ == "__main__":
    sys.exit(main("routing", __doc__, make_work))
