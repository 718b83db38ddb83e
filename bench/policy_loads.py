"""Loads that change from window to window, with sub-windows: what `bench.policy_windows` plans for.

Shape letters: L layers, N sub-windows, E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eplb.simulate.traces import base_load

LOADS = ("gamma:0.5", "pareto:1.5", "r1", "lognormal:1.0", "zipf:1.2")
"""`r1` is heavy-tailed like published DeepSeek-R1 traces; see `eplb.simulate.traces.base_load`."""

PROCESSES = ("steady:0.2", "noise:0.2", "sample:5000", "walk:0.05", "topics", "switch", "hotset", "new")
"""See `windows`."""

NUM_TOPICS = 8
TURN = 40
"""Windows in which the mixture of topics turns once."""


def windows(
    process: str, kind: str, num_layers: int, num_experts: int, num_samples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yields the load of one window after another, for ever: float64 [L, N, E].

    Args:
        process: "steady:SIGMA": the load times a lognormal factor, drawn anew for each window (equal in its sub-windows).
            "noise:SIGMA": the same, drawn for each sub-window so that a whole window has SIGMA.
            "sample:COUNT": COUNT assignments of tokens to experts are drawn in each window (multinomial).
            "walk:SIGMA": the logarithms walk at random, by SIGMA a window, in equal steps from sub-window to sub-window.
            "topics": a mixture of 8 loads whose weights turn; "switch": one of them, drawn anew every 5 windows.
            "hotset": every 5 windows a sixteenth of the experts, the hottest, exchange their loads with others.
            "new": drawn anew every 5 windows. The last four with 2 % of noise in each sub-window.
        kind: of `eplb.simulate.traces.base_load`.
    """
    from eplb.simulate.traces import change_load

    name, _, value = process.partition(":")
    shape = (num_layers, num_samples, num_experts)
    load_LE = base_load(kind, num_layers, num_experts, rng)
    topics_KLE = np.stack([base_load(kind, num_layers, num_experts, rng) for _ in range(NUM_TOPICS)])
    phase_K = np.arange(NUM_TOPICS) * 2 * np.pi / NUM_TOPICS
    log_LE = np.zeros_like(load_LE)
    window = 0
    while True:
        expected = np.repeat(load_LE[:, None], num_samples, axis=1)
        if name == "steady":
            expected = expected * rng.lognormal(0.0, float(value), load_LE.shape)[:, None]
        elif name == "noise":
            expected = expected * rng.lognormal(0.0, float(value) * np.sqrt(num_samples), shape)
        elif name == "sample":
            chance = load_LE / load_LE.sum(axis=1, keepdims=True)
            expected = rng.multinomial(round(float(value) / num_samples), chance[:, None], size=shape[:2]).astype(float)
        elif name == "walk":
            for sample in range(num_samples):
                log_LE = log_LE + rng.normal(0.0, float(value) / np.sqrt(num_samples), load_LE.shape)
                expected[:, sample] *= np.exp(log_LE)
        elif name == "topics":
            for sample in range(num_samples):
                at = (window + sample / num_samples) * 2 * np.pi / TURN
                weight_K = np.exp(2 * np.cos(at - phase_K))
                expected[:, sample] = np.einsum("k,kle->le", weight_K / weight_K.sum(), topics_KLE)
        elif window % 5 == 0:
            if name == "switch":
                load_LE = topics_KLE[rng.integers(NUM_TOPICS)]
            elif window:
                load_LE = change_load(load_LE, name, kind, rng)
            expected = np.repeat(load_LE[:, None], num_samples, axis=1)
        if name in ("topics", "switch", "hotset", "new"):
            expected = expected * rng.lognormal(0.0, 0.02, shape)
        yield expected
        window += 1
