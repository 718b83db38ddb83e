"""`forecast()`: noise is averaged, walks and changes are followed, trends are gone on with."""

import numpy as np
import pytest

from eplb.planning.forecast import forecast, step_correlation

LAYERS, EXPERTS = 6, 128


def forecast_of(windows_HLE, num_samples=1):
    last = np.repeat(windows_HLE[-1][:, None], num_samples, axis=1)
    return forecast(last, windows_HLE[:-1]).mean(axis=1)


def error(found_LE, wanted_LE):
    """Root mean square of what is wrong, in experts' mean loads."""
    scale = wanted_LE.sum(axis=1, keepdims=True)
    found_LE = found_LE / found_LE.sum(axis=1, keepdims=True)
    return float(np.sqrt(((found_LE - wanted_LE / scale) ** 2).mean()) * EXPERTS)


def some_load(rng):
    return rng.gamma(0.7, 1000.0, (LAYERS, EXPERTS)) + 1


def test_the_example_of_the_docstring():
    windows = np.array([[[4.0, 8]], [[8, 4]], [[4, 8]], [[8, 4]]])
    np.testing.assert_allclose(forecast(windows[-1][:, None], windows[:-1]), [[[6, 6]]], rtol=1e-6)


@pytest.mark.parametrize("num_windows", [4, 8])
def test_noise_is_averaged(num_windows):
    rng = np.random.default_rng(num_windows)
    level = some_load(rng)
    windows = level * rng.lognormal(0, 0.2, (num_windows, LAYERS, EXPERTS))
    best = error(windows.mean(axis=0), level)
    assert error(forecast_of(windows), level) < 1.3 * best < 0.75 * error(windows[-1], level)


def test_a_walk_is_followed():
    rng = np.random.default_rng(1)
    steps = rng.normal(0, 0.05, (8, LAYERS, EXPERTS)).cumsum(axis=0)
    windows = some_load(rng) * np.exp(steps)
    # The walk's next step has mean 0: the last window is the best forecast, and the mean of all is a bad one.
    assert error(forecast_of(windows), windows[-1]) < 0.25 * error(windows.mean(axis=0), windows[-1])


@pytest.mark.parametrize("since", [0, 1, 3])
def test_a_sudden_change_is_followed_at_once(since):
    """Also by few experts of many, and although what was before it is noisy."""
    rng = np.random.default_rng(since)
    level = some_load(rng)
    windows = level * rng.lognormal(0, 0.05, (8, LAYERS, EXPERTS))
    hot = np.argsort(-level, axis=1)[:, :8]
    now = level.copy()
    for layer in range(LAYERS):
        now[layer, hot[layer]], now[layer, :8] = level[layer, :8], level[layer, hot[layer]]
    windows[7 - since :] = now * rng.lognormal(0, 0.05, (since + 1, LAYERS, EXPERTS))
    assert error(forecast_of(windows), now) < 1.25 * error(windows[-1], now)


def test_a_trend_goes_on():
    rng = np.random.default_rng(2)
    first, second = some_load(rng), some_load(rng)
    ramp = [first + (second - first) * part for part in np.linspace(0, 0.8, 9)]
    windows = np.array(ramp[:8]) * rng.lognormal(0, 0.005, (8, LAYERS, EXPERTS))
    assert error(forecast_of(windows), ramp[8]) < 0.4 * error(windows[-1], ramp[8])
    # Never below nothing: an expert that has lost all its load in one step.
    windows = np.linspace(1, 0, 8)[:, None, None] * first + np.linspace(0, 1, 8)[:, None, None] * second
    assert (forecast_of(windows[:-1]) >= 0.4 * windows[-2]).all()


def test_few_experts_show_no_trend_by_chance():
    rng = np.random.default_rng(3)
    steps = rng.normal(0, 0.05, (3, 2000, 4)).cumsum(axis=0)
    found = step_correlation(np.exp(steps) / np.exp(steps).sum(axis=2, keepdims=True))
    assert np.mean(found > 0) < 0.2 and (np.abs(found[found > 0]) <= 1).all()


def test_the_load_of_a_layer_stays_and_the_scatter_shrinks_with_noise_only():
    rng = np.random.default_rng(4)
    level = some_load(rng)
    past = level * rng.lognormal(0, 0.2, (7, LAYERS, EXPERTS)) * rng.uniform(0.1, 10, (7, LAYERS, 1))
    last = level[:, None] * rng.lognormal(0, 0.4, (LAYERS, 4, EXPERTS))
    found = forecast(last, past)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), last.sum(axis=(1, 2)))  # but for what would be negative
    assert (found >= 0).all() and (found.std(axis=1) < 0.8 * last.std(axis=1)).mean() > 0.95
    assert error(found.sum(axis=1), level) < 0.7 * error(last.sum(axis=1), level)  # whatever the windows' totals
    walk = level * np.exp(rng.normal(0, 0.2, (8, LAYERS, EXPERTS)).cumsum(axis=0))
    last = walk[-1][:, None] * np.array([0.9, 1.1])[:, None]
    np.testing.assert_allclose(forecast(last, walk[:-1]).std(axis=1), last.std(axis=1), rtol=0.3)


def test_what_has_too_few_windows_or_no_load_stays_as_it_is():
    rng = np.random.default_rng(5)
    windows = rng.integers(1, 9, (8, 3, 16))
    last = windows[-1][:, None]
    for past in (windows[:0], windows[:1]):
        np.testing.assert_array_equal(forecast(last, past), last)
    windows[:6, 0] = 0  # two windows with load
    windows[7, 1] = 0  # no load now
    windows[2, 2] = 0
    found = forecast(windows[-1][:, None], windows[:-1])
    np.testing.assert_array_equal(found[:2], windows[-1][:2, None])
    np.testing.assert_array_equal(found[2:], forecast(last[2:], windows[[0, 1, 3, 4, 5, 6], 2:]))
    assert (found[2] != last[2]).any()
