"""The relocation that `bench.relocation` asks for: every expert goes to the next rank. NumPy only, for the planning process."""

import numpy as np

from eplb.planning.policy import Proposal, Topology
from eplb.planning.shares import equal_shares_of


class Rotation:
    """A policy whose every plan moves all experts of all layers, whatever the load."""

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        rotated_LWP = np.roll(physical_LWP, 1, axis=1)
        return Proposal(rotated_LWP, equal_shares_of(rotated_LWP, load_LNE.shape[2]))
