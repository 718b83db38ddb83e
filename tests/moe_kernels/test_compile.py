"""Every kernel compiles for real GPUs: some variants of it, and all of them where there is one.

Needs no GPU, but a process in which Triton does not interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("variants", ["some", pytest.param("all", marks=pytest.mark.gpu)])  # all take minutes
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.gpu), 90])
def test_every_kernel_compiles_natively(arch, variants, tmp_path):
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
    }
    command = [sys.executable, "-m", "tests.moe_kernels.compile_kernels", str(arch), variants]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
