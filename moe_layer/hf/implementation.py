"""`register_experts_implementation()`: our kernels on a transformers model's own parameters, by ``experts_implementation``.

For one GPU, training, adapters on experts, and transformers' own expert parallelism. Experts that move need `swap_experts`.
"""

import warnings
from typing import Any

import torch
from torch import nn

from moe_kernels import ExpertMatrices, moe_experts
from moe_layer.hf.activation import find_activation
from moe_layer.hf.inspect import FLAGS

NAME = "moe_layer"
_FOUND = "_moe_layer_activation"
"""Attribute of a module: its activation as the kernels are told of it. A string, so that compiled graphs can guard on it."""


def register_experts_implementation(model: nn.Module | None = None, *, recompute: bool = False) -> str:
    """Make ``experts_implementation="moe_layer"`` known to transformers, and if a model is given, set it there.

    As in ``from_pretrained(name, experts_implementation=register_experts_implementation())``. The registration is of the whole
    process; a second one replaces `recompute`.

    Args:
        model: a transformers model that shall use it. Its activations are looked at now, so that its first forward may be a
            compiled one.
        recompute: see `moe_kernels.moe_experts`.

    Returns:
        The name, "moe_layer".

    Raises:
        ImportError: transformers has no interface for experts (it is older than 5).
        ValueError: no transformers model; or a module of it has experts that the kernels do not compute; says which and why.
            Nothing is set.

    Warns:
        UserWarning: no module of the model asks for its implementation, so nothing would use ours. `swap_experts` says more.
    """
    if model is not None and not hasattr(model, "set_experts_implementation"):
        raise ValueError(f"model must be a transformers model or None, got a {type(model).__name__}")
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "register_experts_implementation() needs transformers 5: pip install 'moe-layer[transformers]'"
        ) from error

    def forward(self: nn.Module, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, recompute=recompute)

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    if model is not None:
        found = [(name, module) for name, module in model.named_modules() if hasattr(module, FLAGS[0])]
        for name, module in found:
            try:
                _activation_of(module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if not found:
            warnings.warn(
                f"no module of {type(model).__name__} is on transformers' experts interface: experts_implementation={NAME!r} "
                "changes nothing",
                stacklevel=2,
            )
        model.set_experts_implementation(NAME)  # type: ignore[operator]
    return NAME


def experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """What transformers calls in the place of `experts.forward`; arguments as there.

    Raises:
        ValueError: the kernels do not compute these experts; says why.
    """
    activation: str = getattr(experts, _FOUND, None) or _activation_of(experts)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    gate_up, down = getattr(experts, first), experts.down_proj  # an adapter may have put computed tensors there
    biases = (getattr(experts, f"{first}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
    matrices = ExpertMatrices(gate_up, down, activation, *biases)  # type: ignore[arg-type]
    x = hidden_states.to(gate_up.dtype).contiguous()  # autocast leaves parameters as they are  # type: ignore[arg-type]
    y = moe_experts(x, top_k_index, top_k_weights, matrices, recompute=recompute)
    return y.to(hidden_states.dtype)


def _activation_of(experts: nn.Module) -> str:
    """What the kernels are told of the module; remembered there.

    Raises:
        ValueError: they cannot compute it.
    """
    instead = "Use swap_experts(), or another experts_implementation"
    if experts.is_transposed or (experts.has_gate and not experts.is_concatenated):
        raise ValueError(
            f"a {type(experts).__name__} stores its matrices transposed or interleaved: every forward would have to turn them. "
            f"{instead}"
        )
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"a {type(experts).__name__} has a norm behind its experts. {instead}")
    if torch.compiler.is_compiling():
        raise ValueError(
            "the experts' activation is not known yet: call register_experts_implementation(model), or run a forward, before "
            "torch.compile"
        )
    intermediate = experts.down_proj.shape[2]  # type: ignore[index]
    device = experts.down_proj.device
    activation = find_activation(experts, intermediate, experts.has_gate, experts.is_concatenated, device)  # type: ignore[arg-type]
    if activation is None:
        raise ValueError(f"a {type(experts).__name__} has an activation that the kernels do not know. {instead}")
    setattr(experts, _FOUND, activation.for_kernels)
    return activation.for_kernels
