"""Checkpoints in a bucket."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer_prior.data.remote import Remote, store_errors
from composer_prior.data.storage import is_remote
from composer_prior.training.checkpoints.identity import check_checkpoint
from composer_prior.training.checkpoints.pickles import METADATA, DamagedError, read_metadata
from composer_prior.training.checkpoints.storage import batch_of, is_one_file, places_of
from composer_prior.training.config import TrainConfig

_DOWNLOAD_SECONDS = 3600.0  # of a whole checkpoint


class Bucket:
    """The folder of a bucket that checkpoints are saved to.

    Args:
        folder: its address.
    """

    def __init__(self, folder: str):
        self.remote = Remote(folder)
        self.folder = self.remote.url

    def whole(self) -> Iterator[str]:
        """Yield the urls of complete checkpoints, newest first; shards may be missing after an interruption."""
        below = {name.partition("/")[0] for name in self.remote.names()}
        batches = {name: batch for name in below if (batch := batch_of(Path(name))) is not None}
        for name in sorted(batches, key=lambda name: batches[name], reverse=True):
            with self._local(name) as local:
                if is_one_file(name) or self._is_whole(name, local):  # an object is there when all of it is
                    yield f"{self.folder}/{name}"

    def check(self, name: str, identity: Mapping[str, Any]) -> None:
        """:func:`check_checkpoint`, for which those shards are downloaded that hold more than tensors, or the file."""
        with self._local(name) as local:
            if not (self._download(name, local) if is_one_file(name) else self._is_whole(name, local)):
                raise DamagedError(f"{local} is not there, or not all of it.")
            for shard in places_of(read_metadata(local), tensors=False) if local.is_dir() else ():
                self._download(f"{name}/{shard}", local / shard)
            check_checkpoint(local, identity, whole=local.is_file())

    def holds(self, name: str) -> bool:
        """Return True if there is a checkpoint of this name."""
        return self.remote.exists(name if is_one_file(name) else f"{name}/{METADATA}")

    def _is_whole(self, name: str, local: Path) -> bool:
        """Download the metadata of a sharded checkpoint, and return True if all its shards have the right length."""
        if not self._download(f"{name}/{METADATA}", local / METADATA):
            return False
        ends: dict[str, int] = {}
        try:
            parts = read_metadata(local).storage_data or {}
        except DamagedError:
            return False
        for part in parts.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        return all(self.remote.size(f"{name}/{shard}") == end for shard, end in ends.items())

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        """Yield a path for a copy; errors name the original."""
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary, name)
            try:
                yield local
            except ValueError as error:
                raise type(error)(str(error).replace(str(local), f"{self.folder}/{name}")) from error

    def _download(self, name: str, file: Path) -> bool:
        """Download an object, and return whether there is one."""
        if not self.remote.exists(name):
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        with store_errors(self.folder, " cannot be read"):
            self.remote.get(name, file, seconds=_DOWNLOAD_SECONDS)
        return True


def check_bucket(recipe: TrainConfig) -> None:
    """Refuse to save into a bucket that cannot be read or written to, or beside checkpoints of another run: they stay.

    Raises:
        ValueError, StorageError: naming it.
    """
    folder, start = recipe.save_folder, recipe.load_path
    if start is not None and is_remote(start):
        place, _, name = start.rstrip("/").rpartition("/")
        if not Bucket(place).holds(name):
            raise ValueError(f"{start} is not there, or not all of it.")
    newest = next(Bucket(folder).whole(), None) if folder is not None and is_remote(folder) else None
    if newest is not None and not recipe.autoresume:
        raise ValueError(
            f"{newest} is of an earlier run, and nothing in a bucket is removed: go on with it (autoresume=true), name "
            "another run_name or save_folder, or empty it."
        )
    if folder is not None and is_remote(folder):
        Remote(folder).check_writable()
