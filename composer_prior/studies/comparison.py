"""Methods compared with a baseline, paired by seed; intervals are 95 % percentile bootstraps over the seeds."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from composer_prior.studies.study import Better, Curve, Interval, Values

MIN_SEEDS = 3
"""Fewer seeds than this have no interval."""

HELD = {3: 76, 4: 81, 5: 84, 6: 86, 8: 88, 10: 91, 20: 92}
"""Of so many seeds, how many per cent of these intervals hold the mean of a normal distribution; simulated."""

_RESAMPLES = 9999
_RANDOM_SEED = 20250508
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A method's figure beside the baseline's at the same seeds.

    Args:
        seeds: number of seeds at which both have a number.
        left_out: common seeds at which one of them has none.
        difference: mean of method minus baseline, in the figure's unit; ``None`` without seeds.
        difference_interval: ``None`` with fewer than :data:`MIN_SEEDS` seeds.
        improvement: the difference relative to the baseline's mean, positive where the method is better; ``None``
            where the baseline's mean is 0.
        improvement_interval: of that.
        better: which values of the figure are better.
    """

    seeds: int
    left_out: tuple[str, ...]
    difference: float | None
    difference_interval: Interval | None
    improvement: float | None
    improvement_interval: Interval | None
    better: Better

    @property
    def word(self) -> str:
        """``better`` or ``worse`` where the interval of the difference excludes 0; nothing without an interval."""
        if self.difference_interval is None:
            return ""
        low, high = self.difference_interval
        return word((low, high) if self.better == "higher" else (-high, -low))


@dataclass(frozen=True)
class Average:
    """The mean over figures of each figure's relative improvement.

    Args:
        value: positive where the method is better; ``None`` where no figure has an improvement.
        interval: all figures at the same resampled seeds; ``None`` if a figure has fewer than :data:`MIN_SEEDS` seeds.
        seeds: of the figure that has fewest.
        left_out: figures without an improvement, which are not in the mean.
    """

    value: float | None
    interval: Interval | None
    seeds: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Reached:
    """The steps after which a method is as good as the baseline at its end.

    Args:
        shares: by seed, the batch as a share of the baseline's steps at that seed; ``None`` where it never is.
        mean: over the seeds at which it is; ``None`` without one.
        interval: ``None`` with fewer than :data:`MIN_SEEDS` seeds, or where a seed never reaches it.
    """

    shares: dict[str, float | None]
    mean: float | None
    interval: Interval | None


def word(improvement: Interval | None) -> str:
    """Return the verdict on an interval in which positive is better; empty without an interval."""
    if improvement is None:
        return ""
    low, high = improvement
    return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def compare(baseline: Values, method: Values, better: Better) -> Comparison:
    """Compare at the seeds that both have, in the baseline's order."""
    of_baseline, of_method, left_out = _paired(baseline, method)
    seeds = len(of_baseline)
    if not seeds:
        return Comparison(0, left_out, None, None, None, None, better)

    def improved(base: _Array, other: _Array, axis: int = -1) -> _Array:
        return _improvement(base, other, better, axis)

    improvement, enough = float(improved(of_baseline, of_method)), seeds >= MIN_SEEDS
    return Comparison(
        seeds,
        left_out,
        float(_mean(of_method - of_baseline)),
        _interval(lambda base, other, axis: _mean(other - base, axis), of_baseline, of_method) if enough else None,
        None if math.isnan(improvement) else improvement,
        _interval(improved, of_baseline, of_method) if enough and not math.isnan(improvement) else None,
        better,
    )


def average_improvement(figures: Mapping[str, tuple[Values, Values, Better]]) -> Average:
    """Average the relative improvements of figures, of each the baseline's values, the method's, and what is better.

    The seeds are resampled together for all figures, since one seed's figures are of one model.
    """
    left_out, directions, samples = list[str](), list[Better](), list[_Array]()
    # All figures' seeds: a figure that has no number at one of them is NaN there and skips it.
    seeds = dict.fromkeys(seed for baseline, *_ in figures.values() for seed in baseline)
    for name, (baseline, method, better) in figures.items():
        both = np.array([(_number(baseline.get(seed)), _number(method.get(seed))) for seed in seeds]).reshape(-1, 2)
        both[np.isnan(both).any(axis=1)] = np.nan
        if np.isnan(_improvement(both[:, 0], both[:, 1], better)):
            left_out.append(name)
        else:
            directions.append(better)
            samples += list(both.T)
    if not samples:
        return Average(None, None, 0, tuple(left_out))

    def mean_improvement(*samples: _Array, axis: int = -1) -> _Array:
        pairs = zip(samples[::2], samples[1::2], directions, strict=True)
        return np.mean([_improvement(base, other, better, axis) for base, other, better in pairs], axis=0)

    fewest = min(int(np.isfinite(sample).sum()) for sample in samples)
    interval = _interval(mean_improvement, *samples) if fewest >= MIN_SEEDS else None
    return Average(float(mean_improvement(*samples)), interval, fewest, tuple(left_out))


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
    enough = len(reached) == len(shares) and len(reached) >= MIN_SEEDS
    interval = _interval(_mean, np.asarray(reached, np.float64)) if enough else None
    return Reached(shares, float(np.mean(reached)) if reached else None, interval)


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(b, v) for b, v in zip(*curve, strict=True) if v is not None and math.isfinite(v)]


def _paired(baseline: Values, method: Values) -> tuple[_Array, _Array, tuple[str, ...]]:
    """Return the values at the common seeds, ``[seeds]`` each, and the common seeds that lack one."""
    common = [seed for seed in baseline if seed in method]
    pairs = np.array([(_number(baseline[seed]), _number(method[seed])) for seed in common]).reshape(-1, 2)
    known = np.isfinite(pairs).all(axis=1)
    left_out = tuple(seed for seed, there in zip(common, known, strict=True) if not there)
    return *pairs[known].T, left_out


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


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
    """Return the 2.5 and 97.5 % percentiles of a statistic over resampled seeds, without resamples that have none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of the resamples that have none
        drawn = bootstrap(
            samples,
            statistic,
            n_resamples=_RESAMPLES,
            vectorized=True,
            paired=True,
            method="percentile",
            random_state=np.random.default_rng(_RANDOM_SEED),
        ).bootstrap_distribution
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
