"""Methods compared with a baseline, paired by seed; intervals are 95 % percentile bootstraps over the seeds."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from composer_prior.studies.study import Better, Curve, Interval, Values

MIN_SEEDS = 3
"""Fewer seeds than this have no interval."""

HELD = {3: 76, 4: 81, 5: 84, 6: 86, 8: 88, 10: 91, 20: 92}
"""Of so many seeds, how many per cent of these intervals hold the mean of a normal distribution; simulated."""

RANDOM_SEED = 20250508  # of resamples
_RESAMPLES = 9999
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A method's figure beside the baseline's at the same seeds; intervals need ``MIN_SEEDS`` seeds."""

    seeds: int  # at which both have a number
    left_out: tuple[str, ...]  # common seeds at which one of them has none
    better: Better
    difference: float | None = None  # mean of method minus baseline, in the figure's unit
    difference_interval: Interval | None = None
    improvement: float | None = None  # relative to the baseline's mean, positive where better; None where that is 0
    improvement_interval: Interval | None = None

    @property
    def word(self) -> str:
        """``better`` or ``worse`` where the interval of the difference excludes 0; nothing without an interval."""
        if self.difference_interval is None:
            return ""
        low, high = self.difference_interval
        return word((low, high) if self.better == "higher" else (-high, -low))


class Average(NamedTuple):
    """The mean over figures of each figure's relative improvement, positive where the method is better."""

    value: float | None
    interval: Interval | None  # of all figures at the same resampled seeds
    seeds: int  # of the figure that has fewest
    left_out: tuple[str, ...]  # figures without an improvement


class Reached(NamedTuple):
    """The steps after which a method is as good as the baseline at its end, as a share of the baseline's steps."""

    shares: dict[str, float | None]  # by seed; None where it never is
    mean: float | None  # over the seeds at which it is
    interval: Interval | None  # None also where a seed never reaches it


def word(improvement: Interval | None) -> str:
    """Return the verdict on an interval in which positive is better; empty without an interval."""
    if improvement is None:
        return ""
    low, high = improvement
    return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def compare(baseline: Values, method: Values, better: Better) -> Comparison:
    """Compare at the seeds that both have, in the baseline's order."""
    common = [seed for seed in baseline if seed in method]
    of_baseline, of_method = _pairs(baseline, method, common)
    known = np.isfinite(of_baseline)
    left_out = tuple(seed for seed, there in zip(common, known, strict=True) if not there)
    of_baseline, of_method, seeds = of_baseline[known], of_method[known], int(known.sum())
    if not seeds:
        return Comparison(0, left_out, better)
    improved = partial(_improvement, better=better)
    improvement = float(improved(of_baseline, of_method))
    return Comparison(
        seeds,
        left_out,
        better,
        float(_mean(of_method - of_baseline)),
        _interval(lambda base, other, axis: _mean(other - base, axis), of_baseline, of_method),
        None if math.isnan(improvement) else improvement,
        None if math.isnan(improvement) else _interval(improved, of_baseline, of_method),
    )


def average_improvement(figures: Mapping[str, tuple[Values, Values, Better]]) -> Average:
    """Average the relative improvements of figures, of each the baseline's values, the method's, and what is better.

    The seeds are resampled together for all figures, since one seed's figures are of one model.
    """
    left_out, directions, samples = list[str](), list[Better](), list[_Array]()
    # All figures' seeds: a figure that has no number at one of them is NaN there and skips it.
    seeds = dict.fromkeys(seed for baseline, *_ in figures.values() for seed in baseline)
    for name, (baseline, method, better) in figures.items():
        pair = _pairs(baseline, method, seeds)
        if np.isnan(_improvement(pair[0], pair[1], better)):
            left_out.append(name)
        else:
            directions.append(better)
            samples.extend(pair)
    if not samples:
        return Average(None, None, 0, tuple(left_out))

    def mean_improvement(*samples: _Array, axis: int = -1) -> _Array:
        pairs = zip(samples[::2], samples[1::2], directions, strict=True)
        return np.mean([_improvement(base, other, better, axis) for base, other, better in pairs], axis=0)

    fewest = min(int(np.isfinite(sample).sum()) for sample in samples)
    return Average(float(mean_improvement(*samples)), _interval(mean_improvement, *samples), fewest, tuple(left_out))


def steps_until(curve: Curve, target: float, better: Better) -> float | None:
    """Return the first batch at which a curve is as good as the target, linear between its evaluations.

    The first evaluation counts as its own batch, as earlier ones are unknown. ``None`` if the curve never is.
    """
    before: tuple[float, float] | None = None
    for batch, value in _finite(curve):
        if value >= target if better == "higher" else value <= target:
            if before is None:
                return float(batch)
            return before[0] + (batch - before[0]) * (target - before[1]) / (value - before[1])
        before = (batch, value)
    return None


def steps_until_baseline(baseline: Mapping[str, Curve], method: Mapping[str, Curve], better: Better) -> Reached:
    """Return when a method's curves reach the last value of the baseline's at the same seed."""
    shares: dict[str, float | None] = {}
    for seed, curve in baseline.items():
        known = _finite(curve)
        if seed in method and known and known[-1][0] > 0:
            steps = steps_until(method[seed], known[-1][1], better)
            shares[seed] = None if steps is None else steps / known[-1][0]
    reached = [share for share in shares.values() if share is not None]
    interval = _interval(_mean, np.asarray(reached, np.float64)) if len(reached) == len(shares) else None
    return Reached(shares, float(np.mean(reached)) if reached else None, interval)


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(b, v) for b, v in zip(*curve, strict=True) if v is not None and math.isfinite(v)]


def _pairs(baseline: Values, method: Values, seeds: Iterable[str]) -> _Array:
    """Return the values at the seeds, ``[2, seeds]``: both NaN where one of them has no number."""
    pairs = np.array([(baseline.get(seed), method.get(seed)) for seed in seeds], np.float64).reshape(-1, 2)
    pairs[~np.isfinite(pairs).all(axis=1)] = np.nan
    return pairs.T


def _mean(values: _Array, axis: int = -1) -> _Array:
    """Return the mean of values that are not NaN; NaN if all are."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.sum(values, axis=axis, where=known) / np.sum(known, axis=axis)


def _improvement(baseline: _Array, method: _Array, better: Better, axis: int = -1) -> _Array:
    """Return the relative improvement of the means; NaN where the baseline's is 0."""
    sign = 1.0 if better == "higher" else -1.0
    size = np.abs(_mean(baseline, axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, sign * _mean(method - baseline, axis) / size, np.nan)


def _interval(statistic: Callable[..., Any], *samples: _Array) -> Interval | None:
    """Return the 2.5 and 97.5 % percentiles of a statistic over resampled seeds, without resamples that have none.

    ``None`` if a sample has fewer than ``MIN_SEEDS`` values, or no resample has a number.
    """
    if min(np.isfinite(sample).sum() for sample in samples) < MIN_SEEDS:
        return None
    seeds = len(samples[0])
    drawn = np.random.default_rng(RANDOM_SEED).integers(0, seeds, (_RESAMPLES, seeds))
    values = statistic(*(sample[drawn] for sample in samples), axis=-1)
    return percentiles(values[np.isfinite(values)])


def percentiles(drawn: _Array) -> Interval | None:
    """Return the 2.5 and 97.5 % percentiles; ``None`` of nothing."""
    if not len(drawn):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
