"""The providers of a forward: this package's layer, and peers.

For another peer (vLLM's kernels, say) write a module that calls `register()` at import, and name it with
``--provider-module``. `prepare` does before the clock runs what a server does once: it lays out weights and allocates.
The function that it returns does the rest, routing included, and is captured in a CUDA graph.
"""

import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from bench.cases import Shape
from moe_layer import MoELayer

Forward = Callable[[], torch.Tensor]


class Unavailable(Exception):  # noqa: N818
    """A provider cannot run here, or cannot run this problem; the message says why, and which package is missing."""


@contextmanager
def complaining(provider: str, case: str, complaints: list[str]) -> Iterator[None]:
    """What goes wrong inside ends it, and is told as "skipped …" or "FAILED …": it must not end the other providers' run."""
    try:
        yield
    except Unavailable as reason:
        complaints.append(f"skipped {provider}, {case}: {reason}")
    except Exception as failure:  # a peer's, of whatever kind
        message = str(failure).partition("\n")[0]
        complaints.append(f"FAILED {provider}, {case}: {type(failure).__name__}: {message}")


@dataclass(frozen=True, eq=False)
class Weights:
    """Of one shape's experts: gate_up_ENH ``[E, 2I, H]``, gate rows first, and down_EHI ``[E, H, I]``; contiguous."""

    gate_up_ENH: torch.Tensor
    down_EHI: torch.Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """``y_TH = Σ_k w_tk · down(silu(gate(x_t)) · up(x_t))``, w the softmax of the logits at its top k, renormalised.

    Attributes:
        weights: the same object for all problems of a shape, so a provider can keep what it made of them.
        x_TH: hidden states, in the weights' dtype.
        logits_TE: router logits, in the same dtype; no row has a tie at the k-th place.
    """

    shape: Shape
    weights: Weights
    x_TH: torch.Tensor
    logits_TE: torch.Tensor

    @property
    def top_k(self) -> int:
        return self.shape.top_k


class Named(Protocol):
    """What tables need to know of a provider, of whatever problem."""

    name: str


class Provider(Protocol):
    name: str

    def prepare(self, problem: Problem) -> Forward:
        """The forward of `problem`, ready to be called often: [T, H] in the dtype of x.

        Raises:
            Unavailable: it cannot run.
        """
        ...


PROVIDERS: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Make a provider known by its name.

    Raises:
        ValueError: the name is taken.
    """
    add(provider, PROVIDERS)


def add(provider: Any, known: dict[str, Any]) -> None:
    """`register`, in whichever dict.

    Raises:
        ValueError: the name is taken.
    """
    if provider.name in known:
        raise ValueError(f"a provider named {provider.name!r} is registered already")
    known[provider.name] = provider


def find(names: Sequence[str] | None, modules: Sequence[str] = (), known: dict[str, Any] | None = None) -> list[Any]:
    """The providers of these names, or all, once `modules` have been imported; of `known`, or of a forward if None.

    Raises:
        ValueError: an unknown name.
    """
    for module in modules:
        importlib.import_module(module)
    known = PROVIDERS if known is None else known
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"providers {', '.join(unknown)} unknown: must be among {', '.join(known)}")
    return [known[name] for name in names or known]


def make_weights(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Normal weights that keep the scale of their input."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(shape.num_experts, rows, columns, device=device, dtype=dtype)
        for expert in weight:  # one by one: the float32 intermediates need little memory
            expert.copy_(torch.randn(rows, columns, device=device, generator=generator) * columns**-0.5)
        return weight

    return Weights(
        draw(2 * shape.intermediate_size, shape.hidden_size), draw(shape.hidden_size, shape.intermediate_size)
    )


def make_problem(shape: Shape, weights: Weights, logits_TE: torch.Tensor, seed: int = 0) -> Problem:
    like = weights.gate_up_ENH
    generator = torch.Generator(like.device).manual_seed(seed)
    x_TH = torch.randn(logits_TE.shape[0], shape.hidden_size, device=like.device, generator=generator)
    return Problem(shape, weights, x_TH.to(like.dtype), logits_TE.to(like.device, like.dtype))


def torch_routing(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights, float32, and ids, int64, in plain PyTorch: the softmax of the best is that of all, renormalised."""
    return routing_of(problem.logits_TE, problem.top_k)


def routing_of(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch_routing` of other logits."""
    best_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    return torch.softmax(best_TK, dim=-1, dtype=torch.float32), ids_TK


def reference(problem: Problem) -> torch.Tensor:
    """The forward in float32, without TF32, and without the project's packages, which may be another checkout's."""
    weights = problem.weights

    def expert_rows(expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ weights.gate_up_ENH[expert].float().T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ weights.down_EHI[expert].float().T

    return sum_over_experts(problem.x_TH, problem.logits_TE, problem.top_k, expert_rows)


def sum_over_experts(
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    top_k: int,
    expert_rows: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``y_t = Σ_k w_tk · expert_rows(e_tk, x_t)`` in float32, without TF32: expert after expert.

    Args:
        expert_rows: of an expert's number and float32 rows ``[n, H]`` its results, the same.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        weights_TK, ids_TK = routing_of(logits_TE, top_k)
        x_TH = x_TH.float()
        y_TH = torch.zeros_like(x_TH)
        for expert in ids_TK.unique().tolist():
            token, k = torch.where(ids_TK == expert)
            rows = expert_rows(expert, x_TH[token])
            y_TH.index_add_(0, token, rows * weights_TK[token, k, None])  # an expert has a token once
        return y_TH
    finally:
        torch.set_float32_matmul_precision(before)


class _Ours:
    """`MoELayer`, unregistered, with one shadow slot.

    Its time contains the table and the load recording, but no shares: with one rank each expert has one replica.
    """

    name = "moe_layer"

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[Weights, MoELayer] = weakref.WeakKeyDictionary()

    def prepare(self, problem: Problem) -> Forward:
        if problem.weights not in self._layers:
            self._layers[problem.weights] = make_layer(problem)
        layer = self._layers[problem.weights]
        return lambda: layer(problem.x_TH, router_logits=problem.logits_TE)


def make_layer(problem: Problem) -> MoELayer:
    """A layer of one rank with the problem's weights (a second copy of them, in its slots)."""
    shape, weights = problem.shape, problem.weights
    layer = MoELayer(
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_experts,
        shape.top_k,
        num_shadow_slots=1,
        device=problem.x_TH.device,
        dtype=problem.x_TH.dtype,
    )
    # Not strict: router logits are given, so its own router has no weights to load.
    layer.load_state_dict(
        {"experts.gate_up_proj": weights.gate_up_ENH, "experts.down_proj": weights.down_EHI}, strict=False
    )
    return layer


class _TorchGroupedMM:
    """Plain PyTorch around its `grouped_mm`: rows sorted by expert, SwiGLU in two passes, the weighted sum by `bmm`.

    No kernels of its own, nothing compiled, no host sync.
    """

    name = "torch_grouped_mm"

    def prepare(self, problem: Problem) -> Forward:
        grouped_mm = torch_grouped_mm()
        gate_up_EHN = problem.weights.gate_up_ENH.transpose(1, 2)
        down_EIH = problem.weights.down_EHI.transpose(1, 2)
        device = problem.x_TH.device
        experts_E = torch.arange(problem.shape.num_experts, dtype=torch.int32, device=device)
        positions_N = torch.arange(problem.x_TH.shape[0] * problem.top_k, device=device)

        def forward() -> torch.Tensor:
            weights_TK, ids_TK = torch_routing(problem)
            sorted_ids, order_N = ids_TK.flatten().int().sort(stable=True)  # half the passes of 64-bit keys
            ends_E = torch.searchsorted(sorted_ids, experts_E, right=True, out_int32=True)
            product = grouped_mm(problem.x_TH[order_N // problem.top_k], gate_up_EHN, offs=ends_E)
            gate, up = product.chunk(2, dim=-1)
            sorted_rows = grouped_mm(F.silu(gate).mul_(up), down_EIH, offs=ends_E)
            places_TK = torch.empty_like(order_N).scatter_(0, order_N, positions_N).view(ids_TK.shape)
            weights_T1K = weights_TK[:, None].to(sorted_rows.dtype)
            return torch.bmm(weights_T1K, sorted_rows[places_TK]).squeeze(1)

        return _checked_once(forward)


def torch_grouped_mm() -> Any:
    """PyTorch's grouped product.

    Raises:
        Unavailable: this PyTorch has none.
    """
    found = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Unavailable(f"PyTorch {torch.__version__} has no grouped_mm: install 2.10 or newer")
    return found


class _TransformersGroupedMM:
    """The experts of transformers' Qwen3-MoE with its `grouped_mm` implementation."""

    name = "transformers_grouped_mm"

    def prepare(self, problem: Problem) -> Forward:
        experts = transformers_experts(problem)
        for name, weight in (("gate_up_proj", problem.weights.gate_up_ENH), ("down_proj", problem.weights.down_EHI)):
            setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))

        def forward() -> torch.Tensor:
            weights_TK, ids_TK = torch_routing(problem)
            return experts(problem.x_TH, ids_TK, weights_TK.to(problem.x_TH.dtype))

        return _checked_once(forward)


def transformers_experts(problem: Problem) -> Any:
    """The experts of transformers' Qwen3-MoE with its `grouped_mm` implementation, on the meta device.

    Raises:
        Unavailable: transformers is not here, or cannot be imported.
    """
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name  # transformers' own has none
        advice = ": pip install 'transformers>=5.0'" if is_missing else ""
        raise Unavailable(str(error).partition("\n")[0] + advice) from error
    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def _checked_once(forward: Forward) -> Forward:
    """`forward`, after one call that shows whether PyTorch has its kernels for this device, dtype and shape.

    Raises:
        Unavailable: it has not.
    """
    try:
        forward()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise Unavailable(str(error).partition("\n")[0]) from error
    return forward


for _provider in (_Ours(), _TorchGroupedMM(), _TransformersGroupedMM()):
    register(_provider)
