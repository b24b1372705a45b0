"""The distributor ``ray``: units of work are tasks of a Ray cluster, with Ray's scheduler, retries and dashboard.

Ray finds the cluster as usual: that of ``RAY_ADDRESS``, or one that runs on this machine, or a new one on this machine.
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

    Ray repeats a task whose process or node has died ``RAY_TASK_MAX_RETRIES`` times, by default 3. At most two units
    for each CPU of the cluster, or ``processes=``, are in work at a time.
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
        if isinstance(error.cause, RayError):  # the error could not be pickled
            raise ConversionError(f"{task.output.label}: {one_line(error.cause)}") from None
        raise error.cause from error
    except RayError as error:
        problem = f"Ray has given a unit up ({one_line(error, 200)})"
        raise ConversionError(f"{task.output.label}: {problem}; run the same command again to go on.") from None
    finally:
        if mine:
            ray.shutdown()


def _check_address() -> None:
    """Refuse an address without a server, for which Ray would wait for minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _run(task: Task, units: Units) -> Results:
    """Convert units with every CPU of the cluster, at most two units each in memory."""
    with _needed(task) as needed:
        _check_nodes(needed)
        convert, sent = ray.remote(_convert), [ray.put(task)]  # in a list, so that it is not fetched for each unit
        pending: list[ray.ObjectRef] = []
        try:
            for number, unit in units:
                pending.append(convert.remote(sent, needed, number, unit))
                # The number of processors is asked again for each unit: an autoscaling cluster grows.
                limit = task.options.processes or 2 * max(1, int(ray.cluster_resources().get("CPU", 0)))
                while len(pending) >= limit:
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)
        finally:
            for unfinished in pending:
                ray.cancel(unfinished)
            end = time.monotonic() + _END_SECONDS
            for unfinished in pending:  # wait, so that nothing is written after this returns
                with suppress(RayError):
                    ray.get(unfinished, timeout=max(0, end - time.monotonic()))


def _finished(pending: list[ray.ObjectRef]) -> Results:
    """Remove the next finished unit from ``pending`` and yield its result, or raise its error."""
    (done,), pending[:] = ray.wait(pending)
    yield ray.get(done)


@contextmanager
def _needed(task: Task) -> Iterator[dict[str, Path]]:
    """Yield the files or folders that every node must see, by their names for the user.

    For the output it is a new file, because another folder may have the same name. A node may have a copy of the
    source; remotes are not checked.
    """
    needed = {str(folder): folder for folder in (task.source.folder, task.source.images)}
    sign = task.output.state / f"seen-by-all-nodes-{uuid4().hex}"
    if task.output.folder is not None:
        sign.touch()
        needed[task.output.label] = sign
    try:
        yield needed
    finally:
        sign.unlink(missing_ok=True)


def _check_nodes(needed: Mapping[str, Path]) -> None:
    """Refuse a node that does not see a needed file, or cannot run this module, before any unit is converted."""
    look = ray.remote(num_cpus=0)(_look)  # also on a busy node
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    on = (NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes)
    for seen in [look.options(scheduling_strategy=strategy).remote(needed) for strategy in on]:
        try:
            ray.get(seen)
        except RayTaskError as error:
            if isinstance(error.cause, ConversionError):
                raise
            problem = str(error.cause).strip().rpartition("\n")[2]  # the last line of a traceback
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
    """Convert one unit in a process of Ray."""
    _look(needed)  # this node may have joined later
    return number, convert_unit(_received(sent[0]), number, unit)
