"""Curves as SVG that stands in a page: its text is text, its colours are the page's, and it needs no script.

matplotlib's SVG would be 35 kB a chart in fixed colours, and 2 s at the end of each run; this is a tenth of either.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from composer_prior.reports.page import escape, plain

POINTS = 500  # of a curve, at most

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 12, 12, 44  # margins
COLOURS = 6
Dash = Literal["", "dashed", "dotted"]
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
.charts svg { width: 100%; height: auto; color: inherit }
.charts text { fill: currentColor; font-size: 12px }
.charts .grid { stroke: #8884 }
.charts polyline, .legend line { fill: none; stroke: var(--c); stroke-width: 1.7 }
.charts .dashed { stroke-dasharray: 5 4 }
.charts .dotted { stroke-dasharray: 1.5 3 }
.charts circle { fill: var(--c) }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.25rem; margin: .25rem 0 0; padding: 0; list-style: none }
.charts .legend svg { width: 28px; height: 10px }
.k0 { --c: #0066b3 } .k1 { --c: #c44e00 } .k2 { --c: #00795c } .k3 { --c: #a3448a } .k4 { --c: #7a6200 }
.k5 { --c: #666 }
@media (prefers-color-scheme: dark) {
  .k0 { --c: #5ab0f0 } .k1 { --c: #ff8c4a } .k2 { --c: #3ccfa3 } .k3 { --c: #e08cc8 } .k4 { --c: #e6c02e }
  .k5 { --c: #aaa }
}
"""


@dataclass
class Curve:
    """A curve of any number of points in bounded memory: neighbours are averaged so that few enough are left.

    Bins have the same width, a power of two that doubles when there are more than :data:`POINTS` of them.
    """

    width: int = 1
    bins: dict[int, list[float]] = field(default_factory=dict)  # count, sum of x, sum of y

    def add(self, x: float, y: float) -> None:
        """Take one point in."""
        self._put(int(x // self.width), 1, x, y)
        while len(self.bins) > POINTS:
            self.width *= 2
            narrow, self.bins = self.bins, {}
            for number, sums in narrow.items():
                self._put(number // 2, *sums)

    def _put(self, number: int, count: float, x: float, y: float) -> None:
        sums = self.bins.get(number)
        if sums is None:
            self.bins[number] = [count, x, y]
        else:
            sums[0] += count
            sums[1] += x
            sums[2] += y

    @property
    def points(self) -> list[tuple[float, float]]:
        """The means of the bins, in order."""
        return [(x / count, y / count) for _, (count, x, y) in sorted(self.bins.items())]


@dataclass(frozen=True)
class Line:
    """A curve as a chart shows it.

    Args:
        name: in the legend.
        points: x and y, ordered by x; at least one.
        colour: number of a colour, of which there are :data:`COLOURS`.
        dash: how to break it, as for what others are compared with.
        dots: mark each point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dash: Dash = ""
    dots: bool = False


def chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, x_end: float = 0.0, may_be_log: bool = False
) -> str:
    """A ``figure`` element with lines and their legend; its x axis begins at 0.

    Args:
        title: plain text, as all others.
        lines: at least one.
        x_label, y_label: of the axes.
        x_end: where the x axis ends, or later.
        may_be_log: a logarithmic y axis where the values are positive and the largest is over ten times the smallest.
    """
    xs = [0.0, x_end, *(x for line in lines for x, _ in line.points)]
    ys = [y for line in lines for _, y in line.points]
    log = may_be_log and min(ys) > 0 and max(ys) > 10 * min(ys)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    across = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    low, high = min(ys + y_ticks), max(ys + y_ticks)
    upwards = _scale(math.log(low), math.log(high), _HEIGHT - _BOTTOM, _TOP) if log else None
    linear = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)

    def up(y: float) -> float:
        return linear(y) if upwards is None else upwards(math.log(y))

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_number(x)}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label + (', logarithmic' if log else ''))}</text>"
    )
    for line in lines:
        places = [(across(x), up(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<g class="k{line.colour}"><polyline class="{line.dash}" points="{path}"/>')
        if line.dots or len(places) == 1:
            for (x, y), point in zip(places, line.points, strict=True):
                says = plain(f"{line.name}: {point[1]:.4g} at {x_label} {_number(point[0])}")
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{says}</title></circle>')
        parts.append("</g>")
    spans = (f"{line.name}: {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    description = f"{y_label} by {x_label}, {_number(min(xs))} to {_number(max(xs))}. {'; '.join(spans)}."
    dot = '<circle cx="14" cy="5" r="3"/>'
    legend = "".join(
        f'<li class="k{line.colour}"><svg viewBox="0 0 28 10" aria-hidden="true">'
        f'<line class="{line.dash}" x1="0" x2="28" y1="5" y2="5"/>'
        f"{dot if line.dots else ''}</svg> {escape(line.name)}</li>"
        for line in lines
    )
    return (
        f'<figure><figcaption dir="auto">{escape(title)}</figcaption>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n<title>{plain(title)}</title>'
        f"<desc>{plain(description)}</desc>\n"
        + "\n".join(parts)
        + f'\n</svg>\n<ul class="legend">{legend}</ul></figure>\n'
    )


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About so many round numbers from low to high."""
    rough = (high - low) / count or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times a power of ten from low to high; of many powers the powers alone."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """What maps low to start and high to end; a span of nothing lies in the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"
