"""``results.jsonl``: the results of a study, one line per cell and benchmark, from which its page is made.

The first line is the header, ``{"study": ...}``. The lines of a cell are appended in one write, ``training`` last.
"""

import json
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from composer_prior import __version__
from composer_prior.data.files import read_object
from composer_prior.data.messages import one_line
from composer_prior.data.storage import write_whole
from composer_prior.studies.study import Run, Study, checked_header, current_name, differences
from composer_prior.training.config import TrainConfig

TRAINING = "training"
PACKAGES = ("torch", "mosaicml", "transformers")
_OTHER = "The file does not hold the results of a study; give another results=."
_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


def read_results(file: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the header, None where there is no file yet, and the lines; half a line at the end is ignored.

    Raises:
        ValueError: if it holds something else.
    """
    try:
        lines = read_lines(file)
        return (lines[0]["study"], lines[1:]) if lines else (None, [])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}, line 1: there is no 'study'. {_OTHER}") from error
    except ValueError as error:
        raise ValueError(f"{error} {_OTHER}") from error


def read_lines(file: Path) -> list[Any]:
    """Return the whole lines of a file of JSON, none if it does not exist; half a line at its end is ignored.

    Raises:
        ValueError: one line that names the file and the line that is no JSON.
    """
    lines = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else (), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {one_line(error, 300)}.") from error
    return lines


def read_study_results(file: Path) -> Study:
    """Read the study of a results file with its finished runs; half a line at the end is ignored.

    Raises:
        ValueError: one line with the number of the line that cannot be read.
    """
    study: Study | None = None
    runs: dict[tuple[str, ...], Run] = {}
    for number, record in enumerate(read_lines(file), start=1):
        try:
            if study is None:
                study = Study(checked_header(_mapping(record["study"])))
                continue
            values = _mapping(_mapping(record)["cell"])
            if set(values) != set(study.axes):
                raise ValueError(f"the cell has the axes {', '.join(values)}, the study {', '.join(study.axes)}")
            key = tuple(str(values[axis]) for axis in study.axes)
            _take(runs.setdefault(key, Run()), record)
            if record["benchmark"] == TRAINING:
                study.runs[key] = runs[key]
        except KeyError as error:
            raise ValueError(f"{file}, line {number}: there is no {error}.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {one_line(error, 300)}.") from error
    if study is None:
        raise ValueError(f"{file}, line 1: there is no header.")
    return study


def _take(run: Run, record: Mapping[str, Any]) -> None:
    """Add a line to a run; of a cell that occurs twice, as after a writer was killed, the later lines count."""
    benchmark = str(record["benchmark"])
    for name, value in _mapping(record["figures"]).items():
        run.figures[current_name(f"{benchmark}/{name}")] = _number(value)
    curve = _mapping(record.get("curve") or {})
    batches = [float(batch) for batch in curve.get("batch", ())]
    for name, values in curve.items():
        if name != "batch":
            if len(values) != len(batches):
                raise ValueError(f"the curve {name} has {len(values)} values at {len(batches)} batches")
            run.curves[current_name(f"{benchmark}/{name}")] = batches, [_number(value) for value in values]
    if benchmark == TRAINING:
        run.versions = {str(name): str(version) for name, version in (record.get("versions") or {}).items()}


def _number(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{value!r} is not a number")
    return float(value) if value is not None and math.isfinite(value) else None


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:80]!r} is not a mapping")
    return value


def begin_results(file: Path, header: Mapping[str, Any], place: Path | None = None) -> list[dict[str, Any]]:
    """Write the header of the study, and return the existing lines of finished cells, new axes at their default.

    Raises:
        ValueError: if the existing study decides its cells otherwise; it names the keys and what to delete for a new
            start: ``place``, by default the file.
    """
    there, lines = read_results(file)
    if there is not None:
        changed = differences(there, header)
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{file} was made by another study ({'; '.join(changed[:3])}{more}). Give another out=, or delete "
                f"{place or file}."
            )
        new = {axis: next(iter(values)) for axis, values in header["axes"].items() if axis not in there["axes"]}
        whole = [line["cell"] for line in lines if line["benchmark"] == TRAINING]
        lines = [{**line, "cell": {**line["cell"], **new}} for line in lines if line["cell"] in whole]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(_line(one) for one in ({"study": header}, *lines)).encode())
    return lines


def append_results(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add the lines of a cell in one write."""
    with open(file, "ab") as opened:
        opened.write("".join(map(_line, lines)).encode())
        opened.flush()
        os.fsync(opened.fileno())


def finished(lines: Sequence[Mapping[str, Any]], values: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Return the figures of a finished cell by benchmark, or None."""
    mine = {line["benchmark"]: line["figures"] for line in lines if line["cell"] == values}
    return mine if TRAINING in mine else None


def collect(
    values: Mapping[str, str], records: Sequence[Mapping[str, Any]], recipe: TrainConfig, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Return the lines of a finished run of a cell, from the records of its ``metrics.jsonl``.

    The duration in seconds is by default that of the run's own metric.

    Raises:
        ValueError: if it has no metrics.
    """
    if not records:
        raise ValueError("it has left no metrics.")
    curves: dict[str, dict[str, dict[int, Any]]] = {}
    for record in records:
        for name, value in record.items():
            benchmark, _, figure = _place_of(name).partition("/")
            if figure:
                curves.setdefault(benchmark, {}).setdefault(figure, {})[record["batch"]] = value
    lines = [{"cell": dict(values), "benchmark": name, **_curve(curve)} for name, curve in curves.items()]
    training = {"cell": dict(values), "benchmark": TRAINING, "figures": _training(records, recipe, seconds)}
    return [*lines, {**training, "versions": versions()}]


def last(records: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the last number of a metric, or None."""
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def count_samples(dataset: Mapping[str, Any]) -> int | None:
    """Return the number of samples of a data set on this machine, or None."""
    if dataset.get("streams") or not dataset.get("local"):
        return None
    index = Path(dataset["local"], dataset.get("split") or "", "index.json")
    if not index.is_file():
        return None
    return sum(shard["samples"] for shard in read_object(index)["shards"])


def planned_steps(recipe: TrainConfig) -> int | None:
    """Return the optimizer steps of a run, or None if they depend on data that do not exist yet."""
    match = re.fullmatch(r"(\d+)(ba|sp|ep)", recipe.max_duration)
    if match is None:
        return None
    number, batch = int(match[1]), recipe.global_train_batch_size
    if match[2] != "ep":
        return number if match[2] == "ba" else math.ceil(number / batch)
    dataset = recipe.train_loader["dataset"]
    samples = dataset.get("epoch_size") or (recipe.data or {}).get("train_samples") or count_samples(dataset)
    if not isinstance(samples, int):
        return None
    drop_last = recipe.train_loader.get("drop_last", True)
    return number * (samples // batch if drop_last else math.ceil(samples / batch))


def versions() -> dict[str, str]:
    """Return the versions of the packages, and ``commit`` in a checkout."""
    found = {"composer_prior": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # it was put there without its metadata
            found[name] = version(name)
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # not installed, perhaps below some other checkout
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with suppress(OSError):  # there is no git
            if commit := subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip():
                found["commit"] = commit
    return found


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"


def _place_of(metric: str) -> str:
    """Map ``metrics/eval/loss`` to ``validation/loss`` and ``eval/scene_foils/total`` to ``scene_foils/total``."""
    if metric.startswith("metrics/eval/"):
        return f"validation/{metric.removeprefix('metrics/eval/')}"
    return current_name(metric.removeprefix("eval/")) if metric.startswith("eval/") else ""


def _curve(curve: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Return each figure at the last batch, None if it was undefined then, and all values by batch."""
    batches = sorted({batch for points in curve.values() for batch in points})
    return {
        "figures": {name: points.get(batches[-1]) for name, points in curve.items()},
        "curve": {"batch": batches, **{name: [points.get(b) for b in batches] for name, points in curve.items()}},
    }


def _training(records: Sequence[Mapping[str, Any]], recipe: TrainConfig, seconds: float | None) -> dict[str, Any]:
    samples, unique = last(records, "time/sample"), count_samples(recipe.train_loader["dataset"])
    monitor = recipe.callbacks.get("speed_monitor") or {}
    total = last(records, "time/total")
    if seconds is None and total is not None:
        seconds = total * _SECONDS[monitor.get("time_unit", "hours")]
    return {
        "steps": max(record["batch"] for record in records),
        "samples": samples,
        "unique_samples": unique,
        "tokens": last(records, "time/token"),
        **_flops(recipe, last(records, "compute/flops"), samples, unique),
        "seconds": seconds,
    }


def _flops(recipe: TrainConfig, counted: float | None, samples: int | None, unique: int | None) -> dict[str, Any]:
    """Return the FLOPs of the run, of training its reference and its viewer, and of their passes over the captions."""
    found: dict[str, Any] = {"reference_flops": 0, "scoring_flops": 0}
    for model, key, prefix in (("reference", "scores", ""), ("viewer", "viewer_scores", "viewer_")):
        config = getattr(recipe, model)
        if config is None:
            continue
        theirs = read_lines(Path(config["run_folder"], "metrics.jsonl"))
        flops, trained_on = last(theirs, "compute/flops"), last(theirs, "time/sample")
        stored = bool(recipe.train_loader["dataset"].get(key))
        live = any((given or {}).get(model) is not None for given in recipe.algorithms.values())
        scored = unique if stored else samples
        known = flops is not None and trained_on and scored is not None
        scoring = (flops / trained_on * scored / 3 if known else None) if stored or live else 0
        if live and not stored and counted is not None:  # the passes of a live model are counted in the run
            counted = None if scoring is None else counted - scoring
        found |= {f"{model}_flops": flops, f"{prefix}scoring_flops": scoring}
    return {"flops": counted, **found}
