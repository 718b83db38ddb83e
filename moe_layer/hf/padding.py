"""Which tokens of a model's batch are padding, for its swapped experts: by the `attention_mask` that the model is called with.

Legend: B sequences, S tokens of each in this forward, P tokens before them in the cache, T = B · S.
"""

import inspect
import threading
from typing import Any

import torch
from torch import nn


class Padding:
    """Listens to the calls of a model, on each thread apart. Padding goes to no expert, and is not counted as load.

    It acts in forwards without gradients: one that is repeated for a backward would not find the mask again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._current = threading.local()
        self._names = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def mask_of(self, num_tokens: int) -> torch.Tensor | None:
        """Bool ``[T]``, False for padding, or None if that is not known of a forward of so many tokens."""
        mask_T = getattr(self._current, "mask_T", None)
        return mask_T if mask_T is not None and len(mask_T) == num_tokens else None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        mask_BN = given.get("attention_mask")
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        self._current.mask_T = None
        if not isinstance(mask_BN, torch.Tensor) or not isinstance(tokens, torch.Tensor) or torch.is_grad_enabled():
            return
        if mask_BN.dim() != 2:  # it says who sees whom
            return
        num_sequences, num_tokens = tokens.shape[:2]
        if mask_BN.shape[0] == num_sequences and mask_BN.shape[1] >= num_tokens:  # [B, P + S] with a cache
            self._current.mask_T = mask_BN[:, mask_BN.shape[1] - num_tokens :].reshape(-1) != 0

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._current.mask_T = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Padding":
        """Of a copy of the model, whose hooks are copies of these methods. Its handles are not copied."""
        copy = Padding.__new__(Padding)
        copy._current, copy._names, copy._handles = threading.local(), self._names, []
        return copy
