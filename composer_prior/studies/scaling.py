"""Scaling fits: L = a + b C^-c and log L = k0 - k log C through runs of several sizes, with intervals over seeds."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from composer_prior.studies.comparison import MIN_SEEDS, RANDOM_SEED, percentiles
from composer_prior.studies.study import Interval

MIN_SIZES = 4  # fewer have no fit with an asymptote, which has three coefficients

EXPONENTS = (1e-3, 10.0)
"""Bounds of the search of c."""

_RESAMPLES = 1000
_WIDE = 10.0  # an interval of c over more than this factor says nothing about it
_Array = NDArray[np.float64]


class Points(NamedTuple):
    """Runs of several sizes: ``x`` ``[sizes]``, positive and increasing, seeds that every size has, ``y`` by both."""

    x: _Array
    seeds: tuple[str, ...]
    y: _Array


class Estimate(NamedTuple):
    """A coefficient, and its interval where there are ``MIN_SEEDS`` seeds and the resamples determine it."""

    value: float
    interval: Interval | None


class Fit(NamedTuple):
    """The coefficients fitted to the points of one method, and reasons to doubt them, as sentences.

    ``a``, ``b`` and ``c`` need ``MIN_SIZES`` sizes, ``k0`` and ``k`` two. Coefficients that the sizes do not
    determine are left out.
    """

    coefficients: Mapping[str, Estimate]
    notes: tuple[str, ...]


def points(values: Mapping[str, Mapping[str, tuple[float | None, float | None]]]) -> Points:
    """Return the points of a method's runs, of which ``values`` holds x and y by size and seed.

    They are of the sizes that have a run, with x as mean over seeds, and of the seeds that all these sizes have.
    """
    runs = []
    for seeds in values.values():
        known = {seed: (x, y) for seed, (x, y) in seeds.items() if x is not None and y is not None and x > 0}
        if known:
            runs.append((float(np.mean([x for x, _ in known.values()])), known))
    common = tuple(seed for seed in (runs[0][1] if runs else ()) if all(seed in known for _, known in runs))
    runs.sort(key=lambda run: run[0])
    y = [[known[seed][1] for seed in common] for _, known in runs]
    return Points(np.array([x for x, _ in runs]), common, np.array(y, np.float64).reshape(len(runs), len(common)))


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
    coefficients = _estimates(_fitted(found), len(found.seeds))
    return Fit(coefficients, tuple(notes + _doubts(sizes, coefficients)))


def differences(baseline: Points, method: Points) -> dict[str, Estimate]:
    """Return the coefficients of a method minus those of the baseline, both at the same resampled common seeds."""
    common = tuple(seed for seed in baseline.seeds if seed in method.seeds)
    if not common:
        return {}
    base, other = (
        _fitted(Points(one.x, common, one.y[:, [one.seeds.index(seed) for seed in common]]))
        for one in (baseline, method)
    )
    return _estimates({name: other[name] - base[name] for name in base if name in other}, len(common))


def power_law(x: _Array, y: _Array) -> tuple[_Array, _Array, _Array]:
    """Fit y = a + b x^-c with a >= 0 and b >= 0 by least squares, to many curves at once.

    The best a and b of each c have a closed form, so that only c is searched: on a grid over all of ``EXPONENTS``,
    and then ever closer around its best point. No starting point can be wrong.

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
    """Fit log y = k0 - k log x by least squares to curves ``[curves, sizes]``; k0 and k are ``[curves]`` each."""
    slope, k0 = np.polyfit(np.log(x), log_y.T, 1)
    return k0, -slope


def _best_lines(z: _Array, y: _Array) -> tuple[_Array, _Array, _Array]:
    """Fit y = a + b z over the last axis with a, b >= 0; return a, b and the sum of squared errors."""
    z_mean, y_mean = z.mean(-1), y.mean(-1)
    z_centred = z - z_mean[..., None]
    b = (z_centred * y).sum(-1) / np.maximum((z_centred**2).sum(-1), 1e-300)
    a = y_mean - b * z_mean
    through_0 = np.maximum((z * y).sum(-1) / (z**2).sum(-1), 0)
    a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through_0, b)
    a, b = np.where(b < 0, np.maximum(y_mean, 0), a), np.where(b < 0, 0.0, b)
    return a, b, ((y - a[..., None] - b[..., None] * z) ** 2).sum(-1)


def _fitted(found: Points) -> dict[str, _Array]:
    """Fit coefficients, ``[1 + resamples]`` each: to all seeds, and to resamples that are the same for all methods."""
    seeds = len(found.seeds)
    drawn = np.random.default_rng(RANDOM_SEED).integers(0, seeds, (_RESAMPLES, seeds))
    counts = np.concatenate([np.ones((1, seeds), np.int64), (drawn[:, :, None] == np.arange(seeds)).sum(axis=1)])
    rows, inverse = np.unique(counts, axis=0, return_inverse=True)  # with five seeds there are only 126
    share, sizes = rows / seeds, len(np.unique(found.x))
    result = dict[str, _Array]()
    if sizes >= MIN_SIZES:
        result |= zip("abc", power_law(found.x, share @ found.y.T), strict=True)
    if sizes >= 2 and (found.y > 0).all():
        result |= zip(("k0", "k"), line(found.x, share @ np.log(found.y).T), strict=True)
    return {name: values[inverse.reshape(-1)] for name, values in result.items()}


def _estimates(fitted: Mapping[str, _Array], seeds: int) -> dict[str, Estimate]:
    estimates = {}
    for name, values in fitted.items():
        value, drawn = values[0], values[1:]
        if np.isfinite(value):
            known = drawn[np.isfinite(drawn)]
            # No interval if so many resamples have no value that an end could be one of them.
            determined = seeds >= MIN_SEEDS and len(known) >= 0.975 * len(drawn)
            estimates[name] = Estimate(float(value), percentiles(known) if determined else None)
    return estimates


def _doubts(sizes: int, coefficients: Mapping[str, Estimate]) -> list[str]:
    """Return reasons to doubt the fit with an asymptote, from its own coefficients."""
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
