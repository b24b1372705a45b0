"""The checkpoint from which a run resumes, on a disk or in a bucket, and the files that a new run replaces."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from composer_prior.data.messages import announce
from composer_prior.data.remote import Remote, store_errors
from composer_prior.data.storage import is_remote, written_here
from composer_prior.models.prior_lvlm import PriorLVLMConfig
from composer_prior.training.checkpoints.identity import check_checkpoint, read_identity
from composer_prior.training.checkpoints.pickles import METADATA, DamagedError, read_metadata
from composer_prior.training.checkpoints.storage import (
    LATEST_NAME,
    batch_of,
    checkpoints_in,
    is_one_file,
    mend_checkpoints,
    places_of,
    remove_checkpoint,
)
from composer_prior.training.config import TrainConfig
from composer_prior.training.reference import metadata_file, model_folder

RUN_FILES = ("config.yaml", "metrics.jsonl", "report.html")  # that a run writes into its folder
_DOWNLOAD_SECONDS = 3600.0  # of a whole checkpoint


def find_start(recipe: TrainConfig, identity: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Find the checkpoint to resume from, a path or url, and the id of its run; None for what there is not."""
    folder, start = recipe.save_folder, recipe.load_path
    saved = _newest_whole(folder, identity) if folder is not None and recipe.autoresume else None
    if saved is None and start is not None:
        saved = start, _check(start, identity)
    if saved is not None:
        _check_kind(saved[0], recipe)
    return saved or (None, None)


def resumes(recipe: TrainConfig) -> bool:
    """Return True if a run finds checkpoints of its own to go on from, whole or not."""
    if recipe.save_folder is None or not recipe.autoresume:
        return False
    folder = recipe.save_folder
    return bool(Bucket(folder).whole() if is_remote(folder) else checkpoints_in(Path(folder)))


def _check_kind(start: str, recipe: TrainConfig) -> None:
    fsdp2 = (recipe.parallelism_config or {}).get("fsdp2")
    sharded = fsdp2 is not None and fsdp2.get("state_dict_type", "sharded") == "sharded"
    one_file = is_one_file(start) if is_remote(start) else Path(start).is_file()
    if one_file == sharded:
        raise ValueError(
            f"{start} is {'one file' if one_file else 'sharded'}, and with this parallelism_config checkpoints are "
            f"{'sharded' if sharded else 'one file'}: go on with that of the run (fsdp2.state_dict_type=full is one "
            "file), or give init_from and a run_name of its own."
        )


def _newest_whole(folder: str, identity: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Return the newest complete checkpoint of a folder or bucket, and the id of its run.

    Incomplete ones of a folder are removed.
    """
    if bucket := Bucket(folder) if is_remote(folder) else None:
        saved = bucket.whole()
    else:
        mend_checkpoints(Path(folder))
        batches = checkpoints_in(Path(folder))
        saved = map(str, sorted(batches, key=lambda path: batches[path], reverse=True))
    for start in saved:
        try:
            return start, _check(start, identity)
        except DamagedError as error:
            announce(f"{error} The one before it is taken, if there is one.")
            if bucket is None:  # set aside: what reads it wrongly today may read it tomorrow
                aside = Path(f"{start}.damaged")
                if aside.exists():
                    remove_checkpoint(aside)
                Path(start).rename(aside)
                mend_checkpoints(Path(folder))
    return None


def _check(start: str, identity: Mapping[str, Any]) -> str | None:
    if is_remote(start):
        place, _, name = start.rstrip("/").rpartition("/")
        return Bucket(place).check(name, identity)
    return check_checkpoint(start, identity)


def leave_behind(recipe: TrainConfig, start: str | None) -> None:
    """Remove checkpoints that are not of the past of a run that begins at a checkpoint, or anew."""
    if recipe.save_folder is None or recipe.autoresume or is_remote(recipe.save_folder):
        return
    folder = Path(recipe.save_folder)
    begin = None if start is None else Path(start).resolve()
    done = -1 if begin is None or folder.resolve() not in begin.parents else batch_of(begin) or 0
    later = [path for path, batch in checkpoints_in(folder).items() if batch > done]
    if later:
        announce(f"{folder}: {len(later)} earlier checkpoints are removed (autoresume=true would keep them).")
    for path in later:
        remove_checkpoint(path)
    if mend_checkpoints(folder) is None and os.path.lexists(folder / LATEST_NAME):
        remove_checkpoint(folder / LATEST_NAME)


def check_replaced(recipe: TrainConfig, where: str = "") -> None:
    """Refuse folders in which a run would write over what no run has written; ``where`` is the prefix of its keys."""
    folder, run, model = recipe.save_folder, Path(recipe.run_folder), model_folder(recipe)
    foreign = []
    if folder is not None and not is_remote(folder) and not recipe.autoresume:
        for path in checkpoints_in(Path(folder)):
            with suppress(DamagedError):
                foreign += [] if read_identity(path) else [("save_folder", path)]
    if "run_name:" not in _text(run / "config.yaml"):
        foreign += [("run_folder", run / name) for name in RUN_FILES if (run / name).exists()]
    if not ({*written_here(model)} or metadata_file(recipe).exists()):
        text = _text(model / "config.json")
        foreign += [("run_folder", model)] if text and PriorLVLMConfig.model_type not in text else []
    for key, path in foreign[:1]:
        raise ValueError(f"{where}{key}: {path} was not written by a run of this program; name another folder.")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


class Bucket:
    """The folder of a bucket that checkpoints are saved to."""

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

    def check(self, name: str, identity: Mapping[str, Any]) -> str | None:
        """Check a checkpoint as :func:`.check_checkpoint`; of a sharded one, download shards with more than tensors."""
        with self._local(name) as local:
            if not (self._download(name, local) if is_one_file(name) else self._is_whole(name, local)):
                raise DamagedError(f"{local} is not there, or not all of it.")
            for shard in places_of(read_metadata(local), tensors=False) if local.is_dir() else ():
                self._download(f"{name}/{shard}", local / shard)
            return check_checkpoint(local, identity, whole=local.is_file())

    def _is_whole(self, name: str, local: Path) -> bool:
        """Download the metadata of a sharded checkpoint, and return True if all its shards have the right length."""
        if not self._download(f"{name}/{METADATA}", local / METADATA):
            return False
        try:
            places = places_of(read_metadata(local))
        except DamagedError:
            return False
        lengths = {shard: max(offset + length for offset, length in parts) for shard, parts in places.items()}
        return all(self.remote.size(f"{name}/{shard}") == length for shard, length in lengths.items())

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
    """Refuse to save into a bucket that cannot be read or written to, or that holds checkpoints of another run."""
    folder, start = recipe.save_folder, recipe.load_path
    if start is not None and is_remote(start):
        place, _, name = start.rstrip("/").rpartition("/")
        if not Remote(place).exists(name if is_one_file(name) else f"{name}/{METADATA}"):
            raise ValueError(f"{start} is not there, or not all of it.")
    if folder is None or not is_remote(folder):
        return
    newest = next(Bucket(folder).whole(), None)
    if newest is not None and not recipe.autoresume:
        raise ValueError(
            f"{newest} is of an earlier run, and nothing in a bucket is removed: go on with it (autoresume=true), name "
            "another run_name or save_folder, or empty it."
        )
    Remote(folder).check_writable()
