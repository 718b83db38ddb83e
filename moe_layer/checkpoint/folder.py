"""Loading: a checkpoint as `save_pretrained()` writes it: one safetensors file, or several with an index, in a folder."""

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    **dict(zip(("F64", "F32", "F16", "BF16"), FLOAT_DTYPES, strict=True)),
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class CheckpointError(ValueError):
    """A checkpoint does not hold what is asked of it. Nothing was written."""


class Checkpoint:
    """The tensors of a folder, by name. Reads headers at once, and data only when asked. A context manager.

    Args:
        folder: of a local checkpoint. With an index its files are those that it names; else all ``*.safetensors``.

    Raises:
        CheckpointError: no such folder; no safetensors files; the index names a file that is missing.
        ImportError: the package safetensors is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(
                "load_experts_from() needs the package safetensors: pip install 'moe-layer[checkpoint]'"
            ) from error
        self.folder = path_of(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"folder must be a local folder, got {str(folder)!r}: download a checkpoint of the hub first, with "
                "huggingface_hub.snapshot_download()"
            )
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        self._paths_of: dict[int, str] = {}
        with ExitStack() as opened:
            for path, wanted in self._paths().items():
                file = opened.enter_context(safe_open(path, framework="pt", device="cpu"))
                self._paths_of[id(file)] = path.name
                held = set(file.keys())
                if wanted is not None and wanted - held:
                    raise CheckpointError(f"{path} lacks tensors that {INDEX} says it has: {_some(wanted - held)}")
                both = held & self._where.keys()
                if both:
                    raise CheckpointError(f"several files of {self.folder} hold {_some(both)}")
                self._where |= dict.fromkeys(held if wanted is None else wanted, file)
            self._files = opened.pop_all()

    def _paths(self) -> Mapping[Path, set[str] | None]:
        """Its files, with the tensors that the index says are there."""
        index = self.folder / INDEX
        if not index.exists():
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                raise CheckpointError(f"folder must hold *.safetensors files, {str(self.folder)!r} has none")
            return dict.fromkeys(paths)
        files: dict[Path, set[str] | None] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            wanted = files.setdefault(self.folder / file, set())
            assert wanted is not None
            wanted.add(name)
        missing = [path.name for path in files if not path.exists()]
        if missing:
            raise CheckpointError(f"{index} names files that {str(self.folder)!r} lacks: {_some(missing)}")
        return files

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        return list(self._where)

    @property
    def config(self) -> Mapping[str, Any]:
        """See `config_in`."""
        return config_in(self.folder)

    @property
    def files(self) -> dict[str, str]:
        """The file of each tensor."""
        return {name: self._paths_of[id(file)] for name, file in self._where.items()}

    def like(self, name: str, dtypes: Collection[torch.dtype] = FLOAT_DTYPES) -> torch.Tensor:
        """A tensor of the same shape and dtype on the meta device; from the header alone.

        Raises:
            CheckpointError: its dtype is none of `dtypes`.
        """
        header = self._where[name].get_slice(name)
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None or dtype not in dtypes:
            wanted, hint = " or ".join(str(one)[6:] for one in dtypes), ""
            if dtypes == FLOAT_DTYPES:
                hint = (
                    ": quantized experts are loaded into layers that are built so, with "
                    "quantisation=moe_layer.quantisation_of(folder)"
                )
            raise CheckpointError(f"{name} must be {wanted}, is {header.get_dtype()}{hint}")
        return torch.empty(header.get_shape(), dtype=dtype, device="meta")

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """The tensor in host memory; with `row` only that row, ``[1, …]``."""
        if row is None:
            return self._where[name].get_tensor(name)
        return self._where[name].get_slice(name)[row : row + 1]

    def beside(self, prefix: str) -> str:
        """For messages: what there is under `prefix`, numbers left out; or that there is nothing."""
        found = Counter(_without_numbers(name) for name in self._where if name.startswith(prefix))
        if not found:
            return f"no tensor's name begins with {prefix!r}; others are {_some(map(_without_numbers, self._where))}"
        return f"under {prefix!r} there are {_some(found)}"


def path_of(folder: str | Path) -> Path:
    """`folder` as a path, whether it exists or not.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise CheckpointError(f"folder must be a local folder, got {folder!r}")
    return Path(folder)


def config_in(folder: str | Path) -> Mapping[str, Any]:
    """The config.json of a checkpoint; empty if it has none.

    Raises:
        CheckpointError: no such folder.
    """
    if not path_of(folder).is_dir():
        raise CheckpointError(f"folder must be a local folder, got {str(folder)!r}")
    path = path_of(folder) / CONFIG
    return json.loads(path.read_text()) if path.exists() else {}


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _some(names: Any, count: int = 6) -> str:
    """The first few of `names`, and how many more there are."""
    distinct = sorted(set(names))
    more = f" and {len(distinct) - count} more" if len(distinct) > count else ""
    return ", ".join(distinct[:count]) + more
