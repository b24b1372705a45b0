"""How numbers stand on a study's page: with the digits that say something, intervals as [low, high]."""

import math
from collections.abc import Sequence

from composer_prior.studies.comparison import Average, Comparison, Interval, word


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def amount(value: float | None) -> str:
    """A count of steps, tokens or FLOPs; nothing where it was not counted."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Minutes, or hours from the first on; nothing where it was not measured."""
    if seconds is None:
        return ""
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def relative(comparison: Comparison) -> str:
    """A relative improvement, its interval, and what may be said of it."""
    if comparison.improvement is None:
        return f"none {comparison.word}".rstrip()
    return _improved(comparison.improvement, comparison.improvement_interval, comparison.word)


def average(of_figures: Average) -> str:
    if of_figures.value is None:
        return "none"
    return _improved(of_figures.value, of_figures.interval, word(of_figures.interval))


def _improved(value: float, interval: Interval | None, said: str) -> str:
    return f"{100 * value:+.2f} %{_percents(interval, 2)} {said}".rstrip()


def share(value: float | None, interval: Interval | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %{_percents(interval, 1)}"


def _percents(interval: Interval | None, decimals: int) -> str:
    return f" [{100 * interval[0]:.{decimals}f}, {100 * interval[1]:.{decimals}f}]" if interval else ""


def mean_and_sd(values: Sequence[float]) -> str:
    """A mean over seeds with the digits of their standard deviation, which takes two."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.4g}"
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    decimals = _decimals(sd, 2) if sd > 1e-9 * abs(mean) else 4
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def difference(comparison: Comparison) -> str:
    """A difference and its interval, with three digits of the largest, and whether it is better or worse."""
    if comparison.difference is None:
        return "none"
    ends = comparison.difference_interval or ()
    decimals = _decimals(max(map(abs, (comparison.difference, *ends))), 3)
    said = f" {comparison.word}" if comparison.word in ("better", "worse") else ""
    interval = f" [{', '.join(f'{end:.{decimals}f}' for end in ends)}]" if ends else ""
    return f"{comparison.difference:+.{decimals}f}{interval}{said}"


def coefficient(value: float, interval: Interval | None, sign: str = "") -> str:
    """A coefficient or, with ``+`` as sign, a difference of two."""
    return f"{value:{sign}.3g} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else f"{value:{sign}.3g}"


def _decimals(value: float, digits: int) -> int:
    """After the point, so that a value has so many digits."""
    return min(max(digits - 1 - math.floor(math.log10(value)), 0), 12) if value > 0 else digits
