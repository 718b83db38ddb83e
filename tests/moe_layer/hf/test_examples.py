"""The examples with transformers models, as a user runs them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[3]


def test_swap_qwen3(capsys):
    spec = importlib.util.spec_from_file_location("swap_qwen3", ROOT / "examples" / "swap_qwen3.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main() == 0
    said = capsys.readouterr().out
    assert "swapped 3 of 3 blocks of experts" in said and "the same tokens" in said


def test_serve_swapped():
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    example = ROOT / "examples" / "serve_swapped.py"
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    assert process.returncode == 0, said + complained
    assert len(re.findall(r"rank \d: 3 layers registered", said)) == 2, said
    found = re.findall(r"rank \d: \d+ flips, (\d+) experts moved; a fixed prompt was answered alike throughout", said)
    assert len(found) == 2 and all(int(moved) > 0 for moved in found), said
