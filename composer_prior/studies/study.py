"""A study: a YAML file that says which runs there are, and what is made of them.

Reading one needs neither Composer nor torch, so that a mistake in it is answered at once.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from composer_prior.data.files import load_yaml
from composer_prior.data.messages import one_line
from composer_prior.registry import did_you_mean
from composer_prior.training.config import SHIPPED, TrainConfig, load_recipe, written

KEYS = ("name", "recipe", "overrides", "axes", "grids", "baseline", "figures", "curve", "fits")
REQUIRED = ("name", "recipe", "axes", "grids", "baseline", "figures")
AXES = METHOD, SEED = "method", "seed"  # that every study has
SCALING = ("flops", "samples", "unique_samples", "tokens")
BETTER = ("higher", "lower")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        name: of its folder.
        values: axis: value, of every axis.
        recipe: its base.
        overrides: dotted key: value.
    """

    name: str
    values: dict[str, str]
    recipe: Path
    overrides: dict[str, Any]

    def load(self, further: Mapping[str, Any] | None = None) -> TrainConfig:
        """Its recipe, with further overrides.

        Raises:
            ValueError, FileNotFoundError: naming the cell and the key.
        """
        try:
            return load_recipe(self.recipe, as_words({**self.overrides, **(further or {})}))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Cell {self.name}: {one_line(error)}") from error
        except ValueError as error:
            raise ValueError(f"Cell {self.name}: {one_line(error)}") from error


@dataclass(frozen=True)
class Study:
    """A study, read and checked.

    Args:
        file: that it was read from.
        header: what results say about it: the keys of the YAML, values of axes as text, and ``recipes``.
        cells: the runs, in the order of the grids.
        recipes: of each cell, by its name, without what the cells share.
    """

    file: Path
    header: dict[str, Any]
    cells: list[Cell]
    recipes: dict[str, TrainConfig]

    @property
    def name(self) -> str:
        return self.header["name"]

    @property
    def first_figure(self) -> str | None:
        """``BENCHMARK/FIGURE``, the first that is averaged."""
        return next(iter(self.header["figures"].get("averaged") or {}), None)


def find_study(file: str | Path) -> Path:
    """A study's file, or the one of that name that comes with the package."""
    path = Path(file)
    shipped = SHIPPED / "studies" / path.name
    return shipped if not path.exists() and len(path.parts) == 1 and shipped.exists() else path


def read_name(file: str | Path) -> str:
    """The name of a study.

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
        FileNotFoundError: if it, or a recipe, is missing.
        ValueError: one line saying what is wrong, and where.
    """
    path = find_study(file)
    study = _read(path)
    study["overrides"] = _later({}, flatten(study.get("overrides") or {}), flatten(overrides or {}))
    axes = _axes(study["axes"], path)
    for key in overrides or {}:
        setters = [axis for axis, values in axes.items() if all(key in changes for changes in values.values())]
        if setters:
            raise ValueError(f"{key} is what every value of the axis {setters[0]} sets; change them in {path}.")
    _check_figures(study, axes, path)
    grids = _grids(study["grids"], axes, path)
    header = {
        "name": str(study["name"]),
        "recipe": study["recipe"],
        "overrides": study["overrides"],
        "axes": axes,
        "grids": grids,
        "baseline": value_text(study["baseline"]),
        "figures": study["figures"],
        "curve": study.get("curve"),
        "fits": study.get("fits") or {},
    }
    cells = _cells(header, path, str(out))
    names = {study["recipe"]: None} | {c["recipe"]: None for v in axes.values() for c in v.values() if "recipe" in c}
    header["recipes"] = {name: written(load_recipe(_recipe_file(path, name))) for name in names}
    return Study(path, json.loads(json.dumps(header)), cells, {cell.name: cell.load() for cell in cells})


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What decides cells and is not as in the header of results that are there: ``key: old there, new here``.

    What is new, be it an axis whose default sets nothing, a value or a grid, makes no difference.
    """
    old: dict[str, Any] = {"recipe": there["recipe"], **_flat_all("overrides", there["overrides"])}
    new: dict[str, Any] = {"recipe": here["recipe"], **_flat_all("overrides", here["overrides"])}
    for axis, values in there["axes"].items():
        for value in values:
            known = here["axes"].get(axis, {})
            old |= _flat_all(f"axes.{axis}.{value}", values[value]) or {f"axes.{axis}.{value}": {}}
            if value in known:
                new |= _flat_all(f"axes.{axis}.{value}", known[value]) or {f"axes.{axis}.{value}": {}}
    for axis, values in here["axes"].items():
        default = next(iter(values.values()))
        if axis not in there["axes"] and default:
            new |= _flat_all(f"axes.{axis}", values)
    for name in there["recipes"].keys() & here["recipes"].keys():
        old |= _flat_all(f"recipes.{name}", there["recipes"][name])
        new |= _flat_all(f"recipes.{name}", _without_new_keys(here["recipes"][name], there["recipes"][name]))
    missing = "nothing"
    return [
        f"{key}: {_shown(old.get(key, missing))} there, {_shown(new.get(key, missing))} here"
        for key in {**old, **new}
        if old.get(key, missing) != new.get(key, missing)
    ]


def _without_new_keys(recipe: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the keys at their default that recipes did not have when another was written."""
    nested = (
        {"reference": _without_new_keys(recipe["reference"], known["reference"])}
        if (recipe.get("reference") and known.get("reference"))
        else {}
    )
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TrainConfig)}
    recipe = {**recipe, **nested}
    return {key: value for key, value in recipe.items() if key in known or value != defaults.get(key)}


def grid_values(grid: Mapping[str, Any], axes: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Of every axis the values that a grid has; an axis that it does not name stands at its first, the default."""
    chosen: dict[str, list[str]] = {}
    for axis, values in axes.items():
        given = grid.get(axis, next(iter(values)))
        if given == "all" and "all" not in values:
            chosen[axis] = [*values]
        else:
            chosen[axis] = [value_text(value) for value in (given if isinstance(given, list) else [given])]
    return chosen


def combinations(values: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Every combination of a value of each axis."""
    for combination in product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a.b": {"c": 1}}`` -> ``{"a.b.c": 1}``; an empty mapping stays."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        whole = f"{prefix}{key}"
        flat |= flatten(value, f"{whole}.") if isinstance(value, Mapping) and value else {whole: value}
    return flat


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as words of a command line, ``key=value``, whose values are read as what they are."""
    return [f"{key}={_text_of(value)}" for key, value in overrides.items()]


def value_text(value: Any) -> str:
    """A value of an axis as text, as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _text_of(value: Any) -> str:
    return _text(value if isinstance(value, str) else None, json.dumps(value, ensure_ascii=False))


@lru_cache(maxsize=4096)
def _text(text: str | None, whole: str) -> str:
    """A value as it is, or as JSON, which is YAML, too, where YAML would read something else."""
    plain = whole if text is None else text
    value = json.loads(whole)
    try:
        read = cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([f"x={plain}"])))["x"]
    except Exception:  # whatever YAML or OmegaConf says of it
        return whole
    return plain if read == value and type(read) is type(value) else whole


def _flat_all(key: str, value: Any) -> dict[str, Any]:
    return flatten({key: value}) if value else {}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _later(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides one after another: a key that is set again moves to the end, as the order decides."""
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
    missing = [key for key in REQUIRED if not study.get(key)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    for key in ("overrides", "axes", "grids", "figures", "fits"):
        if not isinstance(study.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} must hold keys and values.")
    for key in ("name", "recipe"):
        if not isinstance(study[key], str):
            raise ValueError(f"{path}: {key} must be text.")
    if not re.fullmatch(r"[\w.+-]+", study["name"]):
        raise ValueError(f"{path}: name={study['name']!r}: a folder is named so; use letters, digits, - and _.")
    return cast(dict[str, Any], study)


def _axes(given: Mapping[Any, Any], path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Axis: value: overrides, each with dots in the key."""
    for name in AXES:
        if name not in given:
            raise ValueError(f"{path}: axes lacks {name}; every study has the axes {' and '.join(AXES)}.")
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for axis, values in given.items():
        if not isinstance(values, dict | list) or not values:
            raise ValueError(f"{path}: axes.{axis} must hold values and their overrides, or a list.")
        if isinstance(values, list):
            values = {value_text(value): {axis: value} for value in values}
        axes[str(axis)] = {}
        for value, changes in values.items():
            if not isinstance(changes or {}, dict):
                raise ValueError(f"{path}: axes.{axis}.{value_text(value)} must hold overrides, or {{}}.")
            axes[str(axis)][value_text(value)] = flatten(changes or {})
    return axes


def _check_figures(study: Mapping[str, Any], axes: Mapping[str, Any], path: Path) -> None:
    methods = [*axes[METHOD]]
    if value_text(study["baseline"]) not in methods:
        hint = did_you_mean(value_text(study["baseline"]), methods)
        raise ValueError(f"{path}: baseline={study['baseline']} is not a value of the axis method. {hint}")
    for kind in study["figures"]:
        if kind not in ("averaged", "beside"):
            raise ValueError(f"{path}: figures.{kind} is not a key. {did_you_mean(str(kind), ('averaged', 'beside'))}")
    kinds = {**{f"figures.{kind}": figures for kind, figures in study["figures"].items()}, "fits": study.get("fits")}
    for kind, figures in kinds.items():
        for name, better in (figures or {}).items():
            if better not in BETTER:
                raise ValueError(f"{path}: {kind}.{name}={better}: expected higher or lower.")
            _check_figure(name, kind, path)
    if study.get("curve") is not None:
        _check_figure(study["curve"], "curve", path)


def _check_figure(name: Any, where: str, path: Path) -> None:
    if not re.fullmatch(r"[^/]+/.+", str(name)):
        raise ValueError(f"{path}: {where}: {name} is not BENCHMARK/FIGURE, such as validation/loss.")


def _grids(given: Mapping[Any, Any], axes: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """Grid: axis: ``all``, a value or a list of them, as text; and ``scaling``."""
    grids: dict[str, dict[str, Any]] = {}
    for grid, chosen in given.items():
        if not isinstance(chosen, dict) or not chosen:
            raise ValueError(f"{path}: grids.{grid} must hold axes and their values, such as {{method: all}}.")
        grids[str(grid)] = {}
        for axis, values in chosen.items():
            where = f"{path}: grids.{grid}.{axis}"
            if axis == "scaling":
                if values not in SCALING:
                    raise ValueError(f"{where}={values}. {did_you_mean(str(values), SCALING)}")
                grids[str(grid)][axis] = values
                continue
            if axis not in axes:
                raise ValueError(f"{where} is not an axis. {did_you_mean(str(axis), [*axes, 'scaling'])}")
            several = isinstance(values, list)
            texts = [value_text(value) for value in values] if several else [value_text(values)]
            for text in texts:
                if text not in axes[axis] and (several or text != "all"):
                    raise ValueError(f"{where}={text} is not a value of that axis. {did_you_mean(text, axes[axis])}")
            if not texts:
                raise ValueError(f"{where} is an empty list: the grid would have no cells.")
            grids[str(grid)][axis] = texts if several else texts[0]
    return grids


def _cells(header: Mapping[str, Any], path: Path, out: str) -> list[Cell]:
    """The cells of all grids, each once."""
    axes = header["axes"]
    cells: dict[str, Cell] = {}
    for grid in header["grids"].values():
        for values in combinations(grid_values(grid, axes)):
            name = _cell_name(values, axes)
            if name in cells and cells[name].values != values:
                raise ValueError(f"{path}: {cells[name].values} and {values} are both named {name}; rename a value.")
            cells.setdefault(name, Cell(name, values, *_recipe_of(name, values, header, path, out)))
    return [*cells.values()]


def _cell_name(values: Mapping[str, str], axes: Mapping[str, Mapping[str, Any]]) -> str:
    """Method first, seed last, and between them what is not the default; numbers with the name of their axis."""
    between = [axis for axis in axes if axis not in AXES and values[axis] != next(iter(axes[axis]))]
    parts = [
        values[axis] if re.match(r"[A-Za-z]", values[axis]) else f"{axis}{values[axis]}"
        for axis in (METHOD, *between, SEED)
    ]
    return "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts)


def _recipe_of(
    name: str, values: Mapping[str, str], header: Mapping[str, Any], path: Path, out: str
) -> tuple[Path, dict[str, Any]]:
    """Base recipe and overrides of a cell; two axes that set the same of it would make a lie of one's name."""
    parts = {axis: dict(header["axes"][axis][value]) for axis, value in values.items()}
    setters: dict[str, str] = {}
    for axis, changes in parts.items():
        for key in changes:
            for known, other in setters.items():
                if other != axis and (f"{known}.".startswith(f"{key}.") or f"{key}.".startswith(f"{known}.")):
                    raise ValueError(
                        f"{path}: cell {name}: the axes {other} ({known}) and {axis} ({key}) set the same key."
                    )
            setters[key] = axis
    recipe = next((changes.pop("recipe") for changes in parts.values() if "recipe" in changes), header["recipe"])
    overrides = _later(header["overrides"], *parts.values())
    return _recipe_file(path, recipe), {key: _with_out(value, out) for key, value in overrides.items()}


def _recipe_file(study: Path, name: str) -> Path:
    """A recipe that a study names, relative to its file, or else a shipped one."""
    beside = Path(os.path.normpath(study.parent / name))
    return Path(name) if not beside.exists() and len(Path(name).parts) == 1 else beside


def _with_out(value: Any, out: str) -> Any:
    if isinstance(value, str):
        return value.replace("{out}", out)
    return [_with_out(one, out) for one in value] if isinstance(value, Sequence) else value
