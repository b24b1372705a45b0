"""Studies from the command line: ``composer-prior study STUDY.yaml [option=value ...] [key=value ...]``."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from composer_prior.data.messages import OneLineError, one_line, say
from composer_prior.data.storage import LockedError, StorageError, locked
from composer_prior.options import options_of, parse_options
from composer_prior.registry import did_you_mean
from composer_prior.studies.results import begin_results, finished, read_results
from composer_prior.studies.runner import Stopped, plan_tasks, run_cells
from composer_prior.studies.study import flatten, read_name, read_study
from composer_prior.training.config import TrainConfig


def run_study(
    study: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | None = None,
    results: str | None = None,
    processes: int = 1,
    threads: int | None = None,
    report: str | None = None,
) -> int:
    """Run the cells of a study that are not finished, and make its page.

    Args:
        study: the YAML file, or the name of one that is shipped.
        overrides: dotted keys of the recipe, of every cell, on top of the study's.
        out: the folder that runs, shared parts and results go to. Default: studies/ and its name.
        results: the file of the results, with the page beside it. Default: results.jsonl in ``out``.
        processes: cells that run at a time.
        threads: of each process. Default: the cores, shared among the processes.
        report: only, to make the page from the results that are there, without any run.

    Returns:
        The exit status: 1 if a cell failed.

    Raises:
        ValueError, OSError, StorageError: before anything runs, naming what is wrong.
        Stopped: after a signal.
    """
    if report not in (None, "only"):
        raise ValueError(f"report={report}: expected only, or nothing.")
    for name, value in (("processes", processes), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")
    folder = Path(out or f"studies/{read_name(study)}").expanduser()
    file = Path(results).expanduser() if results else folder / "results.jsonl"
    if report == "only":
        if read_results(file)[0] is None:
            raise FileNotFoundError(f"There are no results in {file} yet.")
        write_page(file)
        return 0
    whole = read_study(study, overrides, folder)
    with locked(folder / "study.lock", seconds=0):
        lines = begin_results(file, whole.header)
        plan = plan_tasks(whole, folder)
        there = sum(finished(lines, cell.values) is not None for cell in whole.cells)
        say(f"{whole.name}: {len(whole.cells)} cells, {there} of them finished; results go to {file}")
        threads = threads or max(1, len(os.sched_getaffinity(0)) // processes)
        failed = run_cells(whole, plan, file, lines, processes, threads)
        write_page(file)
    if failed:
        say(f"{len(failed)} of {len(whole.cells)} cells failed; the same command tries them again:")
        for name, log in failed.items():
            say(f"  {name}: {log}")
    return 1 if failed else 0


def write_page(results: Path) -> None:
    """Make the page of results; what goes wrong with it is said and takes nothing down."""
    try:
        from composer_prior.studies.study_page import write_report  # here: it draws, which takes a second to import

        for path in write_report(results):
            say(f"page: {path}")
    except Exception as error:
        say(f"The page of {results} could not be made: {type(error).__name__}: {one_line(error)}")


def main(arguments: Sequence[str]) -> int:
    """Run the command line ``STUDY.yaml [option=value ...] [key=value of the recipes ...]``.

    Args:
        arguments: the words of the command line.

    Returns:
        The exit status; 130 or 143 after a signal.
    """
    try:
        options = options_of(run_study)
        keys = [word for word in arguments if _is_override(word, options)]
        words, chosen = parse_options([word for word in arguments if word not in keys], options)
        if len(words) != 1 or words[0].startswith("-"):
            print("usage: STUDY.yaml [option=value ...] [key=value of the recipes ...]", file=sys.stderr)
            return 2
        return run_study(words[0], parse_overrides(keys), **chosen)
    except LockedError as error:
        print(f"error: another runner is at this study: {one_line(error)}", file=sys.stderr)
    except (ValueError, OSError, OneLineError, StorageError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
    except Stopped as stop:
        say(f"Stopped by {stop}; the same command goes on where it was.")
        return 128 + stop.number
    return 1


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Dotted key: value of words ``key=value``.

    Raises:
        ValueError: for a value that cannot be read.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        try:
            overrides |= flatten(cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([word]))))
        except Exception as error:
            raise ValueError(f"{word}: {one_line(error)}") from error
    return overrides


def _is_override(word: str, options: Mapping[str, Any]) -> bool:
    """Whether a word sets a key of the recipes.

    Raises:
        ValueError: if it sets neither that nor an option.
    """
    match = re.match(r"([\w.\[\]-]+)=", word)
    if not match or match[1] in options:
        return False
    names = [field.name for field in fields(TrainConfig)]
    if match[1].split(".")[0].split("[")[0] not in names:
        raise ValueError(
            f"{match[1]} is neither an option nor a key of a recipe. {did_you_mean(match[1], [*options, *names])}"
        )
    return True
