"""Scaling fits: L = a + b C^-c and log L = k0 - k log C through runs of several sizes, with intervals over seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from composer_prior.studies.comparison import MIN_SEEDS, Interval

MIN_SIZES = 4
"""Fewer sizes than this have no fit with an asymptote: it has three coefficients."""

EXPONENTS = (1e-3, 10.0)
"""Where c is searched."""

_RESAMPLES = 1000
_RANDOM_SEED = 20250508
_WIDE = 10.0  # an interval of c over more than this factor says nothing about it
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Runs of several sizes.

    Args:
        x: ``[sizes]``, positive and increasing.
        seeds: the names of the seeds that every size has.
        y: ``[sizes, seeds]``.
    """

    x: _Array
    seeds: tuple[str, ...]
    y: _Array


@dataclass(frozen=True)
class Estimate:
    """A coefficient, and its interval where there are :data:`.MIN_SEEDS` seeds and the resamples determine it."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Fit:
    """What was fitted to the points of one method.

    Args:
        coefficients: by name: ``a``, ``b``, ``c`` with :data:`MIN_SIZES` sizes, ``k0``, ``k`` with two of them. A
            coefficient that the points do not determine is missing.
        notes: what stands against believing them, as sentences.
    """

    coefficients: Mapping[str, Estimate]
    notes: tuple[str, ...]


def points(values: Mapping[str, Mapping[str, tuple[float | None, float | None]]]) -> Points:
    """Points of the runs of a method.

    Args:
        values: by size and seed, x and y of a run; ``None`` where there is no number.

    Returns:
        The sizes that have a run, x as mean over seeds, with the seeds that all these sizes have.
    """
    runs = {
        size: {seed: (x, y) for seed, (x, y) in seeds.items() if x is not None and y is not None and x > 0}
        for size, seeds in values.items()
    }
    runs = {size: seeds for size, seeds in runs.items() if seeds}
    if not runs:
        return Points(np.zeros(0), (), np.zeros((0, 0)))
    first = next(iter(runs.values()))
    common = tuple(seed for seed in first if all(seed in seeds for seeds in runs.values()))
    x = np.array([np.mean([x for x, _ in seeds.values()]) for seeds in runs.values()])
    y = np.array([[seeds[seed][1] for seed in common] for seeds in runs.values()], np.float64)
    order = np.argsort(x, kind="stable")
    return Points(x[order], common, y.reshape(len(runs), len(common))[order])


def fit(found: Points) -> Fit:
    """Fit both forms to all seeds' points, by least squares of L and of log L."""
    notes = list[str]()
    if not found.seeds:
        return Fit({}, ("no seed has a run of every size: no fit",))
    sizes = len(np.unique(found.x))
    if sizes < MIN_SIZES:
        notes.append(f"{sizes} {'size' if sizes == 1 else 'sizes'}, fewer than {MIN_SIZES}: no fit with an asymptote")
    if len(found.seeds) < MIN_SEEDS:
        notes.append(f"{len(found.seeds)} seeds at every size, fewer than {MIN_SEEDS}: no intervals")
    if (found.y <= 0).any():
        notes.append("values that are not positive: no straight line in logarithms")
    drawn = _resampled(found, _counts(len(found.seeds)))
    whole = _resampled(found, np.ones((1, len(found.seeds)), np.int64))
    coefficients = {
        name: Estimate(float(values[0]), _percentiles(drawn[name]) if len(found.seeds) >= MIN_SEEDS else None)
        for name, values in whole.items()
        if math.isfinite(values[0])
    }
    return Fit(coefficients, tuple(notes + _doubts(sizes, coefficients)))


def differences(baseline: Points, method: Points) -> dict[str, Estimate]:
    """The coefficients of a method minus those of the baseline, both at the same resampled seeds.

    Only seeds that both have are used; without one there is nothing.
    """
    common = tuple(seed for seed in baseline.seeds if seed in method.seeds)
    if not common:
        return {}
    both = [_at_seeds(baseline, common), _at_seeds(method, common)]
    counts = _counts(len(common))
    base, other = (_resampled(one, np.ones((1, len(common)), np.int64)) for one in both)
    base_drawn, other_drawn = (_resampled(one, counts) for one in both)
    found = {}
    for name in base:
        if name in other and math.isfinite(value := float(other[name][0] - base[name][0])):
            drawn = other_drawn[name] - base_drawn[name]
            found[name] = Estimate(value, _percentiles(drawn) if len(common) >= MIN_SEEDS else None)
    return found


def power_law(x: _Array, y: _Array) -> tuple[_Array, _Array, _Array]:
    """Least squares of y = a + b x^-c with a >= 0 and b >= 0, of many curves at once.

    For each c the best a and b are known in closed form, so that c alone is searched: on a grid over all of
    :data:`EXPONENTS`, and then ever closer around its best point. No start is needed that could be a wrong one.

    Args:
        x: ``[sizes]``, positive.
        y: ``[curves, sizes]``.

    Returns:
        a, b and c, ``[curves]`` each; c is NaN where b is 0.
    """
    middle = math.exp(float(np.mean(np.log(x))))  # so that powers stay near 1
    logs = np.log(x / middle)
    low, high = map(math.log, EXPONENTS)
    grid = np.broadcast_to(np.linspace(low, high, 301), (len(y), 301))
    for _ in range(6):
        a, b, errors = _best_lines(np.exp(-np.exp(grid)[:, :, None] * logs), y[:, None, :])
        best = np.argmin(errors, axis=1)[:, None]
        centre = np.take_along_axis(grid, best, 1)
        a, b = np.take_along_axis(a, best, 1), np.take_along_axis(b, best, 1)
        step = grid[:, 1:2] - grid[:, :1]
        grid = np.clip(centre + step * np.linspace(-1, 1, 31), low, high)
    c = np.exp(centre[:, 0])
    return a[:, 0], b[:, 0] * middle**c, np.where(b[:, 0] > 0, c, np.nan)


def line(x: _Array, log_y: _Array) -> tuple[_Array, _Array]:
    """Least squares of log y = k0 - k log x: k0 and k, ``[curves]`` each, of log y ``[curves, sizes]``."""
    logs = np.log(x)
    centred = logs - logs.mean()
    k = -(log_y @ centred) / (centred @ centred)
    return log_y.mean(axis=1) + k * logs.mean(), k


def _best_lines(z: _Array, y: _Array) -> tuple[_Array, _Array, _Array]:
    """Least squares of y = a + b z over the last axis with a, b >= 0, and the sum of squared errors."""
    z_mean, y_mean = z.mean(-1), y.mean(-1)
    z_centred = z - z_mean[..., None]
    b = (z_centred * y).sum(-1) / np.maximum((z_centred**2).sum(-1), 1e-300)
    a = y_mean - b * z_mean
    through_0 = np.maximum((z * y).sum(-1) / (z**2).sum(-1), 0)
    a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through_0, b)
    a, b = np.where(b < 0, np.maximum(y_mean, 0), a), np.where(b < 0, 0.0, b)
    return a, b, ((y - a[..., None] - b[..., None] * z) ** 2).sum(-1)


def _at_seeds(found: Points, seeds: tuple[str, ...]) -> Points:
    return Points(found.x, seeds, found.y[:, [found.seeds.index(seed) for seed in seeds]])


def _counts(seeds: int) -> NDArray[np.int64]:
    """How often each seed is drawn in each resample, ``[resamples, seeds]``; the same for all methods."""
    drawn = np.random.default_rng(_RANDOM_SEED).integers(0, seeds, (_RESAMPLES, seeds))
    return (drawn[:, :, None] == np.arange(seeds)).sum(axis=1)


def _resampled(found: Points, counts: NDArray[np.int64]) -> dict[str, _Array]:
    """Coefficients at each resample of the seeds."""
    rows, inverse = np.unique(counts, axis=0, return_inverse=True)  # with five seeds there are only 126
    inverse = inverse.reshape(-1)
    share = rows / rows.sum(axis=1, keepdims=True)
    sizes = len(np.unique(found.x))
    result = dict[str, _Array]()
    if sizes >= MIN_SIZES:
        result |= zip("abc", (values[inverse] for values in power_law(found.x, share @ found.y.T)), strict=True)
    if sizes >= 2 and (found.y > 0).all():
        result |= zip(
            ("k0", "k"), (values[inverse] for values in line(found.x, share @ np.log(found.y).T)), strict=True
        )
    return result


def _percentiles(drawn: _Array) -> Interval | None:
    """The 2.5 and 97.5 % percentiles; none where so many resamples determine no value that an end could be one."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < 0.975 * len(drawn):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _doubts(sizes: int, coefficients: Mapping[str, Estimate]) -> list[str]:
    """What the asymptote's fit itself says against it."""
    if sizes < MIN_SIZES:
        return []
    a, c = coefficients["a"], coefficients.get("c")
    if c is None:
        return ["the values do not fall with size: b is 0 and c is not determined"]
    doubts = list[str]()
    if a.value == 0:
        doubts.append("a is on its bound 0: these sizes show no asymptote")
    elif a.interval and a.interval[0] == 0:
        doubts.append("the interval of a begins at its bound 0: these sizes do not determine the asymptote")
    if c.value < EXPONENTS[0] * 1.001 or c.value > EXPONENTS[1] * 0.999:
        doubts.append(f"c is on the bound of its search, {EXPONENTS[0]:g} to {EXPONENTS[1]:g}: it is not determined")
    elif a.interval and not c.interval:
        doubts.append("at many resampled seeds the values do not fall with size: c is not determined")
    elif c.interval and c.interval[1] > _WIDE * c.interval[0]:
        doubts.append(f"the interval of c spans more than a factor of {_WIDE:g}: these sizes do not determine it")
    return doubts
