"""Hardware, versions and commit: columns of every CSV."""

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


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
        "commit": commit_of(ROOT, "BENCH_COMMIT"),
    }


def commit_of(root: Path, variable: str) -> str:
    """The commit of a checkout; ``+`` behind it says that there are uncommitted changes.

    A copy without history cannot tell: then the environment variable `variable` does.
    """
    told = os.environ.get(variable)
    if told:
        return told
    if _output("git", "rev-parse", "--show-toplevel", cwd=root) != str(root.resolve()):
        return "unknown"  # a folder inside another repository
    return _output("git", "describe", "--always", "--dirty=+", "--exclude=*", cwd=root)


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
