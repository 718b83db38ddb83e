"""Swap: which modules of a model are experts, and what each is: by what the module is and does, not by its name.

Legend: E experts, H hidden, I intermediate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from moe_kernels.base.checks import FLOATS
from moe_layer.hf.activation import find_activation
from moe_layer.hf.layout import Layout
from moe_layer.weights.expert_format import Activation, ExpertFormat, expert_format
from moe_layer.weights.quantisation import SCALE, Quantisation

# What transformers' decorator `use_experts_implementation` writes into a module. They say how its `forward` uses its tensors;
# `has_post_expert_norm` came after 5.17.
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

SUPPORTED = (
    "supported are modules on transformers' experts interface with plain parameters in float32, float16, bfloat16 or e4m3 with "
    "blocks of 128 × 128, on a CPU or CUDA device, and an activation that the kernels have"
)


class NotUnderstoodError(ValueError):
    """Why a module cannot be swapped."""


@dataclass(frozen=True)
class Understood:
    """What a module of experts is.

    Attributes:
        format: as our kernels take it.
        layout: how the model stores it.
        num_experts: E.
        device: of its weights.
        is_meta: whether it has no weights yet.
        quantised: of a module whose experts are quantised already: its parameter for each tensor of `format`.
    """

    format: ExpertFormat
    layout: Layout
    num_experts: int
    device: torch.device
    is_meta: bool = False
    quantised: Mapping[str, str] | None = None

    def stored_as(self, quantisation: Quantisation) -> "Understood":
        """The same experts, quantised on their way into the slots.

        Raises:
            NotUnderstoodError: they cannot be, or are quantised otherwise already.
        """
        if self.format.quantisation == quantisation:
            return self
        try:
            return replace(self, format=self.format.quantised(quantisation))
        except ValueError as error:
            raise NotUnderstoodError(str(error)) from error

    def expert(self, module: nn.Module, expert: int) -> dict[str, torch.Tensor]:
        """One expert of the model's `module`, as our kernels read it; views where possible."""
        if self.quantised is not None:
            return {name: getattr(module, held).detach()[expert] for name, held in self.quantised.items()}
        names = [tensor.name for tensor in self.format.tensors if tensor.role in ("weight", "bias")]
        tensors = {name: self.layout.to_ours(name, getattr(module, name).detach()[expert]) for name in names}
        return tensors if self.format.quantisation is None else self.format.quantise(tensors)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of `model` that hold experts, by name: those on transformers' interface, and those that look like experts."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{other}.") for other in found)
        if not is_inside and (is_on_interface(module) or _looks_like_experts(name, module)):
            found[name] = module
    return found


def is_on_interface(module: nn.Module) -> bool:
    """Whether `module` is one of transformers' experts interface."""
    return all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS)


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    if name.rpartition(".")[2] == "experts":
        return True
    num_experts = getattr(module, "num_experts", None)
    return any(
        parameter is not None and parameter.dim() == 3 and parameter.shape[0] == num_experts
        for parameter in module._parameters.values()
    )


def understand(module: nn.Module, home: torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> Understood:
    """What `module` is; if it is on the meta device, `home` is where its experts go.

    Args:
        dtype: of hidden states, where the module's own weights do not say.

    Raises:
        NotUnderstoodError: it is not what we can compute; says why.
    """
    if hasattr(module, "gate_up_proj_precision_config"):
        raise NotUnderstoodError(
            "its MXFP4 weights are in the layout of transformers' own kernels: load the model inside experts_on_meta() with "
            "Mxfp4Config(dequantize=True), swap with quantisation='mxfp4', then load_experts_from(model, folder)"
        )
    if not is_on_interface(module):
        raise NotUnderstoodError(
            f"a {type(module).__name__} is not on transformers' experts interface, so what its forward expects is not known"
        )
    _check_untouched(module)
    flags = {flag: getattr(module, flag) for flag in FLAGS}
    if getattr(module, "has_post_expert_norm", False):
        raise NotUnderstoodError("has_post_expert_norm=True: a norm between down projection and routing weight")
    names = [("gate_up_proj" if flags["has_gate"] else "up_proj"), "down_proj"]
    if is_fp8(module):
        return _understand_fp8(module, names, flags, home, dtype)
    if flags["has_bias"]:
        names = [one for name in names for one in (name, f"{name}_bias")]
    tensors = _tensors(module, names, home)
    layout = Layout(flags["is_transposed"], flags["has_gate"] and not flags["is_concatenated"])
    hidden_size, intermediate_size = layout.shape_of("down_proj", tensors["down_proj"])
    first = tensors["down_proj"]
    device = home if first.is_meta and home is not None else first.device
    activation = _find_activation(module, intermediate_size, flags, device)
    try:
        format = expert_format(hidden_size, intermediate_size, first.dtype, activation, has_bias=flags["has_bias"])
    except ValueError as error:
        raise NotUnderstoodError(str(error)) from error
    for tensor in format.tensors:
        shape, wanted = layout.shape_of(tensor.name, tensors[tensor.name]), tensor.shape
        if shape != wanted:
            raise NotUnderstoodError(f"{tensor.name} of one expert must have the shape {wanted}, has {shape}")
    return Understood(format, layout, first.shape[0], device, is_meta=first.is_meta)


def _find_activation(
    module: nn.Module, intermediate_size: int, flags: Mapping[str, bool], device: torch.device
) -> Activation:
    what = "_apply_gate" if flags["has_gate"] else "act_fn"
    try:
        activation = find_activation(module, intermediate_size, flags["has_gate"], flags["is_concatenated"], device)
    except Exception as error:  # the model's own code
        raise NotUnderstoodError(f"its {what} raised {error!r} for numbers of the right shape") from error
    if activation is None:
        raise NotUnderstoodError(f"its {what} computes none of the activations that we know ({_activation_of(module)})")
    return activation


def is_fp8(module: nn.Module) -> bool:
    """Whether its matrices are e4m3, as in transformers' `FP8Experts`."""
    return getattr(module._parameters.get("down_proj"), "dtype", None) == torch.float8_e4m3fn


def _understand_fp8(
    module: nn.Module, names: list[str], flags: Mapping[str, bool], home: torch.device | None, dtype: torch.dtype
) -> Understood:
    """Experts in e4m3 with the scales of blocks beside each matrix, in "…_scale_inv"."""
    if list(getattr(module, "block_size", None) or ()) != [128, 128]:
        raise NotUnderstoodError(f"its block_size must be [128, 128], is {getattr(module, 'block_size', None)!r}")
    if getattr(module, "activation_scheme", "dynamic") != "dynamic":
        raise NotUnderstoodError(f"its activation_scheme must be 'dynamic', is {module.activation_scheme!r}")
    if flags["is_transposed"] or not flags["is_concatenated"]:
        raise NotUnderstoodError("its e4m3 matrices are transposed or interleaved, and so would be their blocks")
    quantised = {name + ours: name + theirs for name in names for ours, theirs in (("", ""), (SCALE, "_scale_inv"))}
    tensors = _tensors(module, list(quantised.values()), home, (torch.float8_e4m3fn, torch.float32))
    first = tensors["down_proj"]
    _, hidden_size, intermediate_size = first.shape
    if flags["has_gate"] and intermediate_size % 128:
        raise NotUnderstoodError(f"its blocks of 128 rows mix gate and up rows: there are {intermediate_size} of each")
    device = home if first.is_meta and home is not None else first.device
    activation = _find_activation(module, intermediate_size, flags, device)
    quantisation = Quantisation("fp8_block")
    format = expert_format(hidden_size, intermediate_size, dtype, activation, quantisation=quantisation)
    for tensor in format.tensors:
        shape, found = tensor.shape, tensors[quantised[tensor.name]]
        if (tuple(found.shape[1:]), found.dtype) != (shape, tensor.dtype):
            raise NotUnderstoodError(
                f"{quantised[tensor.name]} of one expert must be {tensor.dtype} {shape}, is {found.dtype} "
                f"{tuple(found.shape[1:])}"
            )
    return Understood(format, Layout(), first.shape[0], device, first.is_meta, quantised)


def _check_untouched(module: nn.Module) -> None:
    """Raises NotUnderstoodError if something else than the class decides what the module computes."""
    if "forward" in vars(module):
        raise NotUnderstoodError("its forward was replaced on the instance (by offloading or another library)")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        raise NotUnderstoodError("it has hooks, which a swapped module would not call")
    if getattr(module, "_is_expert_parallel", False):
        raise NotUnderstoodError(
            "transformers' own expert parallelism manages it: give swap_experts a process_group instead"
        )


def _tensors(
    module: nn.Module, names: list[str], home: torch.device | None, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> dict[str, nn.Parameter]:
    """Its parameters, by name: `names` and no others; on the meta device only if they have a `home`."""
    held = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if held != set(names):
        raise NotUnderstoodError(f"its parameters and buffers must be {sorted(names)}, are {sorted(held)}")
    num_experts, tensors = getattr(module, "num_experts", None), {name: module._parameters[name] for name in names}
    found = {}
    for name, tensor in tensors.items():
        if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
            raise NotUnderstoodError(f"{name} must be a plain parameter, is a {type(tensor).__name__}")
        if tensor.dim() != (2 if name.endswith("_bias") else 3) or tensor.shape[0] != num_experts:
            raise NotUnderstoodError(
                f"{name} must have num_experts={num_experts} rows, has the shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            *others, last = (str(dtype)[6:] for dtype in dtypes)
            raise NotUnderstoodError(f"{name} must be {', '.join(others)} or {last}, is {tensor.dtype}")
        if tensor.device.type not in ("cpu", "cuda") and not (tensor.is_meta and home is not None):
            raise NotUnderstoodError(f"{name} is on the device {tensor.device}: load the weights before the swap")
        found[name] = tensor
    for what, values in (("dtype", {t.dtype for t in found.values()}), ("device", {t.device for t in found.values()})):
        if len(values) > 1 and not (what == "dtype" and dtypes != FLOATS):
            raise NotUnderstoodError(f"its parameters must have one {what}, have {sorted(map(str, values))}")
    return found


def _activation_of(module: nn.Module) -> str:
    act_fn = getattr(module, "act_fn", None)
    name = type(act_fn).__name__ if isinstance(act_fn, nn.Module) else getattr(act_fn, "__name__", repr(act_fn))
    return f"act_fn: {name}"
