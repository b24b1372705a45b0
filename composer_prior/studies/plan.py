"""Studies at real scale: what their cells cost and how they are launched, and results read back from a remote."""

import re
import shlex
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from composer_prior.data.files import load_yaml
from composer_prior.data.messages import DataError, one_line
from composer_prior.data.remote import Remote
from composer_prior.data.storage import is_remote
from composer_prior.studies.results import collect, finished, last, planned_steps, read_lines
from composer_prior.studies.runner import Plan
from composer_prior.studies.study import Study
from composer_prior.training.config import TrainConfig, written

_LAST = 100  # entries of a run's throughput that the median is of
_DONE = {"ba": "time/batch", "ep": "time/epoch", "sp": "time/sample", "tok": "time/token"}
_SAME = ("seed", "max_duration", "global_train_batch_size", "optimizer", "scheduler")  # hold no paths


def throughput(run: Path) -> float:
    """Return samples per second and GPU of a run: the median of its last entries.

    Raises:
        ValueError: if the run has not logged any.
    """
    records = read_lines(run / "metrics.jsonl")
    for name in ("throughput/device/samples_per_sec", "throughput/samples_per_sec"):
        values = [record[name] for record in records if record.get(name)]
        if values:
            return statistics.median(values[-_LAST:])
    raise ValueError(
        f"measured={run}: its metrics.jsonl has no throughput/device/samples_per_sec; give a run with the callback "
        "speed_monitor that is longer than its window_size."
    )


def show_plan(
    study: Study, plan: Plan, lines: Sequence[Mapping[str, Any]], gpus: int, samples_per_second: float | None
) -> str:
    """Return a table of the cells, and the commands that launch those that are not finished, on so many GPUs each.

    The cost is reckoned from the samples per second of one GPU, or left out.
    """
    rows = [["cell", "steps", "samples", "GPU hours"]]
    total, speed = 0.0, samples_per_second
    for task in plan.cells:
        recipe = study.recipes[task.name]
        row = ["-"] * 3
        if (steps := planned_steps(recipe)) is not None:
            samples = steps * recipe.global_train_batch_size
            hours = samples / speed / 3600 if speed else 0.0
            total += hours
            row = [f"{steps:,}", f"{samples:,}", f"{hours:,.2f}"]
        rows.append([task.name, *row])
    if speed is None:
        rows = [row[:3] for row in rows]
        cost = "GPU hours: give measured=RUN_FOLDER, a short run of the recipe on the intended GPUs."
    else:
        unknown = " of the cells whose steps are known beforehand" if any(row[1] == "-" for row in rows) else ""
        cost = (
            f"Total: {total:,.2f} GPU hours{unknown}, {total / gpus:,.2f} hours on {gpus} GPUs, at "
            f"{speed:,.4g} samples per second and GPU; without preparations and evaluations."
        )
    left = [task for task in plan.cells if task.cell and finished(lines, task.cell.values) is None]
    needed = {one.name: one for task in left if (one := plan.preparations.get(task.name)) is not None}
    commands = [["-m", *task.module, *task.words] for task in needed.values()]
    commands += [["train.py", *task.words] for task in left]
    launch = [shlex.join(["composer", "-n", str(gpus), *command]) for command in commands]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join([*(form.format(*row) for row in rows), "", cost, "", *launch])


def collect_remote(
    study: Study, plan: Plan, lines: Sequence[Mapping[str, Any]], remote: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the finished cells of a remote, ``REMOTE/CELL/metrics.jsonl`` and ``config.yaml``, that results lack.

    Returns:
        Their lines, and by name the reason why a cell is missing.

    Raises:
        StorageError: if the remote, an address or a folder, cannot be listed.
    """
    found: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    there = set(Remote(remote).names()) if is_remote(remote) else None
    with tempfile.TemporaryDirectory() as temporary:
        for task in plan.cells:
            assert task.cell is not None
            if finished(lines, task.cell.values) is not None:
                continue
            try:
                folder = _fetch(remote, task.name, Path(temporary, task.name), there)
                recipe = task.cell.load(plan.further[task.name])
                _check_same(folder / "config.yaml", recipe)
                records = read_lines(folder / "metrics.jsonl")
                _check_finished(records, recipe.max_duration)
                found += collect(task.cell.values, records, recipe)
            except (DataError, ValueError) as error:
                missing[task.name] = one_line(error)
    return found, missing


def _fetch(runs: str, run: str, folder: Path, there: set[str] | None) -> Path:
    """Return the folder of a run on this machine, with its files that exist."""
    if there is None:
        return Path(runs, run)
    folder.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        if f"{run}/{name}" in there:
            Remote(runs).get(f"{run}/{name}", folder / name)
    return folder


def _check_same(file: Path, recipe: TrainConfig) -> None:
    """Raise if a run has the name of a cell and was made with other values."""
    if not file.is_file():
        return
    theirs: Any = OmegaConf.to_container(load_yaml(file))
    ours = written(recipe)
    for key in _SAME:
        if theirs.get(key) != ours[key]:
            raise ValueError(f"its {key} is {theirs.get(key)}, that of the study {ours[key]}")


def _check_finished(records: Sequence[Mapping[str, Any]], max_duration: str) -> None:
    if not records:
        raise ValueError("it is not there yet")
    match = re.fullmatch(rf"(\d+)({'|'.join(_DONE)})", max_duration)
    if match is None:
        raise ValueError(f"max_duration={max_duration}: expected a number of {', '.join(_DONE)}")
    done = last(records, _DONE[match[2]]) or 0
    if done < int(match[1]):
        raise ValueError(f"it has done {done} of {max_duration}")
