"""Saving: keeps `save_pretrained()` from writing quantised experts, which it would split and name as if they were floats."""

from typing import Any, NoReturn

from torch import nn

_METHOD = "save_pretrained"


class RefuseSaving:
    """In the place of a model's `save_pretrained`. Saved so, the model would load again without a word, and say nonsense."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "save_pretrained() is refused, as transformers does not know how these experts are quantised: save them with "
            "save_experts_to(), of moe_layer.hf for swapped experts, or with state_dict()"
        )


def refuse_saving(model: nn.Module) -> None:
    """Of every module in `model` that could."""
    for module in model.modules():
        if hasattr(module, _METHOD):
            module.__dict__[_METHOD] = RefuseSaving()


def allow_saving(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module.__dict__.get(_METHOD), RefuseSaving):
            del module.__dict__[_METHOD]
