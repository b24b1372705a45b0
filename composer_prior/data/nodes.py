"""Several nodes: the first rank of all decides and writes, and every node has to see what it wrote."""

import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from composer.utils import dist

from composer_prior.data.locks import sole_writer
from composer_prior.data.messages import one_line
from composer_prior.data.storage import is_remote

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Return what a function returns, or raises, on the first rank of all; every rank has to call this.

    It alone looks for files that may not be there: a network disk lets a node that has missed one miss it for a while.
    """
    found: list[Any] = [None, None]
    try:
        if dist.get_global_rank() == 0:
            found[0] = function()
    except Exception as error:
        dist.broadcast_object_list([None, _to_send(error)])
        raise
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _to_send(error: Exception) -> Exception:
    """Return an error that other processes can raise; those of some libraries cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")


@contextmanager
def sole_job(places: Mapping[str, str | Path]) -> Iterator[None]:
    """Hold the only right to write to folders, by their keys, for all ranks of a job; see :func:`.sole_writer`."""
    with ExitStack() as held:

        def hold() -> None:
            for key, place in places.items():
                held.enter_context(sole_writer(place, key, inside=True))

        on_first_rank(hold)
        yield


def check_shared(places: Mapping[str, str | Path]) -> None:
    """Refuse places of the first rank that another node does not see; remotes are seen by all.

    What the first rank has, the others must have, be it a copy. Where it has nothing yet it will write, and the folder
    that this goes to must be the same for all.

    Args:
        places: a file or folder by the key of the recipe that names it.

    Raises:
        ValueError: on every rank, naming the key.
    """
    local = {key: Path(place).expanduser() for key, place in places.items() if not is_remote(place)}
    if not local or dist.get_world_size() == dist.get_local_world_size():
        return
    signs = on_first_rank(lambda: {key: _sign(place) for key, place in local.items()})
    seen = dist.all_gather_object({key: sign.exists() for key, sign in signs.items()})
    if dist.get_global_rank() == 0:
        for key, sign in signs.items():
            if sign != local[key]:
                sign.unlink()
    for key, place in local.items():
        blind = [rank for rank, there in enumerate(seen) if not there[key]]
        if blind:
            raise ValueError(
                f"{key}: {place} of the first rank is not seen by rank {blind[0]}, which is on another node. Several "
                "nodes need a disk that all of them share; save_folder and scores may also be in a bucket."
            )


def _sign(place: Path) -> Path:
    """Return the path itself, or a file for the others to find in the folder that will hold it."""
    if place.exists():
        return place
    sign = next(folder for folder in place.parents if folder.exists()) / f".seen-by-all-nodes-{uuid.uuid4().hex}"
    os.close(os.open(sign, os.O_CREAT))
    return sign


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuse to train where nodes have found different things in the same place, such as old copies of the data.

    Raises:
        ValueError: on every rank, naming what differs.
    """
    first, *others = dist.all_gather_object(dict(facts))
    for rank, theirs in enumerate(others, 1):
        differing = [name for name in first if theirs[name] != first[name]]
        if differing:
            raise ValueError(
                f"Rank {rank} has other {', '.join(differing)} than the first rank: their nodes see different folders."
            )
