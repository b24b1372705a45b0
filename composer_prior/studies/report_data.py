"""What a study's page is made from: the header and the finished cells of a results file, and what the grids plan."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_prior.data.messages import one_line
from composer_prior.studies.comparison import Better, Curve, Values
from composer_prior.studies.results import TRAINING, read_lines
from composer_prior.studies.study import AXES, BETTER, METHOD, SCALING, SEED, combinations, grid_values, value_text

_SILENT = ("true", "false", "null", "none", "yes", "no", "on", "off")  # words that do not say of what they are

Setting = Mapping[str, str]
"""A value for each axis but method and seed."""


@dataclass
class Cell:
    """A run: its figures by ``benchmark/figure``, the curves of those that have one, the versions it ran with."""

    figures: dict[str, float | None] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True)
class Grid:
    """Cells that are shown together.

    Args:
        name: of the grid.
        values: of every axis, those that the grid has.
        scaling: the x axis of a scaling fit, or ``None``.
    """

    name: str
    values: dict[str, list[str]]
    scaling: str | None

    @property
    def settings(self) -> list[dict[str, str]]:
        """Every combination of the axes other than method and seed."""
        return [*combinations({axis: values for axis, values in self.values.items() if axis not in AXES})]

    @property
    def differing(self) -> list[str]:
        """The axes other than method and seed of which it has several values."""
        return [axis for axis, values in self.values.items() if axis not in AXES and len(values) > 1]


@dataclass(frozen=True)
class Study:
    """The header, its grids laid out, and the cells of the file by the values of their axes, in the axes' order."""

    name: str
    recipe: str
    axes: dict[str, list[str]]
    grids: list[Grid]
    baseline: str
    averaged: dict[str, Better]
    beside: dict[str, Better]
    curve: str | None
    fits: dict[str, Better]
    cells: dict[tuple[str, ...], Cell]

    @property
    def figures(self) -> dict[str, Better]:
        return {**self.averaged, **self.beside}

    @property
    def named(self) -> list[str]:
        """Every figure that the study names, once."""
        return list(dict.fromkeys([*self.averaged, *self.beside, *([self.curve] if self.curve else []), *self.fits]))

    def short(self, figure: str) -> str:
        """A figure without its benchmark, unless another that the study names is called so, too."""
        tail = figure.partition("/")[2]
        return tail if [name.partition("/")[2] for name in self.named].count(tail) == 1 else figure

    @property
    def planned(self) -> list[tuple[str, ...]]:
        """The keys of the cells of all grids, once each."""
        return list(dict.fromkeys(tuple(c.values()) for grid in self.grids for c in combinations(grid.values)))

    @property
    def defaults(self) -> dict[str, str]:
        """The setting of what no grid names."""
        return {axis: values[0] for axis, values in self.axes.items() if axis not in AXES}

    def finished(self, setting: Setting, method: str, seed: str) -> Cell | None:
        values = {**setting, METHOD: method, SEED: seed}
        cell = self.cells.get(tuple(values[axis] for axis in self.axes))
        return cell if cell and cell.finished else None

    def by_seed(self, setting: Setting, method: str, seeds: Sequence[str]) -> dict[str, Cell]:
        """The finished cells of a method."""
        found = ((seed, self.finished(setting, method, seed)) for seed in seeds)
        return {seed: cell for seed, cell in found if cell}

    def values(self, setting: Setting, method: str, seeds: Sequence[str], figure: str) -> Values:
        return {seed: cell.figures.get(figure) for seed, cell in self.by_seed(setting, method, seeds).items()}

    def methods(self, grid: Grid) -> list[str]:
        """Of a grid, the baseline first."""
        methods = grid.values[METHOD]
        return sorted(methods, key=lambda method: (method != self.baseline, methods.index(method)))

    def better(self, figure: str) -> Better | None:
        """What the study says of a figure, whatever it is for."""
        return self.figures.get(figure) or self.fits.get(figure)

    def said(self, setting: Setting, grid: Grid | None = None) -> str:
        """A setting in words: what is not at its default, and what the cells of the grid differ in."""
        differing = grid.differing if grid else ()
        return self.words({a: v for a, v in setting.items() if a in differing or v != self.defaults[a]})

    def words(self, setting: Setting) -> str:
        """The values of a setting; with their axis where they do not say themselves of what they are."""
        return ", ".join(value if self._is_plain(axis, value) else f"{axis} {value}" for axis, value in setting.items())

    def _is_plain(self, axis: str, value: str) -> bool:
        elsewhere = (other for name, values in self.axes.items() if name != axis for other in values)
        return bool(re.match(r"[^\W\d_]", value)) and value.lower() not in _SILENT and value not in elsewhere


def read(file: Path) -> Study:
    """Read a results file; half a line at its end, and cells that are not finished, count as not there.

    Raises:
        ValueError: if it is none, in one line with the number of its line.
    """
    study: Study | None = None
    for number, record in enumerate(read_lines(file), start=1):
        try:
            if study is None:
                study = _study(_of(record["study"], dict))
            else:
                _take(study, record)
        except KeyError as error:
            raise ValueError(f"{file}, line {number}: there is no {error}.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {one_line(error, 300)}.") from error
    if study is None:
        raise ValueError(f"{file}, line 1: there is no header.")
    return study


def _study(header: dict[str, Any]) -> Study:
    axes = {
        str(axis): [value_text(value) for value in (values if isinstance(values, list) else _of(values, dict))]
        for axis, values in _of(header["axes"], dict).items()
    }
    for axis in (*AXES, *axes):
        if not axes.get(axis):
            raise ValueError(f"axis {axis} has no values")
    figures = _of(header.get("figures") or {}, dict)
    study = Study(
        name=str(header["name"]),
        recipe=str(header.get("recipe", "")),
        axes=axes,
        grids=[_grid(name, _of(values, dict), axes) for name, values in _of(header["grids"], dict).items()],
        baseline=str(header["baseline"]),
        averaged=_directions(figures.get("averaged")),
        beside=_directions(figures.get("beside")),
        curve=header.get("curve"),
        fits=_directions(header.get("fits")),
        cells={},
    )
    if study.baseline not in axes[METHOD]:
        raise ValueError(f"the baseline {study.baseline} is no method")
    return study


def _grid(name: str, values: dict[str, Any], axes: Mapping[str, list[str]]) -> Grid:
    scaling = values.get("scaling")
    if scaling is not None and scaling not in SCALING:
        raise ValueError(f"grid {name} scales by {scaling}, which is none of {', '.join(SCALING)}")
    for axis in values:
        if axis not in (*axes, "scaling"):
            raise ValueError(f"grid {name} names {axis}, which is no axis")
    chosen = grid_values(values, axes)
    for axis, of_axis in chosen.items():
        if unknown := [value for value in of_axis if value not in axes[axis]]:
            raise ValueError(f"grid {name} names {unknown[0]}, which is no value of axis {axis}")
    return Grid(name, chosen, scaling)


def _directions(figures: Any) -> dict[str, Better]:
    for name, better in _of(figures or {}, dict).items():
        if better not in BETTER:
            raise ValueError(f"figure {name} is {better} where higher or lower is better")
    return dict(figures or {})


def _take(study: Study, record: dict[str, Any]) -> None:
    """Take in a line; of a cell that is there twice, as after a writer was killed, the later lines stand."""
    values = _of(_of(record, dict)["cell"], dict)
    if set(values) != set(study.axes):
        raise ValueError(f"the cell has the axes {', '.join(values)}, the study {', '.join(study.axes)}")
    cell = study.cells.setdefault(tuple(str(values[axis]) for axis in study.axes), Cell())
    benchmark = str(record["benchmark"])
    for name, value in _of(record["figures"], dict).items():
        cell.figures[f"{benchmark}/{name}"] = _number(value)
    curve = _of(record.get("curve") or {}, dict)
    batches = [float(batch) for batch in curve.get("batch", ())]
    for name, values in curve.items():
        if name != "batch":
            if len(values) != len(batches):
                raise ValueError(f"the curve {name} has {len(values)} values at {len(batches)} batches")
            cell.curves[f"{benchmark}/{name}"] = batches, [_number(value) for value in values]
    if benchmark == TRAINING:
        cell.versions = {str(name): str(version) for name, version in (record.get("versions") or {}).items()}
        cell.finished = True


def _number(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{value!r} stands where a number belongs")
    return float(value) if value is not None and math.isfinite(value) else None


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{str(value)[:80]!r} stands where a mapping belongs")
    return value


def numbers(values: Values) -> list[float]:
    """The numbers among values."""
    return [value for value in values.values() if value is not None]
