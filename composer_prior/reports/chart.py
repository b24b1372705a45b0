"""Curves as SVG that stands in a page: its text is text, its colours are the page's, and it needs no script.

matplotlib would take 1.6 s (import, six charts) at the end of each run, and write 35 kB a chart in fixed colours.
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
Scale = Callable[[float], float]
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
    bend: Scale = math.log if log else float
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    across = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _scale(bend(min(ys)), bend(max(ys)), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *(_row(y, up(bend(y))) for y in y_ticks),
        *(_text(_number(x), "middle", across(x), _HEIGHT - _BOTTOM + 18) for x in ticks(min(xs), max(xs))),
        _text(x_label, "middle", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6),
        _text(y_label + ", logarithmic" * log, "middle", 14, (_TOP + _HEIGHT - _BOTTOM) / 2, turn=-90),
        *(_drawn(line, [(across(x), up(bend(y))) for x, y in line.points], x_label) for line in lines),
    ]
    spans = (f"{line.name}: {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    description = f"{y_label} by {x_label}, {_number(min(xs))} to {_number(max(xs))}. {'; '.join(spans)}."
    return (
        f'<figure><figcaption dir="auto">{escape(title)}</figcaption>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n<title>{plain(title)}</title>'
        f"<desc>{plain(description)}</desc>\n{''.join(parts)}</svg>\n"
        f'<ul class="legend">{"".join(map(_legend, lines))}</ul></figure>\n'
    )


def _row(value: float, y: float) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(_number(value), "end", _LEFT - 6, y + 4)


def _text(text: str, anchor: str, x: float, y: float, turn: int = 0) -> str:
    place = f"translate({x:.1f} {y:.1f})" + (f" rotate({turn})" if turn else "")
    return f'<text transform="{place}" text-anchor="{anchor}">{escape(text)}</text>\n'


def _drawn(line: Line, places: Sequence[tuple[float, float]], x_label: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = ""
    if line.dots or len(places) == 1:
        for (x, y), (at, value) in zip(places, line.points, strict=True):
            says = plain(f"{line.name}: {value:.4g} at {x_label} {_number(at)}")
            dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{says}</title></circle>'
    return f'<g class="k{line.colour}"><polyline class="{line.dash}" points="{path}"/>{dots}</g>\n'


def _legend(line: Line) -> str:
    dot = '<circle cx="14" cy="5" r="3"/>' if line.dots else ""
    sign = f'<line class="{line.dash}" x1="0" x2="28" y1="5" y2="5"/>{dot}'
    return (
        f'<li class="k{line.colour}"><svg viewBox="0 0 28 10" aria-hidden="true">{sign}</svg> {escape(line.name)}</li>'
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


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """What maps low to start and high to end; a span of nothing lies in the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"
