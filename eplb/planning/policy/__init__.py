"""Policies: from the live placement and the load to the next placement and its shares.

A policy is a pure function in an object: no device, thread or process group; equal input gives equal output in every
process and on every platform. Users add their own with `register_policy`, or pass an object that has `propose`.
"""

from eplb.planning.policy.adaptive import AdaptivePolicy
from eplb.planning.policy.base import (
    Policy,
    Proposal,
    Topology,
    check_input,
    known_policies,
    make_policy,
    register_policy,
)
from eplb.planning.policy.deepseek import DeepSeekPolicy
from eplb.planning.policy.static import StaticPolicy

__all__ = [
    "AdaptivePolicy",
    "DeepSeekPolicy",
    "Policy",
    "Proposal",
    "StaticPolicy",
    "Topology",
    "check_input",
    "known_policies",
    "make_policy",
    "register_policy",
]
