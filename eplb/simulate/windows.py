"""Windows of a trace as a policy sees them: their sub-windows, and the forecast of the next one from the last few."""

from __future__ import annotations

from collections import deque

import numpy as np

from eplb.planning.forecast import forecast
from eplb.simulate.traces import Trace


class Forecasts:
    """What a controller would hand its policy after each window, oldest first.

    Args:
        batches_per_window: of the trace that is cut into windows.
        sub_windows: parts of a window that the policy sees apart; at most `batches_per_window`.
        forecast_windows: see `EplbConfig`.

    Raises:
        ValueError: sizes that do not go together.
    """

    def __init__(self, trace: Trace, batches_per_window: int, sub_windows: int, forecast_windows: int) -> None:
        num_batches = len(trace.load_BLE)
        if not 1 <= batches_per_window <= num_batches:
            raise ValueError(
                f"batches_per_window={batches_per_window}: must lie in [1, {num_batches}], the trace's batches"
            )
        if not 1 <= sub_windows <= batches_per_window:
            raise ValueError(f"sub_windows={sub_windows}: must lie in [1, batches_per_window={batches_per_window}]")
        if forecast_windows < 1:
            raise ValueError(f"forecast_windows={forecast_windows}: must be at least 1")
        self._sub_windows = sub_windows
        self._seen: deque[np.ndarray] = deque(maxlen=forecast_windows)

    def cut(self, window_BLE: np.ndarray) -> np.ndarray:
        """[L, N, E]: a window's load by its sub-windows."""
        parts = np.array_split(window_BLE, self._sub_windows)
        return np.stack([part.sum(axis=0) for part in parts], axis=1)

    def after(self, load_LNE: np.ndarray) -> np.ndarray:
        """[L, N, E]: what is to be planned for, once this window, cut, has been seen."""
        self._seen.append(load_LNE.sum(axis=1))
        return forecast(load_LNE, np.array(self._seen)[:-1])
