import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb.planning.balance import (
    balancedness,
    free_placement_bound,
    layer_balancedness,
    max_over_mean,
    per_batch_imbalance,
    rank_loads,
)
from eplb.planning.placement import Placement
from eplb.planning.placement_file import load_placements
from eplb.planning.policy import Topology, make_policy
from eplb.planning.shares import balanced_shares, equal_shares
from eplb.simulate import __main__ as command
from eplb.simulate.offline import plan_offline
from eplb.simulate.replay import simulate
from eplb.simulate.traces import DEEPSEEK_EXAMPLE, Trace, base_load, change_load, generate, load_trace


def test_metrics_by_hand():
    assert max_over_mean(np.array([1, 2, 3])) == 1.5
    assert balancedness(np.array([[1, 2, 3], [0, 0, 0]])).tolist() == [2 / 3, 1]
    placement = Placement(np.array([[0, -1], [0, 1]]), 2)
    assert layer_balancedness(np.array([4, 2]), placement, equal_shares(placement)) == 3 / 4
    batches = np.array([[[4, 2]], [[0, 2]]])
    shares = equal_shares(placement)[None]
    np.testing.assert_allclose(per_batch_imbalance(batches, placement.lanes_WS[None], shares), np.array([[4 / 3], [2]]))


def test_bound_by_hand():
    # Total 24 over 3 ranks is 8; but expert 0 (20) would need 3 replicas for 8, and there are 4 slots for 3 experts: 20 / 2.
    assert free_placement_bound(np.array([[20.0, 2, 2]]), 3, 4).tolist() == [10]
    assert free_placement_bound(np.array([[20.0, 2, 2]]), 3, 6).tolist() == [8]
    assert free_placement_bound(np.zeros((1, 3)), 3, 3).tolist() == [0]
    with pytest.raises(ValueError, match="num_physical=2"):
        free_placement_bound(np.ones((1, 3)), 3, 2)


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_no_placement_beats_the_bound(ranks, per_rank, data):
    size = ranks * per_rank
    experts = data.draw(st.integers(1, size))
    load = np.array([data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))], dtype=float)
    extra = data.draw(st.lists(st.integers(0, experts - 1), min_size=size - experts, max_size=size - experts))
    physical = np.array(data.draw(st.permutations(list(range(experts)) + extra))).reshape(1, ranks, per_rank)
    best = rank_loads(load, physical, balanced_shares(load, physical)).max()
    assert best >= free_placement_bound(load, ranks, size)[0] * (1 - 1e-9)


def test_policies_side_by_side():
    trace = generate("lognormal:0.8", "noise:0.1", num_layers=4, num_experts=32, num_windows=6, batches_per_window=8)
    runs = {
        name: simulate(
            trace, make_policy(name), Topology(4), num_redundant_experts=8, batches_per_window=8, bytes_per_expert=3
        )
        for name in ("static", "deepseek", "adaptive")
    }
    first = {name: results[0].max_over_mean for name, results in runs.items()}
    assert len(set(first.values())) == 1  # all start with the same placement
    last = {name: results[-1] for name, results in runs.items()}
    assert last["adaptive"].max_over_mean < 1.06 < last["static"].max_over_mean
    assert sum(r.moves for r in runs["static"]) == 0
    assert 0 < sum(r.moves for r in runs["adaptive"]) < 0.3 * sum(r.moves for r in runs["deepseek"])
    for results in runs.values():
        for result in results:
            assert result.per_batch >= result.max_over_mean * 0.999 >= result.bound * 0.998
            assert result.worst_layer >= result.max_over_mean
            assert result.moved_bytes == 3 * result.moves


def test_a_forecast_serves_the_next_window_better():
    load = base_load("lognormal:0.8", 4, 32, np.random.default_rng(0))
    noise = np.random.default_rng(1).lognormal(0, 0.2, (16, 1, 4, 32))
    windows = np.repeat(load * 1000 * noise, 4, axis=1)  # batches of a window are alike
    trace = Trace("noise", windows.reshape(-1, 4, 32).astype(np.int64))
    sizes = {"num_redundant_experts": 8, "batches_per_window": 4}
    last, several = (
        simulate(trace, make_policy("adaptive"), Topology(4), forecast_windows=count, **sizes)[4:] for count in (1, 8)
    )
    assert np.mean([r.max_over_mean for r in several]) < np.mean([r.max_over_mean for r in last]) - 0.01
    assert sum(r.moves for r in several) < 0.5 * sum(r.moves for r in last)


def test_generators():
    rng = np.random.default_rng(0)
    zipf = base_load("zipf:1.2", 3, 64, rng)
    np.testing.assert_allclose(zipf.mean(axis=1), 1)
    np.testing.assert_allclose(np.sort(zipf, axis=1)[:, ::-1] / zipf.max(), np.tile(np.arange(1, 65.0) ** -1.2, (3, 1)))
    hot = change_load(zipf, "hotset", "zipf:1.2", rng)
    assert ((hot != zipf).sum(axis=1) <= 8).all() and (hot != zipf).any(axis=1).all()
    np.testing.assert_allclose(np.sort(hot, axis=1), np.sort(zipf, axis=1))
    np.testing.assert_allclose(change_load(zipf, "noise:0.01", "", rng), zipf, rtol=0.06)
    assert base_load("deepseek", 2, 12, rng).shape == DEEPSEEK_EXAMPLE.shape
    a, b = (
        generate("zipf:1", "new", num_layers=2, num_experts=8, num_windows=3, batches_per_window=2, seed=4)
        for _ in range(2)
    )
    np.testing.assert_array_equal(a.load_BLE, b.load_BLE)
    for kind in ("zipf", "zipf:-1", "zipf:x", "normal:1"):
        with pytest.raises(ValueError, match="load="):
            base_load(kind, 2, 8, rng)
    with pytest.raises(ValueError, match="deepseek"):
        base_load("deepseek", 2, 8, rng)
    for change in ("sometimes", "noise", "noise:-1", "noise:nan", "noise:x"):
        with pytest.raises(ValueError, match=f"change='{change}'"):
            change_load(zipf, change, "zipf:1", rng)


def test_traces_from_files(tmp_path):
    load = np.random.default_rng(0).integers(0, 9, (5, 2, 8))
    np.savez(tmp_path / "a.npz", load_BLE=load)
    np.save(tmp_path / "b.npy", load)
    torch.save({"logical_count": torch.as_tensor(load), "rank": 0}, tmp_path / "c.pt")
    for name in ("a.npz", "b.npy", "c.pt"):
        np.testing.assert_array_equal(load_trace(tmp_path / name).load_BLE, load)
    torch.save({"logical_count": torch.as_tensor(load[0])}, tmp_path / "one.pt")
    assert load_trace(tmp_path / "one.pt").load_BLE.shape == (1, 2, 8)
    torch.save([1], tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", x=load, y=load)
    (tmp_path / "bad.csv").write_text("1")
    for name in ("bad.pt", "bad.npz", "bad.csv"):
        with pytest.raises(ValueError, match="path="):
            load_trace(tmp_path / name)
    with pytest.raises(ValueError, match="load_BLE"):
        Trace("x", np.ones(3))
    with pytest.raises(ValueError, match="negative"):
        Trace("x", -np.ones((1, 1, 1)))


def bad_files(folder):
    """Files that hold no trace, by what is wrong with each."""
    load = np.random.default_rng(0).integers(0, 9, (5, 2, 8))
    np.savez(folder / "good.npz", load_BLE=load)
    np.save(folder / "good.npy", load)
    torch.save({"logical_count": torch.as_tensor(load)}, folder / "good.pt")
    for suffix in ("npz", "npy", "pt"):
        good = (folder / f"good.{suffix}").read_bytes()
        for name, content in (
            ("empty", b""),
            ("cut", good[:200]),
            ("half", good[: len(good) // 2]),
            ("text", b"hello\n" * 99),
        ):
            (folder / f"{name}.{suffix}").write_bytes(content)
            yield folder / f"{name}.{suffix}"
    for name, value in (
        ("text in it", "text"),
        ("none", {"logical_count": None}),
        ("text value", {"logical_count": "x"}),
        ("array", np.ones((2, 2))),
        ("a list", [1, 2]),
        ("complex", {"logical_count": torch.ones(1, 2, 8, dtype=torch.complex64)}),
        ("bool", {"logical_count": torch.ones(1, 2, 8, dtype=torch.bool)}),
        ("nan", {"logical_count": torch.full((1, 2, 8), float("nan"))}),
    ):
        torch.save(value, folder / f"{name}.pt")
        yield folder / f"{name}.pt"
    for name, array in (
        ("complex", load + 1j),
        ("bool", load > 3),
        ("strings", load.astype(str)),
        ("objects", load.astype(object)),
        ("four axes", load[None]),
    ):
        np.save(folder / f"{name}.npy", array)
        np.savez(folder / f"{name}.npz", load_BLE=array)
        yield folder / f"{name}.npy"
        yield folder / f"{name}.npz"
    (folder / "an array.npz").write_bytes((folder / "good.npy").read_bytes())
    yield folder / "an array.npz"
    (folder / "an archive.npy").write_bytes((folder / "good.npz").read_bytes())
    yield folder / "an archive.npy"


def test_files_that_hold_no_trace_are_refused_by_their_path(tmp_path, capsys):
    paths = list(bad_files(tmp_path))
    assert len(paths) > 25
    for path in paths:
        with pytest.raises(ValueError, match=f"path='{path}': .+"):
            load_trace(path)
        assert command.main(["--trace", str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "nowhere.npz")
    assert command.main(["--trace", str(tmp_path / "nowhere.npz")]) == 2


def test_the_command_looks_where_to_write_before_it_computes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("it computes"))
    (tmp_path / "file").write_text("")
    for option, path, message in (
        ("--json", tmp_path / "none" / "o.json", "there is no folder"),
        ("--plot", tmp_path / "none" / "o.png", "there is no folder"),
        ("--json", tmp_path / "file" / "o.json", "there is no folder"),
        ("--json", tmp_path, "is a folder"),
        ("--plot", tmp_path / "o.nonsense", "the suffix must be one of"),
    ):
        assert command.main(["--windows", "1", option, str(path)]) == 2
        assert f"error: {option} {path}: {message}" in capsys.readouterr().err
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--windows", "1", "--plot", str(tmp_path / "o.png")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", load_BLE=np.random.default_rng(0).integers(0, 9, (12, 2, 8)))
    arguments = ["--trace", str(tmp_path / "a.npz"), "--ranks", "2", "--redundant", "2", "--batches-per-window", "3"]
    assert command.main([*arguments, "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")]) == 0
    out = capsys.readouterr().out
    assert "adaptive" in out and "deepseek" in out and "work per batch" in out
    written = json.loads((tmp_path / "o.json").read_text())
    assert len(written["policies"]["adaptive"]) == 4
    assert (tmp_path / "o.png").stat().st_size > 1000


def test_command_says_what_is_wrong(tmp_path, capsys):
    assert command.main(["--ranks", "5", "--windows", "2"]) == 2
    assert "num_redundant_experts=8" in capsys.readouterr().err
    assert command.main(["--policies", "nope", "--windows", "2"]) == 2
    assert "known policies" in capsys.readouterr().err
    assert command.main(["--trace", str(tmp_path / "none.npz")]) == 2
    for arguments, message in (
        (["--load", "zipf:no"], "load='zipf:no': zipf needs a number"),
        (["--change", "noise"], "change='noise': noise needs a number that is not negative"),
        (["--change", "noise:-1"], "change='noise:-1': noise needs a number that is not negative"),
        (["--min-gain", "-1"], "min_gain=-1.0: must be finite and not negative"),
    ):
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    np.savez(tmp_path / "a.npz", load_BLE=np.ones((4, 2, 8)))
    for name in (
        "--layers",
        "--experts",
        "--windows",
        "--batches-per-window",
        "--sub-windows",
        "--free-slots",
        "--ranks",
    ):
        with pytest.raises(SystemExit):
            command.main(["--trace", str(tmp_path / "a.npz"), name, "0"])
        assert f"argument {name}: must be at least 1, got 0" in capsys.readouterr().err


def test_a_min_gain_of_zero_is_zero(monkeypatch):
    made = {}

    def make(name, **options):
        made[name] = options
        return make_policy("static")

    monkeypatch.setattr(command, "make_policy", make)
    assert command.main(["--windows", "1", "--layers", "1", "--policies", "adaptive,deepseek", "--min-gain", "0"]) == 0
    assert made == {"adaptive": {"min_gain": 0.0}, "deepseek": {}}


def test_a_plan_made_offline_serves_what_comes_next(tmp_path, capsys):
    """Loaded again it is where a controller that served the trace would be: far more even than the usual start."""
    trace = generate("zipf:1.0", "noise:0.02", num_layers=3, num_experts=32, num_windows=6, batches_per_window=8)
    np.savez(tmp_path / "trace.npz", load_BLE=trace.load_BLE[:-8])
    arguments = ["--trace", str(tmp_path / "trace.npz"), "--batches-per-window", "8", "--policies", "static,adaptive"]
    assert command.main([*arguments, "--save-placements", str(tmp_path / "placements.json")]) == 0
    assert "adaptive has the experts of 3 layers" in capsys.readouterr().out
    saved = load_placements(tmp_path / "placements.json")
    start = Placement.initial(32, 8, 4, 10)
    load = trace.load_BLE[-8:].sum(axis=0)
    for layer, one in enumerate(saved):
        begun, usual = (
            max_over_mean(rank_loads(load[layer, None], lanes_WS[None], shares_WS[None]))[0]
            for lanes_WS, shares_WS in (
                (one.placement.lanes_WS, one.shares_WS),
                (start.lanes_WS, equal_shares(start)),
            )
        )
        assert begun < 1.05 < 1.3 < usual
    assert command.main([*arguments, "--save-placements", str(tmp_path)]) == 2
    assert "--save-placements" in capsys.readouterr().err


def test_bad_sizes_are_refused():
    trace = Trace("x", np.ones((4, 1, 8)))
    policy, topology = make_policy("static"), Topology(2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batches_per_window": 5}, "batches_per_window=5"),
        ({"batches_per_window": 2, "sub_windows": 3}, "sub_windows=3"),
        ({"batches_per_window": 2, "sub_windows": 1, "free_slots": 0}, "free_slots=0"),
        ({"batches_per_window": 2, "sub_windows": 1, "forecast_windows": 0}, "forecast_windows=0"),
    ]
    for options, name in cases:
        with pytest.raises(ValueError, match=name):
            simulate(trace, policy, topology, num_redundant_experts=0, **options)
        if "free_slots" not in options:
            with pytest.raises(ValueError, match=name):
                plan_offline(trace, policy, topology, num_redundant_experts=0, **options)
    sizes = {"num_layers": 1, "num_experts": 4, "num_windows": 1, "batches_per_window": 1}
    for name in sizes:
        with pytest.raises(ValueError, match=f"{name}=0"):
            generate("uniform", "none", **{**sizes, name: 0})
