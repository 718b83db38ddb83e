"""All steps of a forward: makes dataclasses arguments of `torch.library`'s ops, whose schemas know none."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

TENSORS = (torch.Tensor, torch.Tensor | None)


class Structure:
    """How a dataclass is taken apart and put together: a flat argument for each field, but one list for all its integers.

    (A registered call takes the host 2 µs longer for each argument.)

    Attributes:
        kind: the dataclass.
        types: of the flat arguments, by name.
        tensors: the names of the fields that are tensors.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        hints = typing.get_type_hints(kind)
        types = {field.name: hints[field.name] for field in fields(kind)}
        integers = [name for name, hint in types.items() if hint in (int, bool)]
        self._integers = tuple((name, types[name] is bool) for name in integers) if len(integers) > 1 else ()
        packed = {name for name, _ in self._integers}
        self.types = {name: hint for name, hint in types.items() if name not in packed}
        self._names = tuple(self.types)
        if self._integers:
            self.types["integers"] = list[int]
        self.tensors = tuple(name for name, hint in types.items() if hint in TENSORS)

    def flatten(self, instance: Any) -> list[Any]:
        """The values of the flat arguments. (`torch.compile` reads this.)"""
        flat = [getattr(instance, name) for name in self._names]
        if self._integers:
            integers = []
            for name, is_bool in self._integers:
                value = getattr(instance, name)
                integers.append(int(value) if is_bool else value)
            flat.append(integers)
        return flat

    def rebuild(self, flat: Iterator[Any]) -> Any:
        """The instance of the next values of `flat`. What its class checks was checked when the first one was made."""
        instance: Any = object.__new__(self.kind)
        values = instance.__dict__
        for name in self._names:
            values[name] = next(flat)
        if self._integers:
            for (name, is_bool), value in zip(self._integers, next(flat), strict=True):
                values[name] = bool(value) if is_bool else value
        return instance
