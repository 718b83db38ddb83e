"""What the demo found, as figures, a table and a picture."""

from typing import Any

import numpy as np
import torch

from moe_layer.demo.serve import Recording, Setup


def imbalance(rows_SLW: np.ndarray) -> np.ndarray:
    """max/mean of the ranks' rows, averaged over layers, by step: ``[S]``. rows: steps, layers, ranks."""
    return (rows_SLW.max(axis=2) / rows_SLW.mean(axis=2)).mean(axis=1)


def stacked(recordings: list[Recording], name: str) -> np.ndarray:
    """One kind of rows of all ranks, ``[steps, layers, ranks]``."""
    return np.stack([np.array(getattr(recording, name)) for recording in recordings], axis=2)


def figures(setup: Setup, recordings: list[Recording], device_name: str, seconds: float) -> dict[str, Any]:
    """Every figure of the run."""
    moving, batch, still = (
        imbalance(stacked(recordings, name)) for name in ("moving_rows", "batch_rows", "still_rows")
    )
    tenth = max(1, setup.steps // 10)
    # A step is as slow as its slowest rank, and relocating if it is so on any rank.
    step_ms = np.array([recording.step_ms for recording in recordings]).max(axis=0)
    relocating = np.asarray(np.any([recording.relocating for recording in recordings], axis=0))
    root = recordings[0].metrics
    return {
        "max_abs_difference": max(recording.max_abs_difference for recording in recordings),
        "flips": root["flips"],
        "waves": root["waves"],
        "moved_experts": root["moved_experts"],
        "moved_bytes": root["moved_bytes"],
        "failures": sum(recording.metrics["failures"] for recording in recordings),
        "imbalance_before": float(moving[:tenth].mean()),
        "imbalance_after": float(moving[-tenth:].mean()),
        "imbalance_after_by_batch": float(batch[-tenth:].mean()),
        "imbalance_largest": float(moving[tenth:].max()),
        "imbalance_largest_by_batch": float(batch[tenth:].max()),
        "imbalance_before_without_moving": float(still[:tenth].mean()),
        "imbalance_after_without_moving": float(still[-tenth:].mean()),
        "step_ms_quiet": _times(step_ms[~relocating]),
        "step_ms_relocating": _times(step_ms[relocating]),
        "step_ms_twin": _times(np.array([recording.twin_step_ms for recording in recordings]).max(axis=0)),
        "slowest_steps": [
            {"step": int(step), "ms": float(step_ms[step]), "relocating": bool(relocating[step])}
            for step in np.argsort(-step_ms)[:8]
        ],
        "planning_ms_last": root["planning_seconds"] * 1e3,
        "fill_ms_last": root["fill_seconds"] * 1e3,
        "steps": setup.steps,
        "steps_relocating": int(relocating.sum()),
        "ranks": setup.ranks,
        "device": device_name,
        "backend": setup.backend,
        "torch": torch.__version__,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "num_layers": setup.num_layers,
        "hidden_size": setup.hidden_size,
        "intermediate_size": setup.intermediate_size,
        "num_experts": setup.num_experts,
        "top_k": setup.top_k,
        "num_redundant_experts": setup.num_redundant_experts,
        "tokens_per_rank": setup.tokens_per_rank,
        "policy": setup.policy,
        "seconds": seconds,
        "health": recordings[0].health,
    }


def _times(milliseconds: np.ndarray) -> dict[str, float] | None:
    if not milliseconds.size:
        return None
    return {"median": float(np.median(milliseconds)), "p99": float(np.percentile(milliseconds, 99))}


def table(found: dict[str, Any]) -> str:
    """The figures for people."""

    def times(name: str) -> str:
        value = found[name]
        return f"{value['median']:.2f} / {value['p99']:.2f}" if value else "-"

    rows = [
        ("model", f"{found['num_layers']} layers of {found['num_experts']} + {found['num_redundant_experts']} experts, "
                  f"top-{found['top_k']}, {found['hidden_size']} × {found['intermediate_size']}, {found['dtype']}"),
        ("ranks", f"{found['ranks']} × {found['device']}, {found['backend']}"),
        ("max/mean load, first tenth", f"{found['imbalance_before']:.3f}"),
        ("max/mean load, last tenth", f"{found['imbalance_after']:.3f}"),
        ("  … with shares solved in each batch", f"{found['imbalance_after_by_batch']:.3f}"),
        ("  … of the twin that never moves", f"{found['imbalance_after_without_moving']:.3f}"),
        ("worst step after the first tenth", f"{found['imbalance_largest']:.3f}"),
        ("  … with shares solved in each batch", f"{found['imbalance_largest_by_batch']:.3f}"),
        ("flips (tables × versions)", f"{found['flips']}"),
        ("moves (experts fetched)", f"{found['moved_experts']}"),
        ("bytes moved", f"{found['moved_bytes']:,}"),
        ("quiet step, ms (median / p99)", times("step_ms_quiet")),
        ("relocating step, ms (median / p99)", times("step_ms_relocating")),
        ("relocating steps", f"{found['steps_relocating']} of {found['steps']}"),
        ("largest |difference| of outputs", f"{found['max_abs_difference']:g}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def draw(recordings: list[Recording], path: str) -> None:
    """Load per rank over time, flips marked, with and without moving."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(4, 1, figsize=(9, 9.5), sharex=True, height_ratios=(3, 3, 3, 2))
    flips = np.flatnonzero(np.array(recordings[0].flips))
    parts = (
        ("still_rows", "experts stay where they are"),
        ("moving_rows", "experts move while they serve; replicas share by the last window"),
        ("batch_rows", "experts move while they serve; replicas share by what each batch holds"),
    )
    for axis, (name, title) in zip(axes[:3], parts, strict=True):
        rows_SLW = stacked(recordings, name)
        load_SW = (rows_SLW / rows_SLW.mean(axis=2, keepdims=True)).mean(axis=1)
        for rank in range(load_SW.shape[1]):
            axis.plot(_smooth(load_SW[:, rank]), linewidth=1.2, label=f"rank {rank}")
        axis.axhline(1.0, color="black", linewidth=0.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("load / mean")
    top = max(axis.get_ylim()[1] for axis in axes[:3])
    bottom = min(axis.get_ylim()[0] for axis in axes[:3])
    for axis in axes[:3]:
        axis.set_ylim(bottom, top)
    axes[0].legend(ncols=len(recordings), fontsize=8, loc="upper right")
    for label, name, color in (
        ("staying", "still_rows", "tab:gray"),
        ("moving, by window", "moving_rows", "tab:blue"),
        ("moving, by batch", "batch_rows", "tab:green"),
    ):
        axes[3].plot(_smooth(imbalance(stacked(recordings, name))), label=label, color=color, linewidth=1.2)
    axes[3].set_ylabel("max/mean load")
    axes[3].set_xlabel("step")
    axes[3].legend(fontsize=8, loc="upper right")
    for axis in axes[1:]:
        for step in flips:
            axis.axvline(step, color="tab:red", linewidth=0.4, alpha=0.5)
    fig.text(0.99, 0.005, "red: a flip; averages over layers and 9 steps", ha="right", fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
