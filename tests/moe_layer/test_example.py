"""`examples/decoder_block.py` as a user runs it."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "decoder_block.py"


def test_alone_it_says_that_there_is_nothing_to_balance(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("decoder_block", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "STEPS", 40)
    assert example.main() == 0
    said = capsys.readouterr().out
    assert "0 flips, 0 experts moved" in said
    assert "there is nothing to balance" in said
    assert "rank 0: largest difference from a twin that never moves: 0.0\n" in said


def test_two_ranks_under_torchrun():
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    assert process.returncode == 0, said + complained
    for rank in range(2):
        assert f"rank {rank}: largest difference from a twin that never moves: 0.0" in said, said
    flips = re.search(r"(\d+) flips, (\d+) experts moved", said)
    assert flips and int(flips[1]) > 0, said
    assert len(re.findall(r"experts on rank \d: \[[\d, ]+\] → \[[\d, ]+\]", said)) == 2, said
    assert "nothing to balance" not in said
