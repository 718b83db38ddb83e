import json

import numpy as np
import pytest

from eplb.planning.placement import Placement
from eplb.planning.placement_file import load_placements, save_placements


def some_layers():
    first = Placement(np.array([[2, -1, 0], [-1, 1, 0]]), 3)
    second = Placement(np.array([[3, 1, -1], [0, 2, -1]]), 4)
    return [first, second], [np.array([[1, 0, 0.25], [0, 1, 0.75]]), np.array([[1.0, 1, 0], [1, 1, 0]])]


def test_what_is_saved_is_read(tmp_path):
    placements, shares = some_layers()
    path = tmp_path / "placements.json"
    save_placements(path, placements, shares)
    first, second = load_placements(path, [3, 4])
    np.testing.assert_array_equal(first.placement.lanes_WS, [[0, 2, -1], [0, 1, -1]])
    np.testing.assert_array_equal(first.shares_WS, [[0.25, 1, 0], [0.75, 1, 0]])
    np.testing.assert_array_equal(second.placement.lanes_WS, [[1, 3, -1, -1], [0, 2, -1, -1]])
    assert [p.name for p in tmp_path.iterdir()] == ["placements.json"]
    save_placements(path, placements[:1])  # over it, with equal shares
    (only,) = load_placements(path, 3)
    np.testing.assert_array_equal(only.shares_WS, [[0.5, 1, 0], [0.5, 1, 0]])


def test_what_breaks_a_rule_is_not_saved(tmp_path):
    placements, shares = some_layers()
    path = tmp_path / "placements.json"
    for bad_placements, bad_shares, message in [
        (placements, shares[:1], "shares has 1 layers"),
        ([Placement(np.array([[0, 1], [0, -1]]), 2)], None, r"placements\[0\].*same number"),
        ([Placement(np.array([[0, 0]]), 2)], None, r"placements\[0\].*expert 1 has no replica"),
        (placements, [shares[0] * 2, shares[1]], r"placements\[0\].*sum to"),
        (None, None, "placements must be a list of them, one of each layer, got None"),
        (placements[0], None, "placements must be a list of them, one of each layer, got Placement"),
        (["x"], None, r"placements\[0\] must be a Placement, got 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_placements(path, bad_placements, bad_shares)
    assert not path.exists()


def test_other_files_are_refused_with_their_path(tmp_path):
    placements, shares = some_layers()
    path = tmp_path / "placements.json"
    save_placements(path, placements, shares)
    good = json.loads(path.read_text())

    def changed(layer=None, **other):
        raw = json.loads(json.dumps(good))
        raw.update(other)
        raw["layers"][1].update(layer or {})
        return json.dumps(raw)

    for text, message in [
        ("{", "is no JSON"),
        ("[]", "'format'"),
        (changed(format="else"), "'format'"),
        (changed({"num_experts": 5}), "layer 1: .*expert 4 has no replica"),
        (changed({"num_experts": 3.5}), "layer 1: num_experts=3.5"),
        (changed({"experts": [[0, 1], [2, 9]]}), "layer 1: .*holds 9"),
        (changed({"experts": [[0, 1], [2, -1]]}), "layer 1: .*negative"),
        (changed({"experts": [[0, 1], [2]]}), "layer 1: "),
        (changed({"experts": [[0, 1, 2, 3]]}), "layer 1: .*equal shape"),
        (changed({"shares": [[1, 1], [1, 0.5]]}), "layer 1: .*sum to"),
        (changed({"shares": [[1, 1], [1, "x"]]}), "layer 1: "),
        (json.dumps({"format": good["format"], "layers": [{}]}), "layer 0: lacks 'num_experts'"),
        (json.dumps({"format": good["format"], "layers": [3]}), "layer 0: must be an object"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_placements(path, 3)
        assert "placements.json" in str(caught.value)
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="layer 0: 2 experts on a rank"):
        load_placements(path, 1)
    assert [one.placement.num_lanes for one in load_placements(path)] == [2, 2]
    with pytest.raises(ValueError, match="holds 2 layers, num_lanes has 3"):
        load_placements(path, [3, 3, 3])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_placements(tmp_path / "nowhere.json", 3)


def test_no_path_is_refused():
    placements, _ = some_layers()
    with pytest.raises(ValueError, match="path must be a file's, got None"):
        save_placements(None, placements)
    with pytest.raises(ValueError, match="path must be a file's, got 3"):
        load_placements(3)
