"""Plots of runs and studies as SVG: the same numbers give the same bytes, and text stays text.

The user's own matplotlibrc changes nothing.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from composer_prior.data.messages import visible

# Okabe and Ito's colours, which most colour-blind readers can tell apart, without yellow, which is pale on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vPX*"
_PATH = re.compile(r'<path (id="\w+" )?d="[^"]*"')
_LONGEST = 56  # characters of a label
_SETTINGS = {
    "svg.hashsalt": "composer-prior",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are what users wrote
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",
}


class Line(NamedTuple):
    """A curve of :func:`line_chart`."""

    name: str
    points: Sequence[tuple[float, float]]  # x and y, ordered by x, at least one
    colour: int  # index into COLOURS
    dash: Literal["-", "--", ":"] = "-"
    dots: bool = False  # mark each point


class Scatter(NamedTuple):
    """Sizes and values of the runs of one method, and the line style and points of curves fitted through them."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    fits: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]]


Looks = Mapping[str, Mapping[str, Any]]
"""The colour and mark of each method as arguments of matplotlib."""


def looks_of(methods: Sequence[str]) -> Looks:
    """Return the looks of a study's methods, the baseline first."""
    return {
        method: {"color": COLOURS[number % len(COLOURS)], "marker": _MARKS[number % len(_MARKS)]}
        for number, method in enumerate(methods)
    }


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, x_end: float = 0.0, may_be_log: bool = False) -> str:
    """Draw one line or more over an x axis from 0 to ``x_end`` or later.

    With ``may_be_log`` the y axis is logarithmic if all values are positive and differ by more than a factor of ten.
    """
    values = np.array([y for line in lines for _, y in line.points])
    log = bool(may_be_log and values.min() > 0 and 10 < values.max() / values.min() < 1e30)
    with _drawn(6, 3.4) as (axes, svg):
        for line in lines:
            mark = "o" if line.dots or len(line.points) == 1 else ""
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, line.dash, color=COLOURS[line.colour], marker=mark, markersize=4, linewidth=1.4)
        axes.update_datalim([(0, values[0]), (x_end, values[0])])
        axes.autoscale_view()
        if log:
            _logarithmic(axes.yaxis, values)
        _explain(axes, x_label, y_label + ", logarithmic" * log, axes.get_lines(), [line.name for line in lines])
    return svg[0]


def learning_curves(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float | None]]]], figure: str, looks: Looks
) -> str:
    """Draw the mean over the seeds of each method, in a band from their smallest to their largest value.

    ``curves`` holds by method the batches and values of each seed.
    """
    with _drawn(6, 3.6) as (axes, svg):
        for method, of_seeds in curves.items():
            at: dict[float, list[float]] = {}
            for batches, values in of_seeds:
                for batch, value in zip(batches, values, strict=True):
                    if value is not None:
                        at.setdefault(batch, []).append(value)
            x = sorted(at)
            mean, low, high = ([float(of(at[batch])) for batch in x] for of in (np.mean, np.min, np.max))
            axes.fill_between(x, low, high, color=looks[method]["color"], alpha=0.15, linewidth=0)
            axes.plot(x, mean, **looks[method], markersize=4, linewidth=1.4)
        _explain(axes, "batch", figure, axes.get_lines(), list(curves))
    return svg[0]


def forest(
    rows: Sequence[tuple[str, Mapping[str, tuple[float, tuple[float, float] | None]]]], baseline: str, looks: Looks
) -> str:
    """Draw relative improvements over a baseline: a row per figure, in it each method with its interval."""
    methods = list(dict.fromkeys(method for _, row in rows for method in row))
    with _drawn(5, 1.2 + 0.3 * len(rows) + 0.16 * len(rows) * len(methods)) as (axes, svg):
        axes.axvline(0, color="#555555", linewidth=1)
        for number, (_, row) in enumerate(rows):
            for method, (value, interval) in row.items():
                y = number + 0.7 * ((methods.index(method) + 0.5) / len(methods) - 0.5)
                ends = interval or (value, value)
                axes.plot([100 * end for end in ends], [y, y], color=looks[method]["color"], linewidth=1.6)
                axes.plot([100 * value], [y], **looks[method], markersize=5)
        axes.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        marks = [Line2D([], [], **looks[method], markersize=5) for method in methods]
        _explain(axes, f"improvement over {baseline}, % (right is better)", "", marks, methods)
    return svg[0]


def scaling(found: Mapping[str, Scatter], x_label: str, figure: str, looks: Looks) -> str:
    """Draw the runs and fits of each method on logarithmic axes; an axis with a value of 0 or less is linear."""
    with _drawn(6, 3.8) as (axes, svg):
        for method, one in found.items():
            axes.plot(one.x, one.y, linestyle="none", **looks[method], markersize=4, alpha=0.6)
            for dash, x, y in one.fits:
                axes.plot(x, y, dash, color=looks[method]["color"], linewidth=1.2)
        _logarithmic(axes.xaxis, np.concatenate([one.x for one in found.values()]))
        _logarithmic(axes.yaxis, np.concatenate([one.y for one in found.values()]))
        marks = [Line2D([], [], **looks[method], markersize=4) for method in found]
        _explain(axes, x_label, figure, marks, list(found))
    return svg[0]


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Yield axes of a size in inches to draw on, and a list that gets their SVG at the end."""
    svg = list[str]()
    with style.context(_SETTINGS, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.10g}")
        yield axes, svg
        written = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the reader's fonts draw the text
            FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
        rounded = _PATH.sub(lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), written.getvalue())
        svg.append("\n".join(line.rstrip() for line in rounded.splitlines()) + "\n")


def _logarithmic(axis: Any, values: NDArray[np.float64]) -> None:
    """Make an axis logarithmic, with labels that are no TeX as matplotlib's own; linear for values of 0 or less."""
    if not values.size or not (values > 0).all():
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1e4 * values.min() else (1,)))
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_locator(NullLocator())


def _explain(axes: Axes, x_label: str, y_label: str, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    """Label the axes and add a legend."""
    axes.set(xlabel=_label(x_label), ylabel=_label(y_label))
    labels = [_label(name) for name in names]
    room = 18 * axes.figure.bbox.width / axes.figure.dpi  # characters of a row, 8 of them for each mark
    split = {count: [part for part in np.array_split(labels, count) if len(part)] for count in (4, 3, 2)}
    fitting = (count for count, parts in split.items() if sum(8 + max(map(len, part)) for part in parts) <= room)
    columns = next(fitting, 1)
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def _label(text: str) -> str:
    """Return text that XML can hold, short enough to leave room for the plot; the tables have all of it."""
    text = visible(text).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 16]}…{text[-15:]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides what begins with an underscore
