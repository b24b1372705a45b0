"""Checkpoints on disk: their names, which are whole, and how they are found."""

import errno
import io
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from composer_prior.data.messages import one_line
from composer_prior.data.storage import is_remote
from composer_prior.training.checkpoints.pickles import METADATA, SHARD, DamagedError, read_metadata

CHECKPOINT_NAME = "ep{epoch}-ba{batch}-rank{rank}.pt"
LATEST_NAME = "latest-rank0.pt"
_NAME = re.compile(r"ep\d+-ba(\d+)(-rank\d+\.pt)?")  # of a checkpoint


def check_sums(path: Path, prefix: str = "") -> None:
    """Refuse a checkpoint that is cut or whose bytes have changed, by the CRC that torch stores with each value.

    Args:
        path: a file or the folder of a sharded one.
        prefix: of a sharded one, the names of the values to read. Default: all.
    """
    whole: dict[str, Any] = {"": [None]}
    parts = places_of(read_metadata(path), prefix) if path.is_dir() else whole

    def check(shard: str) -> None:
        file, places = path / shard, parts[shard]
        try:
            with open(file, "rb") as opened:
                for place in places:
                    opened.seek(place[0] if place else 0)
                    value: Any = io.BytesIO(opened.read(place[1])) if place else opened
                    with zipfile.ZipFile(value) as one:
                        if (damaged := one.testzip()) is not None:
                            raise zipfile.BadZipFile(f"{damaged} in it has changed")
        except MemoryError:
            raise
        except Exception as error:  # what is said of damaged bytes has many types
            if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EINVAL):
                raise  # the disk's trouble, and not that of the checkpoint
            raise DamagedError(f"{file} is not a whole checkpoint: {one_line(error)}.") from error

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, parts))


def places_of(metadata: Metadata, prefix: str = "", tensors: bool = True) -> dict[str, list[tuple[int, int]]]:
    """Return offset and length of each value of a sharded checkpoint, by file; ``tensors=False`` leaves tensors out."""
    places: dict[str, list[tuple[int, int]]] = {}
    for index, info in (metadata.storage_data or {}).items():
        is_tensor = isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        if index.fqn.startswith(prefix) and (tensors or not is_tensor):
            places.setdefault(info.relative_path, []).append((info.offset, info.length))
    return places


def mend_checkpoints(folder: Path) -> Path | None:
    """Make the newest whole checkpoint the latest after a run that was killed at any moment, and return it.

    A checkpoint that was being written is removed, and the link to the latest one, which is replaced in two steps, is
    set again.
    """
    for path in checkpoints_in(folder):
        if not is_complete(path):
            remove_checkpoint(path)
    latest = folder / LATEST_NAME
    newest = newest_checkpoint(folder)
    if latest.is_symlink() or (newest is not None and latest.exists()):  # a run that was copied may have a file there
        remove_checkpoint(latest)
    if newest is not None:
        latest.symlink_to(newest.name)
    return newest


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder, a file or the folder of a sharded one, or None."""
    whole = {batch: path for path, batch in checkpoints_in(folder).items() if is_complete(path)}
    return whole[max(whole)] if whole else None


def checkpoints_in(folder: Path) -> dict[Path, int]:
    """Checkpoints, whole or not, and the batch of each."""
    batches = {path: batch_of(path) for path in sorted(folder.glob("ep*-ba*"))}
    return {path: batch for path, batch in batches.items() if batch is not None}


def batch_of(path: Path) -> int | None:
    """Return the batch of a checkpoint from its name; None for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def is_complete(path: Path) -> bool:
    """Return True if a checkpoint was written to its end; :func:`check_sums` finds later damage."""
    return (path / METADATA).is_file() if path.is_dir() else zipfile.is_zipfile(path)


def is_one_file(name: str) -> bool:
    """Return True for the name of a checkpoint in one file."""
    return name.endswith(".pt")


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a file or the folder of a sharded one, in which other files stay."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError):  # another rank removes it, too
        for file in path.iterdir():
            if SHARD.fullmatch(file.name) or file.name in (METADATA, f"{METADATA}.tmp"):
                file.unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def find_checkpoint(path: str) -> None:
    """Refuse what is no checkpoint, a file or the folder of a sharded one, but what holds or is made from one."""
    place = Path(path)
    if not place.exists():
        raise ValueError("there is no such checkpoint")
    if (place / "config.json").is_file():
        raise ValueError("this is a model, without what a run goes on from; init_from starts a run from its weights")
    if place.is_dir() and not any(SHARD.fullmatch(file.name) or file.name == METADATA for file in place.iterdir()):
        newest = newest_checkpoint(place / "checkpoints") or newest_checkpoint(place)
        raise ValueError(f"this is a folder; name a checkpoint{f' in it, such as {newest}' if newest else ''}")


def find_weights(path: str) -> Path:
    """Find the weights that a path names: a checkpoint, or a model in Hugging Face format.

    Args:
        path: of a run folder (its newest checkpoint is meant, or else its model), a checkpoint in one file, the folder
            of a sharded one, or a model folder.

    Raises:
        ValueError: if there is none of them.
    """
    if is_remote(path):
        raise ValueError("weights are not read from a bucket; download the checkpoint first")
    place = Path(path).expanduser()
    if place.is_file() or (place / METADATA).is_file() or (place / "config.json").is_file():
        return place
    for folder in (place / "checkpoints", place):
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest
    if (place / "model" / "config.json").is_file():
        return place / "model"
    raise ValueError("expected a run folder with a checkpoint, a checkpoint, or a model folder; none is there")
