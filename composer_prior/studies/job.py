"""Studies from the command line: ``composer-prior study STUDY.yaml [option=value ...] [key=value ...]``."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from composer_prior.data.locks import locked, sole_writer
from composer_prior.data.messages import failure, one_line, say
from composer_prior.studies.plan import collect_remote, show_plan, throughput
from composer_prior.studies.results import append_results, begin_results, finished, read_results
from composer_prior.studies.runner import Plan, Runner, plan_tasks
from composer_prior.studies.study import Study, flatten, read_name, read_study


def run_study(
    study: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | None = None,
    results: str | None = None,
    processes: int = 1,
    threads: int | None = None,
    report: str | None = None,
    plan: bool = False,
    measured: str | None = None,
    gpus: int = 8,
    remote: str | None = None,
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
        plan: start nothing; say what the cells cost and how they are launched on a cluster.
        measured: the folder of a run whose throughput the plan's cost is reckoned from.
        gpus: of each run of the plan.
        remote: read back what runs of the plan have put there, REMOTE/CELL/metrics.jsonl; nothing is started.

    Returns:
        1 as the exit status if a cell failed, otherwise 0.

    Raises:
        ValueError, OSError, StorageError: before anything runs, naming what is wrong.
        Stopped: after a signal.
    """
    if report not in (None, "only"):
        raise ValueError(f"report={report} is not accepted. Accepted: only.")
    if not plan and measured is not None:
        raise ValueError(f"measured={measured} is for plan=true.")
    for name, value in (("processes", processes), ("threads", threads), ("gpus", gpus)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")
    folder = Path(out or f"studies/{read_name(study)}").expanduser()
    file = Path(results).expanduser() if results else folder / "results.jsonl"
    if report == "only":
        if read_results(file)[0] is None:
            raise FileNotFoundError(f"There are no results in {file} yet.")
        return 0 if write_page(file) else 1
    whole = read_study(study, overrides, folder)
    tasks = plan_tasks(whole, folder)
    if plan:
        speed = None if measured is None else throughput(Path(measured).expanduser())
        say(show_plan(whole, tasks, read_results(file)[1], gpus, speed))
        return 0
    with locked(folder / "study.lock", seconds=0), sole_writer(file, "results"):
        # The header in the folder of the runs keeps unfinished ones from going on with other values.
        begin_results(folder / "study.jsonl", whole.header, folder)
        lines = begin_results(file, whole.header)
        if remote is not None:
            _read_back(whole, tasks, file, lines, remote)
            return 0
        there = sum(finished(lines, cell.values) is not None for cell in whole.cells)
        say(f"{whole.name}: {len(whole.cells)} cells, {there} of them finished; results go to {file}")
        threads = threads or max(1, len(os.sched_getaffinity(0)) // processes)
        failed = Runner(whole, tasks, file, lines, processes, threads).run()
        write_page(file)
    if failed:
        say(f"{len(failed)} of {len(whole.cells)} cells failed; the same command tries them again:")
        for name, log in failed.items():
            say(f"  {name}: {log}")
    return 1 if failed else 0


def _read_back(study: Study, tasks: Plan, file: Path, lines: list[dict[str, Any]], remote: str) -> None:
    """Append the finished cells of a remote to the results, and say which ones are missing."""
    found, missing = collect_remote(study, tasks, lines, remote)
    append_results(file, found)
    cells = len({tuple(line["cell"].values()) for line in found})
    say(f"{study.name}: {cells} cells read from {remote}, {len(missing)} of {len(study.cells)} still missing")
    for name, reason in missing.items():
        say(f"  {name}: {reason}")
    write_page(file)


def write_page(results: Path) -> bool:
    """Make the page of results; say what went wrong instead of failing."""
    try:
        from composer_prior.studies.study_page import write_report  # here: it draws, which takes a second to import

        for path in write_report(results)[:2]:  # its pictures follow
            say(f"page: {path}")
        return True
    except Exception as error:
        logging.getLogger(__name__).exception("The page of %s", results)
        say(f"The page of {results} could not be made: {type(error).__name__}: {failure(error)}")
        return False


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return dotted key: value of words ``key=value``, or raise a ValueError that names the word."""
    overrides: dict[str, Any] = {}
    for word in words:
        try:
            overrides |= flatten(cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([word]))))
        except Exception as error:
            raise ValueError(f"{word}: {one_line(error)}") from error
    return overrides
