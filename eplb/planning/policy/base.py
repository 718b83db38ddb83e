"""All policies: what a policy gets and gives, and policies by name.

Shape letters: L layers, N sub-windows, E logical experts, W ranks, P physical experts per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Topology:
    """Where the ranks are.

    Attributes:
        num_ranks: W.
        ranks_per_node: ranks that share a fast network, contiguous; None: one node. Must divide `num_ranks`.
        num_groups: groups of experts, contiguous, for node-limited routing (a token's experts come from few groups);
            1 means that routing is not limited.

    Raises:
        ValueError: a number is not positive, or `ranks_per_node` does not divide `num_ranks`.
    """

    num_ranks: int
    ranks_per_node: int | None = None
    num_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("num_ranks", "ranks_per_node", "num_groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.ranks_per_node is not None and self.num_ranks % self.ranks_per_node:
            raise ValueError(f"ranks_per_node={self.ranks_per_node}: must divide num_ranks={self.num_ranks}")

    @property
    def num_nodes(self) -> int:
        return 1 if self.ranks_per_node is None else self.num_ranks // self.ranks_per_node

    def node_of_rank(self) -> np.ndarray:
        """int64 [W]: the node of each rank."""
        return np.arange(self.num_ranks) // (self.ranks_per_node or self.num_ranks)


@dataclass(frozen=True)
class Proposal:
    """What a policy wants.

    Attributes:
        physical_LWP: int64 [L, W, P], the experts of each rank. Their order inside a rank has no meaning.
        shares_LWP: float64 [L, W, P], the part of its expert's tokens that each replica gets, aligned with
            `physical_LWP`; sums to 1 over an expert's replicas.
    """

    physical_LWP: np.ndarray
    shares_LWP: np.ndarray


@runtime_checkable
class Policy(Protocol):
    """Anything with this method is a policy."""

    def propose(self, load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> Proposal:
        """From the load and the live placement, what should be.

        Args:
            load_LNE: float64 or int64 [L, N, E], tokens of each expert in N ≥ 1 consecutive sub-windows of the load
                window, oldest first. From a controller: a forecast (`eplb.planning.forecast`), whose mean over N is what the
                next window is expected to have, and whose scatter says how well that is known.
            physical_LWP: int64 [L, W, P], what is live now.
            topology: where the ranks are.
        """
        ...


_FACTORIES: dict[str, Callable[..., Policy]] = {}
_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def register_policy(name: str) -> Callable[[_Factory], _Factory]:
    """Class decorator: `make_policy(name, **options)` then calls the class with the options.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        if name in _FACTORIES:
            raise ValueError(f"name={name!r}: a policy of this name is registered already")
        _FACTORIES[name] = factory
        return factory

    return register


def known_policies() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def make_policy(name_or_object: str | Policy, **options: Any) -> Policy:
    """The policy of this name, made with `options`; an object with `propose` is returned as it is.

    Raises:
        ValueError: no policy has this name (known ones are listed), the object has no `propose`, or options come with
            an object.
    """
    if isinstance(name_or_object, str):
        if name_or_object not in _FACTORIES:
            raise ValueError(f"policy={name_or_object!r}: unknown; known policies: {', '.join(known_policies())}")
        return _FACTORIES[name_or_object](**options)
    if not isinstance(name_or_object, Policy):
        raise ValueError(f"policy={name_or_object!r}: must be a name or an object with a method `propose`")
    if options:
        raise ValueError(f"options={sorted(options)}: a policy object takes none; set them when you make it")
    return name_or_object


def check_input(load_LNE: np.ndarray, physical_LWP: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Checks what a policy got; returns the load as float64 and the placement as int64.

    Raises:
        ValueError: a shape, a range or a sum is wrong; names argument, value and rule.
    """
    load_LNE, physical_LWP = np.asarray(load_LNE), np.asarray(physical_LWP)
    if load_LNE.ndim != 3 or load_LNE.shape[1] < 1 or load_LNE.shape[2] < 1:
        raise ValueError(f"load_LNE has shape {load_LNE.shape}: must be [layers, sub-windows ≥ 1, experts ≥ 1]")
    if physical_LWP.ndim != 3 or physical_LWP.dtype.kind not in "iu" or physical_LWP.shape[2] < 1:
        raise ValueError(
            f"physical_LWP has shape {physical_LWP.shape}, dtype {physical_LWP.dtype}: must be integers [layers, ranks, P]"
        )
    if physical_LWP.shape[0] != load_LNE.shape[0]:
        raise ValueError(f"physical_LWP has {physical_LWP.shape[0]} layers: load_LNE has {load_LNE.shape[0]}")
    if physical_LWP.shape[1] != topology.num_ranks:
        raise ValueError(f"physical_LWP has {physical_LWP.shape[1]} ranks: topology has {topology.num_ranks}")
    num_experts = load_LNE.shape[2]
    if num_experts % topology.num_groups:
        raise ValueError(f"num_groups={topology.num_groups}: must divide the {num_experts} experts")
    load_LNE = load_LNE.astype(np.float64)
    if not np.isfinite(load_LNE).all() or (load_LNE < 0).any():
        raise ValueError("load_LNE: must be finite and not negative")
    physical_LWP = physical_LWP.astype(np.int64)
    if physical_LWP.size and (physical_LWP.min() < 0 or physical_LWP.max() >= num_experts):
        raise ValueError(f"physical_LWP holds ids outside [0, {num_experts})")
    flat = physical_LWP.reshape(physical_LWP.shape[0], -1)
    held_LE = np.zeros((flat.shape[0], num_experts), dtype=bool)
    np.put_along_axis(held_LE, flat, True, axis=1)
    if not held_LE.all():
        layer, expert = (int(i) for i in np.argwhere(~held_LE)[0])
        raise ValueError(f"physical_LWP: expert {expert} of layer {layer} has no replica: every expert needs one (I2)")
    return load_LNE, physical_LWP
