"""Forward, check: each error names the argument that the user passed, its value and the rule."""

import math
from typing import Any

import numpy as np
import torch

from moe_kernels.base.checks import FLOATS, check_kind, is_integer


def check_integer(name: str, value: Any, least: int) -> int:
    """`value` as an int; raises ValueError unless it is an integer, NumPy's are, of at least `least`."""
    if type(value) is int and value >= least:  # as nearly always, and forwards check their bound
        return value
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...], otherwise: str = "") -> None:
    """Raises ValueError unless `value` is one of `choices`; `otherwise` says what else would have been taken."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}{otherwise}; got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number; NumPy's are."""
    try:
        kinds = (int, float, np.integer, np.floating)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def check_trainable(trainable: Any, num_experts: int, num_ranks: int, *, pool: Any, quantisation: Any = None) -> None:
    """Raises ValueError unless `trainable` is a bool and goes with the other arguments."""
    check_bool("trainable", trainable)
    if trainable and pool is not None:
        raise ValueError(f"pool={pool!r} does not go with trainable=True: such experts have no slots")
    if trainable and quantisation is not None:
        raise ValueError(
            f"quantisation={quantisation!r} does not go with trainable=True: quantised experts do not train"
        )
    if trainable and num_experts % num_ranks:
        raise ValueError(
            f"num_experts={num_experts} must be divisible by the {num_ranks} ranks with trainable=True: each owns as many"
        )


def check_tokens(num_tokens: int, bound: Any, default: int | None) -> int:
    """The bound of a forward: its own, or the layer's default.

    Raises:
        ValueError: the bound is no positive integer, or this rank has more tokens.
    """
    if bound is None:
        assert default is not None
        bound = default
    else:
        bound = check_integer("max_tokens", bound, 1)
    if num_tokens > bound:
        raise ValueError(
            f"x has {num_tokens} tokens, more than max_tokens={bound}: give the forward a larger max_tokens, equal on all "
            "ranks"
        )
    return bound


def check_sizes(
    hidden_size: Any, intermediate_size: Any, num_experts: Any, num_redundant_experts: Any
) -> tuple[int, int, int, int]:
    """These as ints; raises ValueError unless they are integers in their range."""
    return (
        check_integer("hidden_size", hidden_size, 1),
        check_integer("intermediate_size", intermediate_size, 1),
        check_integer("num_experts", num_experts, 1),
        check_integer("num_redundant_experts", num_redundant_experts, 0),
    )


def physical_per_rank(num_experts: int, num_redundant_experts: int, num_ranks: int) -> int:
    """Physical experts of a rank; ValueError if they do not divide by the ranks or if no rank has use for them."""
    num_physical = num_experts + num_redundant_experts
    if num_physical % num_ranks:
        raise ValueError(
            f"num_redundant_experts={num_redundant_experts} with num_experts={num_experts} makes {num_physical} physical "
            f"experts, which must be divisible by the {num_ranks} ranks"
        )
    most = num_experts * (num_ranks - 1)
    if num_redundant_experts > most:
        raise ValueError(
            f"num_redundant_experts={num_redundant_experts} must be at most num_experts * (ranks - 1) = {most}: "
            "a second replica on one rank would be wasted"
        )
    return num_physical // num_ranks


def resolve_dtype(dtype: Any, name: str = "dtype") -> torch.dtype:
    """`dtype`, or the default; ValueError if the kernels have none for it."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype!r}")
    return dtype


def resolve_device(device: Any) -> torch.device:
    """`device`, or the default, with an index, so that devices compare equal; ValueError if there is none such."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise ValueError(
            "device must hold values, not those of FakeTensorMode: build the layer, or move it, outside of it"
        )
    try:
        resolved = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a CPU or a CUDA device or meta, got {device!r}: {error}") from error
    if resolved.type in ("cpu", "meta"):
        return torch.device(resolved.type)
    if resolved.type != "cuda":
        raise ValueError(f"device must be a CPU or a CUDA device or meta, got {device!r}")
    count = torch.cuda.device_count()
    index = resolved.index if resolved.index is not None else (torch.cuda.current_device() if count else 0)
    if index >= count:
        raise ValueError(f"device must be one of this machine's, which has {count} CUDA devices; got {device!r}")
    return torch.device("cuda", index)


def home_of(device: torch.device) -> torch.device:
    """Where tables and counters of a layer with weights on `device` are: those of a layer without memory on the CPU."""
    return torch.device("cpu") if device.type == "meta" else device


def is_autocast_enabled(x: torch.Tensor) -> bool:
    """Whether `torch.autocast` applies to operations on `x`."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # quicker to ask
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_x(x: torch.Tensor, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless `x` is ``[..., H]`` of the layer's dtype and on its device."""
    if not isinstance(x, torch.Tensor):
        check_kind("x", x, torch.Tensor)
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must have hidden_size={hidden_size} as its last dimension, got shape {tuple(x.shape)}")
    if x.device != device or x.is_meta:
        if device.type == "meta":
            raise ValueError(
                "the layer is on the meta device: give it memory with to_empty() and weights by loading first"
            )
        raise ValueError(f"x must be on the layer's device {device}, got {x.device}")
    if x.dtype != dtype:
        raise ValueError(f"x must have the layer's dtype {dtype}, got {x.dtype}")


def check_mask(token_mask: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError unless `token_mask` marks the tokens of `x`."""
    check_kind("token_mask", token_mask, torch.Tensor)
    if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
        raise ValueError(
            f"token_mask must be bool of shape {tuple(x.shape[:-1])}, got {token_mask.dtype} {tuple(token_mask.shape)}"
        )
    if token_mask.device != x.device:
        raise ValueError(f"token_mask must be on {x.device}, as x is, got {token_mask.device}")


def check_per_token(
    name: str, value: torch.Tensor, x: torch.Tensor, width: int, of: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises ValueError unless `value` has `width` numbers for each token of `x`."""
    is_tensor = isinstance(value, torch.Tensor)
    if not is_tensor or value.dim() != x.dim() or value.shape[-1] != width or value.shape[:-1] != x.shape[:-1]:
        got = tuple(value.shape) if is_tensor else value
        raise ValueError(f"{name} must have shape {(*x.shape[:-1], width)}, one for each token and {of}, got {got!r}")
    if value.dtype not in dtypes or value.device != x.device:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, dtypes))} and on {x.device}, as x is; got "
            f"{value.dtype} on {value.device}"
        )


def given_choice(
    x: torch.Tensor,
    mask_T: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_weights: torch.Tensor | None,
    top_k: int,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_TK (int32, -1 for none) and weights_TK (float32) of the caller's choice.

    Raises:
        ValueError: one of the two is missing, or does not fit `x`.
    """
    if expert_ids is None or expert_weights is None:
        missing = "expert_ids" if expert_ids is None else "expert_weights"
        raise ValueError(f"{missing} must be given too: expert_ids and expert_weights belong together, got None")
    integers, floats = (torch.int32, torch.int64), (*FLOATS, torch.float64)
    check_per_token("expert_ids", expert_ids, x, top_k, "choice", integers)
    check_per_token("expert_weights", expert_weights, x, top_k, "choice", floats)
    ids_TK, weights_TK = as_rows(expert_ids), as_rows(expert_weights.float())
    is_none = (ids_TK < 0) | (ids_TK >= num_experts)  # before int64 is narrowed
    if mask_T is not None:
        is_none = is_none | ~mask_T[:, None]
    return ids_TK.masked_fill(is_none, -1).int(), weights_TK.masked_fill(is_none, 0)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` as ``[T, n]``, contiguous; a reshape that changes nothing would take the host as long as a launch."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()
