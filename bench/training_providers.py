"""The providers of a training step's experts: this package's trainable layer, PyTorch's grouped products, transformers.

For another peer write a module that calls `register()` at import, and name it with ``--provider-module``. `prepare` does
before the clock runs what a training run does once. Gradients are taken of the leaves that it returns.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from bench.providers import Problem, Weights, add, routing_of, torch_grouped_mm, transformers_experts
from moe_layer import MoELayer


@dataclass(frozen=True)
class Step:
    """A forward whose output has a gradient, ready to be called often.

    Attributes:
        forward: y [T, H], in the dtype of x.
        leaves: x [T, H], router logits [T, E], gate and up projections [E, 2I, H], down projections [E, H, I]: what requires
            a gradient, in this order.
    """

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class TrainingProvider(Protocol):
    name: str

    def prepare(self, problem: Problem) -> Step:
        """The step of `problem`, see `bench.providers`; leaves may share the memory of its tensors.

        Raises:
            Unavailable: it cannot run.
        """
        ...


PROVIDERS: dict[str, TrainingProvider] = {}


def register(provider: TrainingProvider) -> None:
    """Make a provider known by its name.

    Raises:
        ValueError: the name is taken.
    """
    add(provider, PROVIDERS)


def leaves_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves that share the memory of the problem's tensors."""
    tensors = (problem.x_TH, problem.logits_TE, problem.weights.gate_up_ENH, problem.weights.down_EHI)
    x, logits, gate_up, down = (tensor.detach().requires_grad_() for tensor in tensors)
    return x, logits, gate_up, down


class _Ours:
    """A trainable `MoELayer` on one rank, whose parameters are the problem's weights."""

    name = "moe_layer"

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[Weights, MoELayer] = weakref.WeakKeyDictionary()

    def prepare(self, problem: Problem) -> Step:
        x_TH, logits_TE, gate_up, down = leaves_of(problem)
        layer = self._layers.get(problem.weights)
        if layer is None:
            shape = problem.shape
            with torch.device("meta"):
                layer = MoELayer(
                    shape.hidden_size,
                    shape.intermediate_size,
                    shape.num_experts,
                    shape.top_k,
                    trainable=True,
                    dtype=x_TH.dtype,
                    device="meta",
                )
            layer.to_empty(device=x_TH.device)
            layer.experts.gate_up_proj, layer.experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
            self._layers[problem.weights] = layer
        parameters = dict(layer.experts.named_parameters())
        leaves = (x_TH, logits_TE, parameters["gate_up_proj"], parameters["down_proj"])
        return Step(lambda: layer(x_TH, router_logits=logits_TE), leaves)


class _TorchGroupedMM:
    """The way of torchtitan's experts, written anew: sort, gather, grouped products, scores in float32, scatter_add."""

    name = "torch_grouped_mm"

    def prepare(self, problem: Problem) -> Step:
        leaves, top_k = leaves_of(problem), problem.top_k
        grouped_mm = torch_grouped_mm()
        experts_E = torch.arange(problem.shape.num_experts, dtype=torch.int32, device=leaves[0].device)

        def forward(
            x_TH: torch.Tensor, logits_TE: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
        ) -> torch.Tensor:
            weights_TK, ids_TK = routing_of(logits_TE, top_k)
            sorted_ids, order_N = ids_TK.flatten().int().sort(stable=True)
            ends_E = torch.searchsorted(sorted_ids, experts_E, right=True, out_int32=True)
            token_NH = (order_N // top_k)[:, None].expand(-1, x_TH.shape[1])
            product = grouped_mm(x_TH.gather(0, token_NH), gate_up.transpose(1, 2), offs=ends_E)
            gate, up = product.chunk(2, dim=-1)
            rows_NH = grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends_E)
            scaled_NH = (rows_NH.float() * weights_TK.flatten()[order_N, None]).to(rows_NH.dtype)
            return torch.zeros_like(x_TH).scatter_add(0, token_NH, scaled_NH)

        run = self._made_fast(forward)
        return Step(lambda: run(*leaves), leaves)

    def _made_fast(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return forward


class _TransformersGroupedMM:
    """The experts of transformers' Qwen3-MoE with its `grouped_mm` implementation, in training mode."""

    name = "transformers_grouped_mm"

    def prepare(self, problem: Problem) -> Step:
        leaves, top_k = leaves_of(problem), problem.top_k
        experts = transformers_experts(problem).train()
        # Parameters of the same memory; the leaves are these.
        for name, leaf in (("gate_up_proj", leaves[2]), ("down_proj", leaves[3])):
            setattr(experts, name, nn.Parameter(leaf.detach()))
        x_TH, logits_TE = leaves[:2]

        def forward() -> torch.Tensor:
            weights_TK, ids_TK = routing_of(logits_TE, top_k)
            return experts(x_TH, ids_TK, weights_TK.to(x_TH.dtype))

        return Step(forward, (x_TH, logits_TE, experts.gate_up_proj, experts.down_proj))


class _TorchCompiled(_TorchGroupedMM):
    """The same, compiled for its shapes."""

    name = "torch_grouped_mm_compiled"

    def _made_fast(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        torch._dynamo.reset()  # or the next shapes would be compiled as dynamic ones, or not at all
        compiled: Any = torch.compile(forward, fullgraph=True, dynamic=False)
        return compiled


for _provider in (_Ours(), _TorchGroupedMM(), _TorchCompiled(), _TransformersGroupedMM()):
    register(_provider)
