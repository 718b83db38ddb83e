"""Policy "adaptive", search: changes that may help an overloaded layer, with an estimate of what each brings.

Shape letters: A layers, W ranks, P physical experts of a rank, Q = W · P lanes counted over ranks, E experts, R replicas of the
split experts of all layers (`eplb.planning.levelling.SplitLoads`), S the most that one layer has of them, K candidates.

Loads are in units of the mean rank load; `limit_A` is the rank load to get below. What counts is the *excess*: the load above
the limit, summed over ranks, when the shares are the best ones. To put a replica of expert e on rank r in place of a replica
of f, with the shares adapted afterwards, takes off about

    min(excess that can leave through e, room that r can reach once f is gone) − load of f that finds no room elsewhere

Load passes from rank to rank through split experts: rank r hands its part of a split expert to the other replicas, at most
what it carries itself. In a graph without cycles, passing messages along it finds exactly what each rank can reach; with
cycles it overestimates, which the caller finds out by solving the shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.planning.levelling import SplitLoads

MESSAGE_ROUNDS = 4
"""How many split experts in a row load is passed through, in the estimate."""

EXPERTS_TRIED = 6
"""Overloaded experts per layer that are tried in every lane that can be given up."""

FLEXIBILITY = 0.2
"""Weight of what a replica is worth beyond the load of now: a replica of a heavy expert lets the shares do more next time."""

FAR_NODE = 0.9
"""Factor on the benefit of a move whose expert has no replica yet in the node: it crosses the slow network."""

TINY = 1e-6
"""Benefits below this (a millionth of a rank's mean load) are none."""


def largest(value_AK: np.ndarray, num: int) -> np.ndarray:
    """Where the `num` largest values of each row are, the largest first; ties go to the first: int64 [A, ≤ num].

    As a stable sort, whose time would be most of the search's: few are asked for, of thousands.
    """
    # Rounded: the last bits differ between platforms (BLAS), and must not decide. Above -inf, which marks the places found.
    left_AK = np.maximum(np.round(value_AK, 9), np.finfo(np.float64).min)
    rows = np.arange(len(left_AK))
    place_AK = np.zeros((len(left_AK), min(num, left_AK.shape[1])), dtype=np.int64)
    for k in range(place_AK.shape[1]):
        place_AK[:, k] = left_AK.argmax(axis=1)
        left_AK[rows, place_AK[:, k]] = -np.inf
    return place_AK


@dataclass
class Changes:
    """K candidates of each layer, best first: put `expert_AKM[..., i]` into lane `lane_AKM[..., i]`; M is 1 or 2 moves.

    Attributes:
        score_AK: estimated excess taken off per move; -inf where there is no candidate.
        num_moves_AK: 1 or 2; with 1, the second entry repeats the first.
    """

    lane_AKM: np.ndarray
    expert_AKM: np.ndarray
    score_AK: np.ndarray
    num_moves_AK: np.ndarray

    def best(self, num: int) -> Changes:
        """The `num` best of each layer; ties go to the first."""
        if not self.score_AK.shape[1]:
            return self._none()
        order = largest(self.score_AK, num)
        rows = np.arange(len(order))[:, None]
        return Changes(
            self.lane_AKM[rows, order],
            self.expert_AKM[rows, order],
            self.score_AK[rows, order],
            self.num_moves_AK[rows, order],
        )

    def _none(self) -> Changes:
        shape = (len(self.score_AK), 1)
        nothing = np.zeros((*shape, 2), dtype=np.int64)
        return Changes(nothing, nothing.copy(), np.full(shape, -np.inf), np.ones(shape, dtype=np.int64))

    def with_(self, other: Changes) -> Changes:
        return Changes(
            np.concatenate([self.lane_AKM, other.lane_AKM], axis=1),
            np.concatenate([self.expert_AKM, other.expert_AKM], axis=1),
            np.concatenate([self.score_AK, other.score_AK], axis=1),
            np.concatenate([self.num_moves_AK, other.num_moves_AK], axis=1),
        )


@dataclass
class Situation:
    """Layers with the best shares for what they hold.

    Attributes:
        load_AE: float64, in units of the mean rank load.
        physical_AQ: int64, the expert of each lane.
        num_ranks: W.
        limit_A: rank load to get below.
        split, flow_R, rank_load_AW: from `eplb.planning.levelling.level_loads`.
        node_W: int64, the node of each rank.
    """

    load_AE: np.ndarray
    physical_AQ: np.ndarray
    num_ranks: int
    limit_A: np.ndarray
    split: SplitLoads
    flow_R: np.ndarray
    rank_load_AW: np.ndarray
    node_W: np.ndarray

    def __post_init__(self) -> None:
        num_layers, num_lanes = self.physical_AQ.shape
        num_experts = self.load_AE.shape[1]
        self.rank_Q = np.arange(num_lanes) // (num_lanes // self.num_ranks)
        ids = self.physical_AQ + np.arange(num_layers)[:, None] * num_experts
        counts = np.bincount(ids.ravel(), minlength=num_layers * num_experts)
        self.count_AE = counts.reshape(num_layers, num_experts)
        self.count_AQ = counts[ids]
        self.flow_AQ = np.where(self.count_AQ == 1, self.load_AE.ravel()[ids], 0.0)
        self.flow_AQ.reshape(-1)[self.split.layer_R * num_lanes + self.split.lane_R] = self.flow_R
        self.hot_AW = self.rank_load_AW > self.limit_A[:, None]
        self.excess_AW = np.maximum(self.rank_load_AW - self.limit_A[:, None], 0.0)
        self._pass_room()
        self._pass_excess(ids)

    def take(self, keep_A: np.ndarray) -> Situation:
        """Only the layers of this boolean mask; what was derived is kept."""
        part = object.__new__(Situation)
        keep_R = keep_A[self.split.layer_R]
        for name, value in vars(self).items():
            keep = keep_A if "_A" in name else keep_R if name.endswith("_R") else None
            vars(part)[name] = value if keep is None else value[keep]
        part.split = self.split.take(keep_A)
        return part

    def by_layer(self, value_R: np.ndarray, padding: float) -> np.ndarray:
        """One row per layer: [R] → [A, S]."""
        layer_R = self.split.layer_R
        count_A = np.bincount(layer_R, minlength=len(self.limit_A))
        out_AS = np.full((count_A.size, count_A.max(initial=0)), padding, dtype=value_R.dtype)
        out_AS[np.arange(out_AS.shape[1]) < count_A[:, None]] = value_R
        return out_AS

    def _pass_room(self) -> None:
        """room_AW: load that each rank could take in, handing on what it can. behind: load that each replica could hand on
        to the other replicas of its expert, whatever it carries."""
        split = self.split
        room_AW = np.maximum(self.limit_A[:, None] - self.rank_load_AW, 0.0)
        total_A = room_AW.sum(axis=1)
        total_R = total_A[split.layer_R]
        handed = behind = np.zeros_like(self.flow_R)
        for _ in range(MESSAGE_ROUNDS):
            at_rank = np.maximum(split.at_replicas(room_AW + split.per_rank(handed)) - handed, 0.0)
            behind = np.minimum(split.per_expert(at_rank)[split.expert_R] - at_rank, total_R)
            handed = np.minimum(self.flow_R, behind)
        self.room_AW = np.minimum(room_AW + split.per_rank(handed), total_A[:, None])
        # Without the replica: what it handed on is gone, what it carried makes room.
        self.room_without_R = np.minimum(split.at_replicas(self.room_AW) - handed, total_R) + self.flow_R
        self.loss_R = np.maximum(self.flow_R - behind, 0.0)

    def _pass_excess(self, ids: np.ndarray) -> None:
        """pull_AW: excess that can be brought to each overloaded rank. gain_AE: excess that could leave through each expert."""
        split = self.split
        total_A = self.excess_AW.sum(axis=1)
        total_R = total_A[split.layer_R]
        flow = self.flow_R * split.at_replicas(self.hot_AW)
        carries = flow > 0
        out = brought = np.zeros_like(flow)
        for _ in range(MESSAGE_ROUNDS):
            pull = split.at_replicas(self.excess_AW + split.per_rank(brought))
            out = np.minimum(flow, np.maximum(pull - brought, 0.0))
            brought = np.minimum(split.per_expert(out)[split.expert_R] - out, total_R) * carries
        self.pull_AW = np.minimum(self.excess_AW + split.per_rank(brought), total_A[:, None]) * self.hot_AW
        leaves_AQ = np.minimum(self.flow_AQ, self.pull_AW[:, self.rank_Q])
        leaves_AQ.reshape(-1)[split.layer_R * leaves_AQ.shape[1] + split.lane_R] = out
        gain = np.bincount(ids.ravel(), weights=leaves_AQ.ravel(), minlength=self.load_AE.size)
        self.gain_AE = gain.reshape(self.load_AE.shape)


def singles(now: Situation, num: int) -> Changes:
    """One move: a replica of an overloaded expert in place of a replica that its expert can spare; `num` places per expert."""
    split = now.split
    num_layers = len(now.limit_A)
    rows = np.arange(num_layers)[:, None]
    worth_AE = now.load_AE / (now.count_AE + 1)
    promise = np.where(now.gain_AE > TINY, now.gain_AE + FLEXIBILITY * worth_AE, -np.inf)
    expert_AK = largest(promise, EXPERTS_TRIED)
    num_tried = expert_AK.shape[1]
    lane_AS = now.by_layer(split.lane_R, 0)
    rank_AS = now.rank_Q[lane_AS]
    room_AS = now.by_layer(np.where(split.at_replicas(now.hot_AW), -np.inf, now.room_without_R), -np.inf)
    loss_AS = now.by_layer(now.loss_R, 0.0)
    spared_AS = now.by_layer(split.load_per_replica_R, 0.0)

    gain_AK = now.gain_AE[rows, expert_AK]
    score_AKS = np.minimum(gain_AK[:, :, None], room_AS[:, None]) - loss_AS[:, None]
    holds_AKW = (
        (now.physical_AQ[:, None] == expert_AK[:, :, None]).reshape(num_layers, num_tried, now.num_ranks, -1).any(3)
    )
    holds_AKS = np.take_along_axis(holds_AKW, np.broadcast_to(rank_AS[:, None], score_AKS.shape), axis=2)
    useful_AKS = (score_AKS > TINY) & (gain_AK > TINY)[:, :, None] & ~holds_AKS
    num_nodes = int(now.node_W[-1]) + 1
    if num_nodes > 1:
        near_AKN = holds_AKW.reshape(num_layers, num_tried, num_nodes, -1).any(3)
        near_AKS = np.take_along_axis(near_AKN, np.broadcast_to(now.node_W[rank_AS][:, None], score_AKS.shape), axis=2)
        score_AKS = score_AKS * np.where(near_AKS, 1.0, FAR_NODE)
    worth_AK = worth_AE[rows, expert_AK]
    score_AKS = score_AKS + FLEXIBILITY * (worth_AK[:, :, None] - spared_AS[:, None])
    score_AKS = np.where(useful_AKS, score_AKS, -np.inf)
    place_AKn = largest(score_AKS.reshape(num_layers * num_tried, -1), num).reshape(num_layers, num_tried, -1)
    score = np.take_along_axis(score_AKS, place_AKn, axis=2).reshape(num_layers, -1)
    lane = lane_AS[rows[:, :, None], place_AKn].reshape(num_layers, -1)
    expert = np.repeat(expert_AK, place_AKn.shape[2], axis=1)
    return Changes(
        np.stack([lane, lane], axis=2), np.stack([expert, expert], axis=2), score, np.ones(score.shape, dtype=np.int64)
    )


def doubles(now: Situation, num: int, num_sources: int = 1) -> Changes:
    """Two moves: the `num` best exchanges and the `num` best chains.

    An *exchange* swaps an expert of an overloaded rank with a lighter one of a rank with room. A *chain* puts an overloaded
    expert in place of one that has no other replica, which goes to a third rank in place of one that can be spared.
    `num_sources`: so many of the most overloaded ranks (for exchanges) and of the experts through which most excess could
    leave (for chains) are looked at, and as many third lanes.
    """
    num_layers, _ = now.physical_AQ.shape
    rows = np.arange(num_layers)[:, None]
    holds_AWE = np.zeros((num_layers, now.num_ranks, now.load_AE.shape[1]), dtype=bool)
    holds_AWE[rows, now.rank_Q, now.physical_AQ] = True
    hottest_AH = largest(now.excess_AW, num_sources)
    found = [_exchanges(now, holds_AWE, hottest_AH[:, h], num) for h in range(hottest_AH.shape[1])]
    if now.flow_R.size:
        hot_AH = largest(now.gain_AE, num_sources)
        # The lane to give up: one whose rank has room without it, and better one of a light expert.
        split = now.split
        lane_AS = now.by_layer(split.lane_R, 0)
        spare_AS = now.by_layer(now.room_without_R - now.loss_R, -np.inf)
        worth_AS = now.by_layer(split.load_per_replica_R, 0.0)
        third_AH = largest(spare_AS - FLEXIBILITY * worth_AS, num_sources)
        for t in range(third_AH.shape[1]):
            third_A1 = third_AH[:, t : t + 1]
            lane_A1, spare_A1 = lane_AS[rows, third_A1], spare_AS[rows, third_A1]
            for h in range(hot_AH.shape[1]):
                found.append(_chains(now, holds_AWE, hot_AH[:, h : h + 1], lane_A1, spare_A1, num))
    changes = found[0]
    for other in found[1:]:
        changes = changes.with_(other)
    return changes


def _exchanges(now: Situation, holds_AWE: np.ndarray, hot_A: np.ndarray, num: int) -> Changes:
    """The `num` best exchanges of rank `hot_A` of each layer with others."""
    num_layers, num_lanes = now.physical_AQ.shape
    rows = np.arange(num_layers)[:, None]
    per_rank = num_lanes // now.num_ranks
    lane_AP = hot_A[:, None] * per_rank + np.arange(per_rank)
    out_AP = now.physical_AQ[rows, lane_AP]
    shift_APQ = now.flow_AQ[rows, lane_AP][:, :, None] - now.flow_AQ[:, None]
    pull_A = now.pull_AW[rows[:, 0], hot_A]
    room_AQ = now.room_AW[:, now.rank_Q]
    score = np.minimum(shift_APQ, pull_A[:, None, None]) - np.maximum(shift_APQ - room_AQ[:, None], 0.0)
    out_is_there_APW = holds_AWE[rows[:, :, None], np.arange(now.num_ranks), out_AP[:, :, None]]
    in_is_here_AQ = holds_AWE[rows, hot_A[:, None], now.physical_AQ]
    cold_AQ = ~now.hot_AW[:, now.rank_Q]
    fits = (cold_AQ & ~in_is_here_AQ)[:, None] & ~np.repeat(out_is_there_APW, per_rank, axis=2) & (score > TINY)
    score = np.where(fits, score / 2, -np.inf).reshape(num_layers, -1)
    place_AK = largest(score, num)
    number_AK, lane_AK = np.divmod(place_AK, num_lanes)
    return Changes(
        np.stack([lane_AK, lane_AP[rows, number_AK]], axis=2),
        np.stack([out_AP[rows, number_AK], now.physical_AQ[rows, lane_AK]], axis=2),
        score[rows, place_AK],
        np.full(place_AK.shape, 2),
    )


def _chains(
    now: Situation, holds_AWE: np.ndarray, hot_A1: np.ndarray, third_A1: np.ndarray, spare_A1: np.ndarray, num: int
) -> Changes:
    """The `num` best chains that begin with expert `hot_A1` of each layer and end in lane `third_A1`."""
    num_layers, num_lanes = now.physical_AQ.shape
    rows = np.arange(num_layers)[:, None]
    third_rank_A1 = third_A1 // (num_lanes // now.num_ranks)
    room_AQ = now.room_AW[:, now.rank_Q]
    score = np.minimum(now.gain_AE[rows, hot_A1], room_AQ + now.flow_AQ) - np.maximum(now.flow_AQ - spare_A1, 0.0)
    fits = (
        ~now.hot_AW[:, now.rank_Q]
        & (now.count_AQ == 1)
        & (now.rank_Q[None] != third_rank_A1)
        & ~holds_AWE[rows, now.rank_Q[None], hot_A1]
        & ~holds_AWE[rows, third_rank_A1, now.physical_AQ]
        & np.isfinite(spare_A1)
        & (score > TINY)
    )
    score = np.where(fits, score / 2, -np.inf)
    lane_AK = largest(score, num)
    return Changes(
        np.stack(np.broadcast_arrays(lane_AK, third_A1), axis=2),
        np.stack(np.broadcast_arrays(hot_A1, now.physical_AQ[rows, lane_AK]), axis=2),
        score[rows, lane_AK],
        np.full(lane_AK.shape, 2),
    )
