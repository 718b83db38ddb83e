"""What a measurement depends on: columns for every CSV."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Hardware, versions and commit; a commit with uncommitted changes ends in ``+``."""
    has_gpu = torch.cuda.is_available()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "-"
    return {
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if has_gpu
        else "-",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        # A copy of the tree without its history can be told.
        "commit": os.environ.get("BENCH_COMMIT") or _output("git", "describe", "--always", "--dirty=+", "--exclude=*"),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
