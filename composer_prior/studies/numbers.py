"""Number formats of a study's page: significant digits only, intervals as [low, high]."""

import math
from collections.abc import Sequence

from composer_prior.studies.comparison import Comparison
from composer_prior.studies.study import Interval


def listed(names: Sequence[str]) -> str:
    """Join names as ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(count: int, name: str) -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def amount(value: float | None) -> str:
    """Format a count of steps, tokens or FLOPs; empty if it was not counted."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Format seconds as minutes or hours; empty if they were not measured."""
    if seconds is None:
        return ""
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def relative(value: float | None, interval: Interval | None, verdict: str) -> str:
    """Format a relative improvement, its interval and its verdict."""
    shown = "none" if value is None else f"{100 * value:+.2f} %{_percents(interval, 2)}"
    return f"{shown} {verdict}".rstrip()


def share(value: float | None, interval: Interval | None) -> str:
    """Format a share in per cent."""
    return "" if value is None else f"{100 * value:.1f} %{_percents(interval, 1)}"


def _percents(interval: Interval | None, decimals: int) -> str:
    return f" [{100 * interval[0]:.{decimals}f}, {100 * interval[1]:.{decimals}f}]" if interval else ""


def mean_and_sd(values: Sequence[float]) -> str:
    """Format a mean over seeds with two digits of their standard deviation."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.4g}"
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    decimals = _decimals(sd, 2) if sd > 1e-9 * abs(mean) else 4
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def difference(comparison: Comparison) -> str:
    """Format a difference and its interval, with three digits of the largest, and whether it is better or worse."""
    if comparison.difference is None:
        return "none"
    ends = comparison.difference_interval or ()
    decimals = _decimals(max(map(abs, (comparison.difference, *ends))), 3)
    said = f" {comparison.word}" if comparison.word in ("better", "worse") else ""
    interval = f" [{', '.join(f'{end:.{decimals}f}' for end in ends)}]" if ends else ""
    return f"{comparison.difference:+.{decimals}f}{interval}{said}"


def coefficient(value: float, interval: Interval | None, sign: str = "") -> str:
    """Format a coefficient or, with ``+`` as sign, a difference of two."""
    return f"{value:{sign}.3g} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else f"{value:{sign}.3g}"


def _decimals(value: float, digits: int) -> int:
    """Return the decimals with which a value has this many digits."""
    return min(max(digits - 1 - math.floor(math.log10(value)), 0), 12) if value > 0 else digits
