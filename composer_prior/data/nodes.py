"""Several nodes: the first rank decides and writes, and every node must see the files that it wrote."""

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
    """Run a function on the first rank, and return its result or raise its error on every rank.

    Every rank must call this. Only the first one looks for files that may not exist: a node caches for a while that a
    network disk lacks a file.
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
def sole_job(paths: Mapping[str, str | Path]) -> Iterator[None]:
    """Lock folders, by the keys that name them, for all ranks of a job; see :func:`.sole_writer`."""
    with ExitStack() as held:

        def lock() -> None:
            for key, path in paths.items():
                held.enter_context(sole_writer(path, key, inside=True))

        on_first_rank(lock)
        yield


def check_shared(paths: Mapping[str, str | Path]) -> None:
    """Raise ValueError on every rank if another node does not see a path of the first rank; remotes are not checked.

    A file that the first rank has must exist on every node, also as a copy. A file that it will write needs a folder
    that all nodes share. The key of a path is that of the recipe.
    """
    local = {key: Path(path).expanduser() for key, path in paths.items() if not is_remote(path)}
    if not local or dist.get_world_size() == dist.get_local_world_size():
        return
    signs = on_first_rank(lambda: {key: _sign(path) for key, path in local.items()})
    seen = dist.all_gather_object({key: sign.exists() for key, sign in signs.items()})
    if dist.get_global_rank() == 0:
        for key, sign in signs.items():
            if sign != local[key]:
                sign.unlink()
    for key, path in local.items():
        blind = [rank for rank, there in enumerate(seen) if not there[key]]
        if blind:
            raise ValueError(
                f"{key}: {path} of the first rank is not seen by rank {blind[0]}, which is on another node. Several "
                "nodes need a disk that all of them share; save_folder and scores may also be in a bucket."
            )


def _sign(path: Path) -> Path:
    """Return the path if it exists, or else a new file in the folder that will hold it."""
    if path.exists():
        return path
    sign = next(folder for folder in path.parents if folder.exists()) / f".seen-by-all-nodes-{uuid.uuid4().hex}"
    sign.touch()
    return sign


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank if nodes see different contents under one path, such as old copies of the data."""
    first, *others = dist.all_gather_object(dict(facts))
    for rank, theirs in enumerate(others, 1):
        differing = [name for name in first if theirs[name] != first[name]]
        if differing:
            raise ValueError(
                f"Rank {rank} has other {', '.join(differing)} than the first rank: their nodes see different folders."
            )
