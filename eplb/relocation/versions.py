"""Rebalance, publish → grace: `Versions`, what a layer's lanes hold, from the oldest version in use to the newest.

The one owner: the table on the device, the planner and the pool's free slots all follow from it (I1).
"""

import functools
import threading
from dataclasses import dataclass

import numpy as np

from eplb.planning.placement import Placement


@dataclass(frozen=True, eq=False)
class Version:
    """One state of a layer; never changes.

    Attributes:
        number: grows from version to version; not every layer has every number.
        placement: which expert each lane of each rank holds.
        shares_WS: float ``[W, S]``, the part of its expert's tokens that each lane gets.
        slots_S: the pool's slot of each of this rank's own lanes, -1 for an empty lane.
    """

    number: int
    placement: Placement
    shares_WS: np.ndarray
    slots_S: tuple[int, ...]

    @functools.cached_property
    def slot_of_lane_S(self) -> np.ndarray:
        """`slots_S` as an array: what looks at all slots of all layers does so without a loop in Python."""
        return np.array(self.slots_S, dtype=np.int64)


class Versions:
    """The versions of a layer that are not graced.

    Attributes:
        ungraced: oldest first. Replaced as a whole, so whoever reads it sees one state.
        current: what the device's table says: the version that was flipped last. A flip sets it, under `Gate.lock`.
    """

    def __init__(self, first: Version) -> None:
        self._lock = threading.Lock()
        self.ungraced: tuple[Version, ...] = (first,)
        self.current = first

    @property
    def newest(self) -> Version:
        """Published; it may wait to be flipped."""
        return self.ungraced[-1]

    def publish(self, version: Version) -> None:
        with self._lock:
            assert version.number > self.newest.number, f"version {version.number} after {self.newest.number}"
            self.ungraced = (*self.ungraced, version)

    def grace_before(self, number: int) -> None:
        """Nobody uses a version older than `number` any more: forget those."""
        with self._lock:
            assert self.current.number >= number, f"version {self.current.number} is current, so in use"
            self.ungraced = tuple(version for version in self.ungraced if version.number >= number)
