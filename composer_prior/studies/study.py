"""A study: a YAML file that names runs, which the runner makes and the page compares.

Reading one needs neither Composer nor torch, so that a mistake in it is answered at once.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from composer_prior.data.files import load_yaml
from composer_prior.data.messages import one_line
from composer_prior.registry import did_you_mean
from composer_prior.training.config import HELPERS, SHIPPED, TrainConfig, load_recipe, written

KEYS = ("name", "recipe", "overrides", "axes", "grids", "baseline", "figures", "curve", "fits")
REQUIRED = ("name", "recipe", "axes", "grids", "baseline", "figures")
AXES = METHOD, SEED = "method", "seed"  # that every study has
SCALING = ("flops", "samples", "unique_samples", "tokens")
_SILENT = ("true", "false", "null", "none", "yes", "no", "on", "off")  # words that need the name of their axis

Better = Literal["higher", "lower"]
Interval = tuple[float, float]
Values = Mapping[str, float | None]
"""A figure by seed; ``None`` where a run has no number for it."""
Curve = tuple[Sequence[float], Sequence[float | None]]
"""Batches in order, and a figure at each."""
Setting = Mapping[str, str]
"""A value for each axis but method and seed."""


@dataclass(frozen=True)
class Cell:
    """One run of a study, as it is planned: the name of its folder, its value of every axis, and its recipe."""

    name: str
    values: dict[str, str]
    recipe: Path
    overrides: dict[str, Any]

    def load(self, further: Mapping[str, Any] | None = None) -> TrainConfig:
        """Load its recipe, with further overrides.

        Raises:
            ValueError, FileNotFoundError: naming the cell and the key.
        """
        try:
            return load_recipe(self.recipe, as_words({**self.overrides, **(further or {})}))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"Cell {self.name}: {one_line(error)}") from error


@dataclass
class Run:
    """The results of a finished cell: figures and curves by ``benchmark/figure``, and the versions it ran with."""

    figures: dict[str, float | None] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """Cells that are shown together: the values of every axis, the baseline, and the x axis of a fit, or ``None``."""

    name: str
    values: dict[str, list[str]]
    baseline: str
    scaling: str | None

    @property
    def settings(self) -> list[dict[str, str]]:
        """Every combination of the axes other than method and seed."""
        return [*combinations({axis: values for axis, values in self.values.items() if axis not in AXES})]

    @property
    def differing(self) -> list[str]:
        """The axes other than method and seed of which it has several values."""
        return [axis for axis, values in self.values.items() if axis not in AXES and len(values) > 1]


@dataclass
class Study:
    """A study, read and checked."""

    header: dict[str, Any]  # of results: the keys of the YAML, values of axes as text, and `recipes`
    cells: list[Cell] = field(default_factory=list)  # in the order of the grids; none where only results were read
    recipes: dict[str, TrainConfig] = field(default_factory=dict)  # of each cell, without what the cells share
    runs: dict[tuple[str, ...], Run] = field(default_factory=dict)  # by the values of all axes, in the axes' order

    def __post_init__(self) -> None:
        figures = self.header["figures"]
        self.name: str = self.header["name"]
        self.recipe: str = self.header["recipe"]
        self.axes: dict[str, list[str]] = {axis: [*values] for axis, values in self.header["axes"].items()}
        self.baseline: str = self.header["baseline"]
        self.averaged: dict[str, Better] = figures.get("averaged") or {}
        self.beside: dict[str, Better] = figures.get("beside") or {}
        self.figures: dict[str, Better] = {**self.averaged, **self.beside}
        self.curve: str | None = self.header["curve"]
        self.fits: dict[str, Better] = self.header["fits"]
        self.grids = [
            Grid(
                name,
                {axis: _chosen(grid.get(axis, of[0]), of) for axis, of in self.axes.items()},
                grid.get("baseline", self.baseline),
                grid.get("scaling"),
            )
            for name, grid in self.header["grids"].items()
        ]

    @cached_property
    def named(self) -> list[str]:
        """Every figure that the study names, once."""
        return list(dict.fromkeys([*self.figures, *([self.curve] if self.curve else []), *self.fits]))

    @cached_property
    def planned(self) -> list[tuple[str, ...]]:
        """The values of the cells of all grids, once each."""
        return list(dict.fromkeys(tuple(c.values()) for grid in self.grids for c in combinations(grid.values)))

    @property
    def defaults(self) -> dict[str, str]:
        """The setting of a cell whose grid names no axis."""
        return {axis: values[0] for axis, values in self.axes.items() if axis not in AXES}

    def short(self, figure: str) -> str:
        """Return a figure without its benchmark, unless the study names another of that name."""
        tail = figure.partition("/")[2]
        return tail if [name.partition("/")[2] for name in self.named].count(tail) == 1 else figure

    def by_seed(self, setting: Setting, method: str, seeds: Sequence[str]) -> dict[str, Run]:
        """Return the finished runs of a method."""
        found = {}
        for seed in seeds:
            values = {**setting, METHOD: method, SEED: seed}
            if run := self.runs.get(tuple(values[axis] for axis in self.axes)):
                found[seed] = run
        return found

    def values(self, setting: Setting, method: str, seeds: Sequence[str], figure: str) -> Values:
        """Return a figure of a method's finished runs by seed."""
        return {seed: run.figures.get(figure) for seed, run in self.by_seed(setting, method, seeds).items()}

    def methods(self, grid: Grid | None = None) -> list[str]:
        """Return the methods of a grid or of the study, the baseline first."""
        methods, baseline = (grid.values[METHOD], grid.baseline) if grid else (self.axes[METHOD], self.baseline)
        return sorted(methods, key=lambda method: method != baseline)

    def better(self, figure: str) -> Better | None:
        """Return which values of a figure are better, where the study says so."""
        return self.figures.get(figure) or self.fits.get(figure)

    def said(self, setting: Setting, grid: Grid | None = None) -> str:
        """Return the values of a setting that are not the default, or in which the cells of the grid differ."""
        differing = grid.differing if grid else ()
        return self.words({a: v for a, v in setting.items() if a in differing or v != self.defaults[a]})

    def words(self, setting: Setting) -> str:
        """Return the values of a setting, with the name of the axis where the value alone is not clear."""
        return ", ".join(value if self._is_plain(axis, value) else f"{axis} {value}" for axis, value in setting.items())

    def _is_plain(self, axis: str, value: str) -> bool:
        elsewhere = (other for name, values in self.axes.items() if name != axis for other in values)
        return bool(re.match(r"[^\W\d_]", value)) and value.lower() not in _SILENT and value not in elsewhere


def find_study(file: str | Path) -> Path:
    """Return a study's file, or the shipped one of that name."""
    path = Path(file)
    shipped = SHIPPED / "studies" / path.name
    return shipped if not path.exists() and len(path.parts) == 1 and shipped.exists() else path


def read_name(file: str | Path) -> str:
    """Return the name of a study.

    Raises:
        ValueError, FileNotFoundError: if it cannot be read.
    """
    return _read(find_study(file))["name"]


def read_study(file: str | Path, overrides: Mapping[str, Any] | None = None, out: str | Path = "") -> Study:
    """Read a study, check it, and expand it into cells whose recipes exist.

    Args:
        file: the YAML file, or the name of one that is shipped.
        overrides: dotted keys of the recipe, of every cell, on top of the study's.
        out: the folder of the study, for ``{out}`` in a value.

    Raises:
        FileNotFoundError: if it, or its recipe, is missing.
        ValueError: one line saying what is wrong, and where.
    """
    path = find_study(file)
    content = _read(path)
    try:
        header = checked_header(content, overrides)
        axes = header["axes"]
        for key in overrides or {}:
            setters = [axis for axis, values in axes.items() if all(key in changes for changes in values.values())]
            if setters:
                raise ValueError(f"{key} is set by every value of the axis {setters[0]}; change them in the study.")
        cells = _cells(Study(header), path, str(out))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    recipes = [header["recipe"], *(c["recipe"] for v in axes.values() for c in v.values() if "recipe" in c)]
    header["recipes"] = {name: written(load_recipe(_recipe_file(path, name))) for name in dict.fromkeys(recipes)}
    loaded = {cell.name: cell.load() for cell in cells}
    for name, recipe in loaded.items():
        if any(
            (one.train_loader.get("dataset") or {}).get("packing_ratio") for one in (recipe, *recipe.helpers.values())
        ):
            raise ValueError(
                f"{path}: the cell {name} has packing_ratio, and a study counts samples, not rows; leave it out."
            )
    return Study(json.loads(json.dumps(header)), cells, loaded)


def checked_header(study: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check the keys of a YAML file, or of results, and return them as results hold them: values of axes as text.

    Raises:
        ValueError: one line naming the key.
        KeyError: if a key is missing.
    """
    for key in ("overrides", "axes", "grids", "figures", "fits"):
        if not isinstance(study.get(key) or {}, dict):
            raise ValueError(f"{key} must hold keys and values.")
    axes = _axes(study["axes"])
    baseline = _baseline(study["baseline"], axes, "baseline")
    figures = study.get("figures") or {}
    for kind in figures:
        if kind not in ("averaged", "beside"):
            raise ValueError(f"figures.{kind} is not a key. {did_you_mean(str(kind), ('averaged', 'beside'))}")
    curve = study.get("curve")
    return {
        "name": str(study["name"]),
        "recipe": study.get("recipe") or "",
        "overrides": _later(flatten(study.get("overrides") or {}), flatten(overrides or {})),
        "axes": axes,
        "grids": {str(grid): _grid(f"grids.{grid}", chosen, axes) for grid, chosen in study["grids"].items()},
        "baseline": baseline,
        "figures": {kind: _directions(of_kind, f"figures.{kind}") for kind, of_kind in figures.items()},
        "curve": curve and _figure(curve, "curve"),
        "fits": _directions(study.get("fits"), "fits"),
    }


def current_name(figure: str) -> str:
    """Return the name that a figure has now: ``image_gain`` was called ``without_prior``."""
    return figure.replace("/without_prior", "/image_gain")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return where the header of existing results decides cells otherwise: ``key: old there, new here``.

    A new axis whose default sets nothing, a new value and a new grid make no difference.
    """
    axes = {
        axis: {value: changes for value, changes in values.items() if value in there["axes"].get(axis, values)}
        for axis, values in here["axes"].items()
        if axis in there["axes"] or next(iter(values.values()))
    }
    recipes = there["recipes"].keys() & here["recipes"].keys()
    known = {name: _without_new_keys(here["recipes"][name], there["recipes"][name]) for name in recipes}
    old = _deciding({**there, "recipes": {name: there["recipes"][name] for name in recipes}})
    new = _deciding({**here, "axes": axes, "recipes": known})
    missing = "nothing"
    return [
        f"{key}: {_shown(old.get(key, missing))} there, {_shown(new.get(key, missing))} here"
        for key in {**old, **new}
        if old.get(key, missing) != new.get(key, missing)
    ]


def _deciding(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides cells, by dotted key; no overrides, and an axis without values, have none."""
    axes = {axis: values for axis, values in header["axes"].items() if values}
    overrides = {"overrides": header["overrides"]} if header["overrides"] else {}
    return flatten({"recipe": header["recipe"], **overrides, "axes": axes, "recipes": header["recipes"]})


def _without_new_keys(recipe: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without keys at their default that recipes did not have when ``known`` was written."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TrainConfig)}
    kept = {key: value for key, value in recipe.items() if key in known or value != defaults.get(key)}
    for helper in HELPERS:
        if recipe.get(helper) and isinstance(known.get(helper), Mapping):
            kept[helper] = _without_new_keys(recipe[helper], known[helper])
    return kept


def combinations(values: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Yield every combination of a value of each axis."""
    for combination in product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"a.b": {"c": 1}}`` to ``{"a.b.c": 1}``; an empty mapping stays."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        whole = f"{prefix}{key}"
        flat |= flatten(value, f"{whole}.") if isinstance(value, Mapping) and value else {whole: value}
    return flat


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as words of a command line, ``key=value``, that are read back as the same values."""
    return [f"{key}={_word(json.dumps(value, ensure_ascii=False))}" for key, value in overrides.items()]


@lru_cache(maxsize=4096)
def _word(whole: str) -> str:
    """Return a value of JSON as it is, or as JSON, which is YAML too, where YAML would read something else."""
    value = json.loads(whole)
    plain = value if isinstance(value, str) else whole
    try:
        read = cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([f"x={plain}"])))["x"]
    except Exception:  # whatever YAML or OmegaConf says of it
        return whole
    return plain if read == value and type(read) is type(value) else whole


def value_text(value: Any) -> str:
    """Return a value of an axis as text, as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _later(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge overrides in order; a key that is set again moves to the end, as the order decides."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            merged.pop(key, None)
            merged[key] = value
    return merged


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        hint = did_you_mean(path.name, [one.name for one in (SHIPPED / "studies").glob("*.yaml")])
        raise FileNotFoundError(
            f"The study {path} does not exist. {hint.replace('Accepted', 'Those that are shipped')}"
        )
    try:
        study = OmegaConf.to_container(load_yaml(path), resolve=False)  # interpolations are the recipes'
    except Exception as error:
        raise ValueError(f"{path} is not a readable YAML file: {one_line(error)}") from error
    if not isinstance(study, dict):
        raise ValueError(f"{path} must hold keys and values.")
    for key in map(str, study):
        if key not in KEYS:
            raise ValueError(f"{path}: {key} is not a key of a study. {did_you_mean(key, KEYS)}")
    if missing := [key for key in REQUIRED if not study.get(key)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    for key in ("name", "recipe"):
        if not isinstance(study[key], str):
            raise ValueError(f"{path}: {key} must be text.")
    if not re.fullmatch(r"[\w.+-]+", study["name"]):
        raise ValueError(f"{path}: name={study['name']!r}: a folder is named so; use letters, digits, - and _.")
    return cast(dict[str, Any], study)


def _axes(given: Mapping[Any, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return axis: value: overrides, each with dots in the key."""
    for name in AXES:
        if name not in given:
            raise ValueError(f"axes lacks {name}; every study has the axes {' and '.join(AXES)}.")
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for axis, values in given.items():
        if not isinstance(values, dict | list) or not values:
            raise ValueError(f"axes.{axis} must hold values and their overrides, or a list.")
        if isinstance(values, list):
            values = {value_text(value): {axis: value} for value in values}
        axes[str(axis)] = {}
        for value, changes in values.items():
            if not isinstance(changes or {}, dict):
                raise ValueError(f"axes.{axis}.{value_text(value)} must hold overrides, or {{}}.")
            axes[str(axis)][value_text(value)] = flatten(changes or {})
    return axes


def _directions(figures: Mapping[Any, Any] | None, kind: str) -> dict[str, Better]:
    for name, better in (figures or {}).items():
        if better not in ("higher", "lower"):
            raise ValueError(f"{kind}.{name}={better}: expected higher or lower.")
    return {_figure(name, kind): better for name, better in (figures or {}).items()}


def _figure(name: Any, where: str) -> str:
    if not re.fullmatch(r"[^/]+/.+", str(name), re.DOTALL):
        raise ValueError(f"{where}: {name} is not BENCHMARK/FIGURE, such as validation/loss.")
    return current_name(name)


def _baseline(given: Any, axes: Mapping[str, Mapping[str, Any]], where: str) -> str:
    if (baseline := value_text(given)) not in axes[METHOD]:
        hint = did_you_mean(baseline, axes[METHOD])
        raise ValueError(f"{where}={baseline} is not a value of the axis method. {hint}")
    return baseline


def _grid(name: str, chosen: Any, axes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return axis: ``all``, a value or a list, as text, of the axes that a grid names; ``baseline`` and ``scaling``."""
    if not isinstance(chosen, dict) or not chosen:
        raise ValueError(f"{name} must hold axes and their values, such as {{method: all}}.")
    grid: dict[str, Any] = {}
    for axis, values in chosen.items():
        where = f"{name}.{axis}"
        if axis == "scaling":
            if values not in SCALING:
                raise ValueError(f"{where}={values}. {did_you_mean(str(values), SCALING)}")
            grid[axis] = values
        elif axis == "baseline":
            grid[axis] = _baseline(values, axes, where)
        elif axis not in axes:
            raise ValueError(f"{where} is not an axis. {did_you_mean(str(axis), [*axes, 'baseline', 'scaling'])}")
        else:
            texts = [value_text(value) for value in (values if isinstance(values, list) else [values])]
            for text in texts:
                if text not in axes[axis] and values != "all":
                    raise ValueError(f"{where}={text} is not a value of that axis. {did_you_mean(text, axes[axis])}")
            if not texts:
                raise ValueError(f"{where} is an empty list: the grid would have no cells.")
            grid[axis] = texts if isinstance(values, list) else texts[0]
    return grid


def _chosen(given: str | list[str], values: list[str]) -> list[str]:
    """Return the values of an axis that a grid gives as ``all``, as one or as a list."""
    if given == "all" and "all" not in values:
        return values
    return given if isinstance(given, list) else [given]


def _cells(study: Study, path: Path, out: str) -> list[Cell]:
    """Return the planned cells."""
    cells: dict[str, Cell] = {}
    for key in study.planned:
        values = dict(zip(study.axes, key, strict=True))
        name = _cell_name(values, study.axes)
        if name in cells:
            raise ValueError(f"{cells[name].values} and {values} are both named {name}; rename a value.")
        cells[name] = Cell(name, values, *_recipe_of(name, values, study.header, path, out))
    return [*cells.values()]


def _cell_name(values: Mapping[str, str], axes: Mapping[str, Sequence[str]]) -> str:
    """Join the method, values that are not the default, and the seed; numbers with the name of their axis."""
    between = [axis for axis in axes if axis not in AXES and values[axis] != axes[axis][0]]
    parts = [
        values[axis] if re.match(r"[A-Za-z]", values[axis]) else f"{axis}{values[axis]}"
        for axis in (METHOD, *between, SEED)
    ]
    return "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts)


def _recipe_of(
    name: str, values: Mapping[str, str], header: Mapping[str, Any], path: Path, out: str
) -> tuple[Path, dict[str, Any]]:
    """Return base recipe and overrides of a cell; raise if two axes set the same key, unless null removes it."""
    parts = {axis: dict(header["axes"][axis][value]) for axis, value in values.items()}
    setters: dict[str, str] = {}
    for axis, changes in parts.items():
        for key, value in changes.items():
            for known, other in setters.items():
                if value is None and known.startswith(f"{key}."):
                    continue  # a later axis removes the part
                if other != axis and (f"{known}.".startswith(f"{key}.") or f"{key}.".startswith(f"{known}.")):
                    raise ValueError(f"cell {name}: the axes {other} ({known}) and {axis} ({key}) set the same key.")
            setters[key] = axis
    recipe = next((changes.pop("recipe") for changes in parts.values() if "recipe" in changes), header["recipe"])
    overrides = _later(header["overrides"], *parts.values())
    return _recipe_file(path, recipe), {key: _with_out(value, out) for key, value in overrides.items()}


def _recipe_file(study: Path, name: str) -> Path:
    """Return the recipe that a study names, relative to its file, or else a shipped one."""
    beside = Path(os.path.normpath(study.parent / name))
    return Path(name) if not beside.exists() and len(Path(name).parts) == 1 else beside


def _with_out(value: Any, out: str) -> Any:
    if isinstance(value, str):
        return value.replace("{out}", out)
    return [_with_out(one, out) for one in value] if isinstance(value, Sequence) else value
