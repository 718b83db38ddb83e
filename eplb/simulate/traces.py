"""Load traces: tokens per logical expert, batch by batch, read from files or made up.

Shape letters: B batches (or steps), L layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

DEEPSEEK_EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
"""The loads in DeepSeek's README (2 layers of 12 experts; there with 16 replicas, 4 groups, 2 nodes, 8 ranks)."""


R1_SHAPE = (0.12, 1.5)
"""Range of the gamma shape of a layer, for loads like DeepSeek-R1's: 256 experts on 32 ranks, 8 on each, then have
(max − mean) / mean of 1.57 on average over layers (published: 1.56), 0.5 in the most even of 58 (0.46)."""


@dataclass(frozen=True)
class Trace:
    """Attributes:
    name: shown in tables and pictures.
    load_BLE: float64 [B, L, E], tokens of each expert in each batch; not negative.
    """

    name: str
    load_BLE: np.ndarray

    def __post_init__(self) -> None:
        load_BLE = np.asarray(self.load_BLE, dtype=np.float64)
        if load_BLE.ndim != 3 or 0 in load_BLE.shape:
            raise ValueError(f"load_BLE has shape {load_BLE.shape}: must be [batches, layers, experts], none of them 0")
        if not np.isfinite(load_BLE).all() or (load_BLE < 0).any():
            raise ValueError("load_BLE: must be finite and not negative")
        object.__setattr__(self, "load_BLE", load_BLE)


def load_trace(path: str | Path) -> Trace:
    """A trace from a file.

    `.npz` or `.npy`: an array `load_BLE` [batches, layers, experts] (in an `.npz`, the only array may have any name).
    `.pt`: a dump of SGLang's expert distribution recorder, a dict with `logical_count` [steps, layers, experts], or
    [layers, experts] for one step; loaded with `weights_only=True`, so that it cannot run code.

    Raises:
        ValueError: another suffix, or a file that holds no such array of real numbers.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"path={str(path)!r}: the suffix must be {', '.join(_READERS)}")
    with open(path, "rb") as file:
        try:
            load = np.asarray(_READERS[path.suffix](file))
            if load.dtype.kind not in "iuf":
                raise ValueError(f"must hold real numbers, has {load.dtype}")
            return Trace(path.name, load[None] if load.ndim == 2 else load)
        except (
            Exception
        ) as error:  # zip, pickle and NumPy raise what they like for a file that is cut off or of another kind
            what = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"path={str(path)!r}: {what}") from error


def _read_npz(file: BinaryIO) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("is no .npz archive")
        name = "load_BLE" if "load_BLE" in arrays.files or len(arrays.files) != 1 else arrays.files[0]
        if name not in arrays.files:
            raise ValueError(f"must hold an array 'load_BLE', has {arrays.files}")
        return np.asarray(arrays[name])


def _read_npy(file: BinaryIO) -> np.ndarray:
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_pt(file: BinaryIO) -> np.ndarray:
    import torch  # only here: planning needs no torch

    data = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(data, dict) or not isinstance(data.get("logical_count"), torch.Tensor):
        raise ValueError("must hold a dict with a tensor 'logical_count'")
    count = data["logical_count"]
    if count.dtype.is_complex or count.dtype is torch.bool:
        raise ValueError(f"must hold real numbers, has {count.dtype}")
    return np.asarray(count.to(torch.float64).numpy())


_READERS = {".pt": _read_pt, ".npz": _read_npz, ".npy": _read_npy}


def _number_in(argument: str, value: str) -> float:
    """The parameter of "zipf:0.8" and its like."""
    name, _, parameter = value.partition(":")
    try:
        number = float(parameter)
    except ValueError:
        number = -1.0
    if not 0 <= number < np.inf:
        raise ValueError(f"{argument}={value!r}: {name} needs a number that is not negative, as in '{name}:0.8'")
    return number


def base_load(kind: str, num_layers: int, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Expected load of each expert, mean 1: [L, E].

    `kind`: "zipf:S" (the k-th hottest gets k**-S; which expert is k-th is drawn per layer), "lognormal:SIGMA", "gamma:SHAPE"
    (SHAPE 1 is exponential, less is more uneven), "pareto:ALPHA" (ALPHA up to 2 has no variance), "uniform", "r1" (as uneven
    as published traces of DeepSeek-R1: gamma, its shape drawn per layer), or "deepseek" (the example in DeepSeek's README;
    its shape is 2 × 12).

    Raises:
        ValueError: an unknown kind, a bad parameter, or "deepseek" with another shape.
    """
    name = kind.partition(":")[0]
    if name == "deepseek":
        if (num_layers, num_experts) != DEEPSEEK_EXAMPLE.shape:
            raise ValueError(f"load='deepseek' has 2 layers of 12 experts, not {num_layers} of {num_experts}")
        load = DEEPSEEK_EXAMPLE.copy()
    elif name == "uniform":
        load = np.ones((num_layers, num_experts))
    elif name == "r1":
        shape_L1 = np.exp(rng.uniform(np.log(R1_SHAPE[0]), np.log(R1_SHAPE[1]), num_layers))[:, None]
        load = rng.gamma(shape_L1, 1.0, (num_layers, num_experts))
    elif name in ("gamma", "pareto"):
        value = _number_in("load", kind)
        if not value:
            raise ValueError(f"load={kind!r}: {name} needs a number above 0")
        shape = (num_layers, num_experts)
        load = rng.gamma(value, 1.0, shape) if name == "gamma" else 1.0 + rng.pareto(value, shape)
    elif name in ("zipf", "lognormal"):
        value = _number_in("load", kind)
        if name == "zipf":
            ranked = np.arange(1, num_experts + 1, dtype=np.float64) ** -value
            load = np.stack([rng.permutation(ranked) for _ in range(num_layers)])
        else:
            load = rng.lognormal(0.0, value, (num_layers, num_experts))
    else:
        raise ValueError(
            f"load={kind!r}: must be zipf:S, lognormal:SIGMA, gamma:SHAPE, pareto:ALPHA, r1, uniform or deepseek"
        )
    return load / load.mean(axis=1, keepdims=True)


def change_load(load_LE: np.ndarray, change: str, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The load after a change.

    `change`: "none"; "noise:SIGMA" (each load times a lognormal factor); "hotset" (the E / 16 hottest experts of each layer,
    at least one, exchange their loads with as many others); "new" (drawn anew from `kind`).

    Raises:
        ValueError: an unknown change, or a bad parameter.
    """
    name = change.partition(":")[0]
    if name == "none":
        return load_LE
    if name == "noise":
        return load_LE * rng.lognormal(0.0, _number_in("change", change), load_LE.shape)
    if name == "new":
        return base_load(kind, load_LE.shape[0], load_LE.shape[1], rng)
    if name != "hotset":
        raise ValueError(f"change={change!r}: must be none, noise:SIGMA, hotset or new")
    changed = load_LE.copy()
    num_hot = max(1, load_LE.shape[1] // 16)
    for old, new in zip(load_LE, changed, strict=True):
        order = np.argsort(-old, kind="stable")
        hot, others = order[:num_hot], rng.permutation(order[num_hot:])[:num_hot]
        hot = hot[: others.size]
        new[hot], new[others] = old[others], old[hot]
    return changed


def generate(
    kind: str,
    change: str,
    *,
    num_layers: int,
    num_experts: int,
    num_windows: int,
    batches_per_window: int,
    change_every: int = 1,
    assignments_per_batch: int = 8192,
    seed: int = 0,
) -> Trace:
    """A trace whose expected load changes every `change_every` windows; batches are Poisson around it.

    "noise" changes accumulate: a random walk, drift. `assignments_per_batch`: tokens · top-k of a batch, over all experts.

    Raises:
        ValueError: an unknown kind or change, or a number that is not positive.
    """
    for name, value in (
        ("num_layers", num_layers),
        ("num_experts", num_experts),
        ("num_windows", num_windows),
        ("batches_per_window", batches_per_window),
        ("change_every", change_every),
        ("assignments_per_batch", assignments_per_batch),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    rng = np.random.default_rng(seed)
    load_LE = base_load(kind, num_layers, num_experts, rng)
    windows = []
    for window in range(num_windows):
        if window and window % change_every == 0:
            load_LE = change_load(load_LE, change, kind, rng)
        expected = load_LE / load_LE.sum(axis=1, keepdims=True) * assignments_per_batch
        windows.append(rng.poisson(expected, (batches_per_window, *expected.shape)))
    return Trace(f"{kind} {change}", np.concatenate(windows))
