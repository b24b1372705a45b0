"""The distributor ``ray``: units of work are tasks of a Ray cluster, with Ray's scheduler, retries and dashboard.

The cluster is found as by any program of Ray's: ``RAY_ADDRESS``, or the one that runs on this machine, or one of this
machine alone that is started for the conversion.
"""

import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from composer_prior.conversion.options import ConversionError
from composer_prior.conversion.units import Result, Results, Task, Units, convert_unit
from composer_prior.data.messages import one_line

_END_SECONDS = 60  # for the units that were cancelled


def convert_on_ray(task: Task, units: Units) -> Results:
    """Convert units and yield their numbers and results as they finish.

    A task whose process or node has died is tried again by Ray, as often as it does by default: 3 times, or
    ``RAY_TASK_MAX_RETRIES``.

    Args:
        task: what is converted, and how.
        units: numbers and units; no more than two for each CPU of the cluster, or ``processes=``, are taken from it
            before they finish.

    Raises:
        ConversionError: if there is no cluster, a node of it does not see the source or the output, or a task's process
            died too often.
    """
    mine = not ray.is_initialized()
    if mine:
        try:
            _check_address()
            ray.init()
        except (OSError, RuntimeError, ValueError) as error:
            raise ConversionError(f"distributor=ray: no cluster to be had ({one_line(error, 200)}).") from error
    try:
        yield from _run(task, units)
    except RayTaskError as error:
        if isinstance(error.cause, RayError):  # it could not be sent as it was
            raise ConversionError(f"{task.output.label}: {one_line(error.cause)}") from None
        raise error.cause from error
    except RayError as error:
        problem = f"Ray has given a unit up ({one_line(error, 200)})"
        raise ConversionError(f"{task.output.label}: {problem}; run the same command again to go on.") from None
    finally:
        if mine:
            ray.shutdown()


def _check_address() -> None:
    """Refuse an address without a server, on which Ray would wait for many minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _run(task: Task, units: Units) -> Results:
    """Keep every CPU of the cluster busy, with no more than two units each in memory."""
    with _needed(task) as needed:
        _check_nodes(needed)
        convert, sent = ray.remote(_convert), [ray.put(task)]  # in a list it is not fetched anew for each unit
        pending: list[ray.ObjectRef] = []
        try:
            for number, unit in units:
                pending.append(convert.remote(sent, needed, number, unit))
                while len(pending) >= (task.options.processes or _room()):
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)
        finally:
            for unfinished in pending:
                ray.cancel(unfinished)
            end = time.monotonic() + _END_SECONDS
            for unfinished in pending:  # nothing is written after this returns
                with suppress(RayError):
                    ray.get(unfinished, timeout=max(0, end - time.monotonic()))


def _finished(pending: list[ray.ObjectRef]) -> Results:
    """Take out what finishes next; an error in it is raised."""
    (done,), pending[:] = ray.wait(pending)
    yield ray.get(done)


def _room() -> int:
    """Return two tasks for each CPU, so that an autoscaling cluster grows."""
    return 2 * max(1, int(ray.cluster_resources().get("CPU", 0)))


@contextmanager
def _needed(task: Task) -> Iterator[dict[str, Path]]:
    """Yield the files or folders that every node has to see, by their names for the user.

    For the output it is a file made for the purpose, because a folder of the same name may be another one. Of the
    source a copy will do; remotes are seen by all.
    """
    needed = {str(folder): folder for folder in (task.folder, task.source.images)}
    sign = task.output.state / f"seen-by-all-nodes-{uuid4().hex}"
    if task.output.folder is not None:
        sign.touch()
        needed[task.output.label] = sign
    try:
        yield needed
    finally:
        sign.unlink(missing_ok=True)


def _check_nodes(needed: Mapping[str, Path]) -> None:
    """Refuse a node that does not see what is needed, or cannot run this module, before any unit is converted."""
    look = ray.remote(num_cpus=0)(_look)  # also on a node that is busy
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    on = (NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes)
    for seen in [look.options(scheduling_strategy=strategy).remote(needed) for strategy in on]:
        try:
            ray.get(seen)
        except RayTaskError as error:
            if isinstance(error.cause, ConversionError):
                raise
            problem = str(error.cause).strip().rpartition("\n")[2]  # below a traceback
            raise ConversionError(
                f"distributor=ray: a node of the cluster cannot take part ({problem}); install the same composer-prior "
                "on all of them, with the extra ray."
            ) from None


def _look(needed: Mapping[str, Path]) -> None:
    for name, file in needed.items():
        if not file.exists():
            raise ConversionError(
                f"{name}: not seen by the node {platform.node()} of Ray's cluster. Its nodes need a disk that all of "
                "them share, or source and output in a bucket."
            )


@lru_cache(maxsize=1)
def _received(task: ray.ObjectRef) -> Task:
    return ray.get(task)


def _convert(sent: list[ray.ObjectRef], needed: Mapping[str, Path], number: int, unit: Any) -> tuple[int, Result]:
    """Convert one unit, in a process of Ray's."""
    _look(needed)  # this node may have come later
    return number, convert_unit(_received(sent[0]), number, unit)
