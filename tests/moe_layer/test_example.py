"""`examples/decoder_block.py` as a user runs it."""

import re

from tests.examples import load_example, run_on_two_ranks


def test_alone_it_says_that_there_is_nothing_to_balance(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    example = load_example("decoder_block")
    monkeypatch.setattr(example, "STEPS", 40)
    assert example.main() == 0
    said = capsys.readouterr().out
    assert "0 flips, 0 experts moved" in said
    assert "there is nothing to balance" in said
    assert "rank 0: largest difference from a twin that never moves: 0.0\n" in said


def test_two_ranks_under_torchrun():
    said = run_on_two_ranks("decoder_block", timeout=120)
    for rank in range(2):
        assert f"rank {rank}: largest difference from a twin that never moves: 0.0" in said, said
    flips = re.search(r"(\d+) flips, (\d+) experts moved", said)
    assert flips and int(flips[1]) > 0, said
    assert len(re.findall(r"experts on rank \d: \[[\d, ]+\] → \[[\d, ]+\]", said)) == 2, said
    assert "nothing to balance" not in said
