"""The providers of `bench.quantised`: this package's kernels in each scheme and in bfloat16, and peers by their modules.

For a peer (vLLM, SGLang, DeepGEMM, triton_kernels) write a module that calls `register()` at import, and name it with
``--provider-module``. `prepare` does before the clock runs what a server does once: it brings weights and scales into the
peer's layout and allocates. The function that it returns does the rest, routing and the quantisation of activations
included, and is captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.cases import Shape
from bench.fused import GPT_OSS, fused_forward
from bench.providers import add
from moe_kernels import ExpertMatrices, dequantise, quantise_weights


@dataclass(frozen=True)
class Format:
    """How the experts of a case are stored, and the activation between their matrices."""

    name: str
    scheme: str
    group: int = 32
    activation: str = "silu"
    is_biased: bool = False
    worst_error: float = 1e-2
    """Largest error relative to float32, in norm. fp8_block rounds x and hidden rows to four bits: 6e-2."""


FORMATS = {
    form.name: form
    for form in (
        Format("fp8", "fp8_block", worst_error=6e-2),
        Format("mxfp4", "mxfp4", activation=GPT_OSS, is_biased=True),
        Format("mxfp4-silu", "mxfp4"),  # to compare with int4
        Format("int4", "int4", group=128),
        Format("int4-g32", "int4", group=32),
    )
}


@dataclass(frozen=True, eq=False)
class QuantisedProblem:
    """`bench.providers.Problem` with quantised experts: expert e in slot e.

    Attributes:
        quantised: the matrices in the format's scheme: what a peer gets its weights and scales from.
        plain: the same weights in bfloat16, rounded from their exact values, with the same biases.
        x_TH: hidden states, bfloat16.
        logits_TE: router logits, bfloat16; no row has a tie at the k-th place.
    """

    shape: Shape
    form: Format
    quantised: ExpertMatrices
    plain: ExpertMatrices
    x_TH: torch.Tensor
    logits_TE: torch.Tensor


class QuantisedProvider(Protocol):
    name: str

    def prepare(self, problem: QuantisedProblem) -> Callable[[], torch.Tensor]:
        """The forward of `problem`, ready to be called often: [T, H] in bfloat16.

        Raises:
            bench.providers.Unavailable: it cannot run, or not in this format.
        """
        ...


PROVIDERS: dict[str, QuantisedProvider] = {}


def register(provider: QuantisedProvider) -> None:
    """Make a provider known by its name.

    Raises:
        ValueError: the name is taken.
    """
    add(provider, PROVIDERS)


def make_matrices(
    shape: Shape, form: Format, device: torch.device, seed: int = 0
) -> tuple[ExpertMatrices, ExpertMatrices]:
    """Quantised ones of normal weights that keep the scale of their input, and what they mean, in bfloat16."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, hidden_size, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    parts: dict[str, list[torch.Tensor | None]] = {}
    plains: dict[str, torch.Tensor] = {}
    for which, rows, columns in (("gate_up", 2 * intermediate, hidden_size), ("down", hidden_size, intermediate)):
        blocks_of = intermediate if which == "gate_up" and form.scheme == "fp8_block" else None
        plain = torch.empty(experts, rows, columns, device=device, dtype=torch.bfloat16)
        found: list[torch.Tensor | None] = [None, None, None]
        for expert in range(experts):  # one by one: the float32 intermediates need little memory
            weight = torch.randn(rows, columns, device=device, generator=generator) * columns**-0.5
            of_one = quantise_weights(weight, form.scheme, group=form.group, blocks_of=blocks_of)
            for place, part in enumerate(of_one):
                if part is not None:
                    whole = found[place]
                    if whole is None:
                        whole = found[place] = part.new_empty((experts, *part.shape))
                    whole[expert] = part
            plain[expert] = dequantise(*of_one, form.scheme, blocks_of=blocks_of)
        parts[which], plains[which] = found, plain

    def bias(size: int) -> torch.Tensor | None:
        if not form.is_biased:
            return None
        return torch.randn(experts, size, device=device, generator=generator).mul_(0.1).bfloat16()

    biases = bias(2 * intermediate), bias(hidden_size)
    (gate_up, up_scale, up_zero), (down, down_scale, down_zero) = parts["gate_up"], parts["down"]
    assert gate_up is not None and down is not None
    scales = (up_scale, down_scale, up_zero, down_zero)
    quantised = ExpertMatrices(gate_up, down, form.activation, *biases, *scales, form.scheme)
    return quantised, ExpertMatrices(plains["gate_up"], plains["down"], form.activation, *biases)


def make_problem(
    shape: Shape, form: Format, matrices: tuple[ExpertMatrices, ExpertMatrices], logits_TE: torch.Tensor, seed: int = 0
) -> QuantisedProblem:
    device = matrices[0].down_SHI.device
    generator = torch.Generator(device).manual_seed(seed)
    x_TH = torch.randn(logits_TE.shape[0], shape.hidden_size, device=device, generator=generator).bfloat16()
    return QuantisedProblem(shape, form, *matrices, x_TH, logits_TE.to(device, torch.bfloat16))


class _Ours:
    """`local_forward` with the quantised matrices, or with their bfloat16 values."""

    def __init__(self, name: str, is_quantised: bool) -> None:
        self.name, self._is_quantised = name, is_quantised

    def prepare(self, problem: QuantisedProblem) -> Callable[[], torch.Tensor]:
        matrices = problem.quantised if self._is_quantised else problem.plain
        return fused_forward(problem.x_TH, problem.logits_TE, problem.shape.top_k, matrices)


register(_Ours("moe_layer", True))
register(_Ours("moe_layer_bf16", False))
