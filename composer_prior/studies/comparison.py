"""Methods compared with a baseline, paired by seed; intervals are 95 % percentile bootstraps over the seeds."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

MIN_SEEDS = 3
"""Fewer seeds than this have no interval."""

HELD = {3: 76, 4: 81, 5: 84, 6: 86, 8: 88, 10: 91, 20: 92}
"""Of so many seeds, how many per cent of these intervals hold the mean of a normal distribution; simulated."""

Better = Literal["higher", "lower"]
Interval = tuple[float, float]
Values = Mapping[str, float | None]
"""A figure by seed; ``None`` where a run has no number for it."""
Curve = tuple[Sequence[float], Sequence[float | None]]
"""Batches in order, and a figure at each."""

_RESAMPLES = 9999
_RANDOM_SEED = 20250508
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A method's figure beside the baseline's at the same seeds.

    Args:
        seeds: how many both have with a number.
        left_out: seeds that both have, but one of them without a number.
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
    """When a method is as good as the baseline at its end.

    Args:
        shares: by seed, the batch as a share of the baseline's steps at that seed; ``None`` where it never is.
        mean: over the seeds at which it is; ``None`` without one.
        interval: ``None`` with fewer than :data:`MIN_SEEDS` seeds, or where a seed never reaches it.
    """

    shares: dict[str, float | None]
    mean: float | None
    interval: Interval | None


def word(improvement: Interval | None) -> str:
    """What may be said of an interval in which positive is better."""
    if improvement is None:
        return ""
    low, high = improvement
    return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def compare(baseline: Values, method: Values, better: Better) -> Comparison:
    """Compare at the seeds that both have, in the baseline's order."""
    pairs, left_out = _paired(baseline, method)
    if not len(pairs):
        return Comparison(0, left_out, None, None, None, None, better)
    of_baseline, of_method = pairs.T
    difference = float(_mean(of_method - of_baseline))
    improvement = float(_improvement(of_baseline, of_method, better))
    intervals: list[Interval | None] = [None, None]
    if len(pairs) >= MIN_SEEDS:
        intervals = [
            _interval(lambda base, other, axis: _mean(other - base, axis), of_baseline, of_method),
            _interval(lambda base, other, axis: _improvement(base, other, better, axis), of_baseline, of_method),
        ]
    if math.isnan(improvement):
        return Comparison(len(pairs), left_out, difference, intervals[0], None, None, better)
    return Comparison(len(pairs), left_out, difference, intervals[0], improvement, intervals[1], better)


def average_improvement(figures: Mapping[str, tuple[Values, Values, Better]]) -> Average:
    """Average the relative improvements of figures, of each the baseline's values, the method's, and what is better.

    The seeds are resampled together for all figures, since one seed's figures are of one model.
    """
    usable = {name: figure for name, figure in figures.items() if relative_improvement(*figure) is not None}
    left_out = tuple(name for name in figures if name not in usable)
    if not usable:
        return Average(None, None, 0, left_out)
    # All figures' seeds: a figure that has no number at one of them is NaN there and skips it.
    seeds = dict.fromkeys(seed for baseline, *_ in usable.values() for seed in baseline)
    samples: list[_Array] = []
    for baseline, method, _ in usable.values():
        both = np.array([(_number(baseline.get(seed)), _number(method.get(seed))) for seed in seeds])
        both[np.isnan(both).any(axis=1)] = np.nan
        samples += list(both.T)
    directions = [better for _, _, better in usable.values()]

    def mean_improvement(*samples: _Array, axis: int = -1) -> _Array:
        pairs = zip(samples[::2], samples[1::2], directions, strict=True)
        return np.mean([_improvement(base, other, better, axis) for base, other, better in pairs], axis=0)

    fewest = min(int(np.isfinite(sample).sum()) for sample in samples)
    interval = _interval(mean_improvement, *samples) if fewest >= MIN_SEEDS else None
    return Average(float(mean_improvement(*samples)), interval, fewest, left_out)


def relative_improvement(baseline: Values, method: Values, better: Better) -> float | None:
    """The relative improvement alone, as in :func:`compare`."""
    pairs, _ = _paired(baseline, method)
    value = float(_improvement(pairs[:, 0], pairs[:, 1], better))
    return None if math.isnan(value) else value


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The interval of a mean over seeds."""
    return _interval(_mean, np.asarray(values, np.float64)) if len(values) >= MIN_SEEDS else None


def steps_until(curve: Curve, target: float, better: Better) -> float | None:
    """The first batch at which a curve is as good as the target, linear between its evaluations.

    Where the first evaluation is that good already it is its batch: earlier ones were not evaluated.

    Returns:
        ``None`` if it never is.
    """
    before: tuple[float, float] | None = None
    for batch, value in zip(*curve, strict=True):
        if value is None or not math.isfinite(value):
            continue
        if value >= target if better == "higher" else value <= target:
            if before is None:
                return float(batch)
            return before[0] + (batch - before[0]) * (target - before[1]) / (value - before[1])
        before = (batch, value)
    return None


def steps_until_baseline(baseline: Mapping[str, Curve], method: Mapping[str, Curve], better: Better) -> Reached:
    """When a method's curves reach the last value of the baseline's at the same seed."""
    shares: dict[str, float | None] = {}
    for seed, (batches, values) in baseline.items():
        known = [(b, v) for b, v in zip(batches, values, strict=True) if v is not None and math.isfinite(v)]
        if seed in method and known and known[-1][0] > 0:
            steps = steps_until(method[seed], known[-1][1], better)
            shares[seed] = None if steps is None else steps / known[-1][0]
    reached = [share for share in shares.values() if share is not None]
    interval = mean_interval(reached) if len(reached) == len(shares) else None
    return Reached(shares, float(np.mean(reached)) if reached else None, interval)


def _paired(baseline: Values, method: Values) -> tuple[_Array, tuple[str, ...]]:
    """Pairs ``[seeds, 2]`` of numbers, and the common seeds that lack one."""
    common = [seed for seed in baseline if seed in method]
    rows = [(_number(baseline[seed]), _number(method[seed])) for seed in common]
    known = [seed for seed, row in zip(common, rows, strict=True) if not any(map(math.isnan, row))]
    pairs = [row for row in rows if not any(map(math.isnan, row))]
    return np.array(pairs, np.float64).reshape(-1, 2), tuple(seed for seed in common if seed not in known)


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _mean(values: _Array, axis: int = -1) -> _Array:
    """The mean of what is not NaN, and NaN of nothing."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.sum(values, axis=axis, where=known) / np.sum(known, axis=axis)


def _improvement(baseline: _Array, method: _Array, better: Better, axis: int = -1) -> _Array:
    """The relative improvement of the means; NaN where the baseline's is 0."""
    sign = 1.0 if better == "higher" else -1.0
    size = np.abs(_mean(baseline, axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, sign * _mean(method - baseline, axis) / size, np.nan)


def _interval(statistic: Callable[..., Any], *samples: _Array) -> Interval | None:
    """The 2.5 and 97.5 % percentiles of a statistic at resampled seeds, without the resamples that have none."""
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
