"""A model without its experts' weights: `experts_on_meta()` around whatever makes the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from moe_layer.hf.inspect import is_on_interface

_IGNORED = (
    "_keys_to_ignore_on_load_unexpected"  # of a transformers model: names whose tensors it does not miss a place for
)


class _Absent(nn.Module):
    """In the place of experts while the rest of the model loads. It has no parameters, so nothing is read for it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)  # not a submodule

    def forward(self, *_: Any) -> NoReturn:
        raise RuntimeError("the experts have no weights yet: swap_experts() and load_experts_from() come first")


@contextmanager
def experts_on_meta() -> Iterator[None]:
    """Models made inside get all their weights but the experts', which are left on the meta device.

    `from_pretrained()` then neither reads experts nor takes memory for them. `swap_experts()` makes slots for such a model, and
    `load_experts_from()` fills them::

        with experts_on_meta():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")  # or with device_map=
        swap_experts(model, process_group)
        load_experts_from(model, folder)

    Move the model inside, as PyTorch cannot move what is on the meta device. Experts are the modules on transformers' experts
    interface. Applies to all models that any thread makes inside.
    """
    places: list[tuple[nn.Module, str, _Absent]] = []
    names: set[str] = set()

    def on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> nn.Module | None:
        if child is None:
            return None
        if is_on_interface(child):
            absent = _Absent(child.to("meta"))
            places.append((parent, name, absent))
            names.add(name)
            return absent
        for model in (parent, child):
            if names and hasattr(model, _IGNORED):  # or it would warn of every expert's tensor
                ignored = {rf"(^|\.){one}\." for one in names}
                vars(model)[_IGNORED] = set(getattr(model, _IGNORED) or ()) | ignored
        return None

    handle = register_module_module_registration_hook(on_registration)  # type: ignore[arg-type]  # it may return a module
    try:
        yield
    finally:
        handle.remove()
        for parent, name, absent in places:
            if parent._modules.get(name) is absent:
                parent._modules[name] = absent.original[0]
