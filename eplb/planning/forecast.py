"""The load that the next window will have, from those that were.

A plan serves the window *after* those that it is made from. What sets two windows apart is noise, a walk or a trend, and each
asks for another forecast: the mean of all windows, the last one, the last one and a step further. Which it is can be read off
the steps from window to window, as a layer has many experts.

Shape letters: L layers, H windows, N sub-windows, E logical experts.
"""

from __future__ import annotations

import numpy as np

FEWEST_WINDOWS = 3
"""With fewer there are no two successive steps to compare."""

LEAST_LEFT = 0.5
"""A trend takes at most half of an expert's load away in one window."""


def forecast(load_LNE: np.ndarray, past_HLE: np.ndarray) -> np.ndarray:
    """What the next window's load is expected to be, with the scatter that the last one's sub-windows had.

    An expert's part of its layer's load is taken for a level that walks, with variance q a window, and is seen with noise of
    variance r. Then steps from window to window have the variance q + 2r, and successive ones the covariance -r. Their
    correlation, one for each layer over all experts and windows, is

    - -1/2 for noise alone: the forecast is the mean of the windows;
    - between: an exponential mean, with the gain of the steady Kalman filter (Muth 1960);
    - 0 for a walk, and after a sudden change, whose step outweighs all others: the forecast is the last window;
    - above 0, by more than chance explains, for a trend: the last window and this part of its last step (a damped trend).

    Steps are those of square roots, so that heavy experts do not drown the others.

    Args:
        load_LNE: the last window: tokens of each expert in N consecutive sub-windows.
        past_HLE: the windows before it, oldest first, each summed over its sub-windows. Windows in which a layer had no
        XX
    Returns:
        float64 [L, N, E], not negative; each layer has the load of its last window. With fewer than 3 windows, or without
        load in the last one, the last window itself.

    Example: one expert has the loads 4, 8, 4, 8 and another one 8, 4, 8, 4. Each step takes back the one before, as only noise
    does, and the forecast is the mean: 6 and 6.
    """
    load_LNE = np.asarray(load_LNE, dtype=np.float64)
    last_LE = load_LNE.sum(axis=1)
    out_LNE = load_LNE.copy()
    windows_HLE = np.concatenate([np.asarray(past_HLE, dtype=np.float64), last_LE[None]])
    has_load_HL = windows_HLE.sum(axis=2) > 0
    if has_load_HL.all():
        some = [(np.arange(len(load_LNE)), windows_HLE)]
    else:
        some = [(np.array([layer]), windows_HLE[has_load_HL[:, layer], layer, None]) for layer in range(len(load_LNE))]
    for layers, seen_HAE in some:
        if len(seen_HAE) >= FEWEST_WINDOWS and has_load_HL[-1, layers].all():
            out_LNE[layers] = _forecast(load_LNE[layers], seen_HAE)
    return out_LNE


def _forecast(load_LNE: np.ndarray, windows_HLE: np.ndarray) -> np.ndarray:
    """`forecast()` for layers with load in each of H ≥ 3 windows, the last of which is `load_LNE`."""
    part_HLE = windows_HLE / windows_HLE.sum(axis=2, keepdims=True)
    correlation_L1 = step_correlation(part_HLE)[:, None]
    weight_HL1 = _weights(correlation_L1, len(part_HLE))
    expected_LE = (weight_HL1 * part_HLE).sum(axis=0)
    expected_LE += np.maximum(
        np.maximum(correlation_L1, 0.0) * (part_HLE[-1] - part_HLE[-2]), (LEAST_LEFT - 1) * expected_LE
    )
    expected_LE /= expected_LE.sum(axis=1, keepdims=True)
    mean_LE = load_LNE.mean(axis=1)
    # A mean over windows is known better than one of them: so scatter shrinks by what averaging takes off.
    spread_L11 = np.sqrt((weight_HL1**2).sum(axis=0))[:, None]
    total_L1 = mean_LE.sum(axis=1, keepdims=True)
    return np.maximum((expected_LE * total_L1)[:, None] + spread_L11 * (load_LNE - mean_LE[:, None]), 0.0)


def step_correlation(part_HLE: np.ndarray) -> np.ndarray:
    """float64 [L], in [-1/2, 1]: how successive steps go together, over all experts of a layer.

    Above 0 what chance explains is taken off: one standard error. A layer of few experts shows trends where there are none.

    Args:
        part_HLE: each expert's part of its layer's load in H ≥ 3 windows.
    """
    step_HLE = np.diff(np.sqrt(part_HLE), axis=0)
    variance_LE = (step_HLE**2).mean(axis=0)
    covariance_L = (step_HLE[1:] * step_HLE[:-1]).mean(axis=0).sum(axis=1)
    variance_L = np.maximum(variance_LE.sum(axis=1), np.finfo(np.float64).tiny)
    correlation_L = np.clip(covariance_L / variance_L, -0.5, 1.0)
    # As many pairs of steps as if all experts had equal variances.
    num_pairs_L = variance_L**2 / np.maximum((variance_LE**2).sum(axis=1), np.finfo(np.float64).tiny)
    chance_L = 1 / np.sqrt(np.maximum(num_pairs_L * (len(step_HLE) - 1), 1.0))
    return np.where(correlation_L > 0, np.maximum(correlation_L - chance_L, 0.0), correlation_L)


def _weights(correlation_L1: np.ndarray, num_windows: int) -> np.ndarray:
    """float64 [H, L, 1]: of each window in the level, oldest first; sums to 1 over the windows."""
    noise_L1 = np.maximum(-correlation_L1, 1e-9)
    walk_L1 = (1 - 2 * noise_L1) / noise_L1
    gain_L1 = (np.sqrt(walk_L1**2 + 4 * walk_L1) - walk_L1) / 2
    age_H11 = np.arange(num_windows)[::-1, None, None]
    weight_HL1 = (1 - gain_L1) ** age_H11
    return weight_HL1 / weight_HL1.sum(axis=0)
