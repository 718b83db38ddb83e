"""Policy "static": nothing ever moves; shares stay equal, or are the best ones."""

from __future__ import annotations

import numpy as np

from eplb.planning.policy.base import Proposal, Topology, check_input, register_policy
from eplb.planning.shares import balanced_shares, equal_shares_of


@register_policy("static")
class StaticPolicy:
    """Keeps the placement. A twin to compare with, and a way to follow the load by shares alone.

    Args:
        balance_shares: False (default): every replica of an expert gets the same share. True: the shares that minimise
            the largest rank load.
    """

    def __init__(self, balance_shares: bool = False) -> None:
        self.balance_shares = balance_shares

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        """See `eplb.planning.policy.Policy.propose`."""
        load_LNE, physical_LWP = check_input(load_LNE, physical_LWP, topology)
        if self.balance_shares:
            shares_LWP = balanced_shares(load_LNE.mean(axis=1), physical_LWP)
        else:
            shares_LWP = equal_shares_of(physical_LWP, load_LNE.shape[2])
        return Proposal(physical_LWP, shares_LWP)
