"""Which checkpoint a run goes on from, and how it saves others: in a folder that all nodes see, or in a bucket."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, parse_uri
from composer.utils.checkpoint import get_save_filename

from composer_prior.data.messages import announce
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.remote import Remote, store_errors
from composer_prior.data.storage import WriteError, full_disk_told, is_remote, written_here
from composer_prior.models.prior_lvlm import PriorLVLMConfig
from composer_prior.training.checkpoints import (
    CHECKPOINT_NAME,
    LATEST_NAME,
    METADATA,
    DamagedError,
    _read_identity,
    batch_of,
    check_checkpoint,
    checkpoints_in,
    mend_checkpoints,
    newest_checkpoint,
    places_of,
    read_metadata,
    remove_checkpoint,
)
from composer_prior.training.config import TrainConfig
from composer_prior.training.finite import check_weights
from composer_prior.training.reference import REFERENCE_CARD, model_folder

_DOWNLOAD_SECONDS = 3600.0  # of a whole checkpoint
RUN_FILES = ("config.yaml", "metrics.jsonl", "report.html")  # that a run writes into its folder


def find_start(recipe: TrainConfig, identity: Mapping[str, Any]) -> str | None:
    """Find the checkpoint to resume from, a path or url, or None; the files that a new run replaces are removed.

    The first rank finds, checks and removes for all ranks.

    Raises:
        ValueError: for a checkpoint that is not whole, would run code or belongs to another run.
        StorageError: for a bucket that cannot be read.
    """
    return on_first_rank(lambda: _find_start(recipe, identity))


def _find_start(recipe: TrainConfig, identity: Mapping[str, Any]) -> str | None:
    folder, start = recipe.save_folder, recipe.load_path
    saved = _newest_whole(folder, identity) if folder is not None and recipe.autoresume else None
    if saved is None and start is not None:
        _check(start, identity)
    start = saved or start
    if start is not None:
        _check_kind(start, recipe)
    if folder is not None and not recipe.autoresume and not is_remote(folder):
        _leave_behind(Path(folder), start)
    return start


def _check_kind(start: str, recipe: TrainConfig) -> None:
    fsdp2 = (recipe.parallelism_config or {}).get("fsdp2")
    sharded = fsdp2 is not None and fsdp2.get("state_dict_type", "sharded") == "sharded"
    one_file = _is_one_file(start) if is_remote(start) else Path(start).is_file()
    if one_file == sharded:
        raise ValueError(
            f"{start} is {'one file' if one_file else 'sharded'}, and with this parallelism_config checkpoints are "
            f"{'sharded' if sharded else 'one file'}: go on with that of the run (fsdp2.state_dict_type=full is one "
            "file), or give init_from and a run_name of its own."
        )


def _newest_whole(folder: str, identity: Mapping[str, Any]) -> str | None:
    """Return the newest complete checkpoint of a folder or bucket; a folder's incomplete ones are removed."""
    if bucket := _Bucket(folder) if is_remote(folder) else None:
        saved = bucket.whole()
    else:
        mend_checkpoints(Path(folder))
        batches = checkpoints_in(Path(folder))
        saved = map(str, sorted(batches, key=lambda path: batches[path], reverse=True))
    for start in saved:
        try:
            _check(start, identity)
            return start
        except DamagedError as error:
            announce(f"{error} The one before it is taken, if there is one.")
            if bucket is None:  # set aside: what reads it wrongly today may read it tomorrow
                aside = Path(f"{start}.damaged")
                if aside.exists():
                    remove_checkpoint(aside)
                Path(start).rename(aside)
                mend_checkpoints(Path(folder))
    return None


def _check(start: str, identity: Mapping[str, Any]) -> None:
    if is_remote(start):
        place, _, name = start.rstrip("/").rpartition("/")
        _Bucket(place).check(name, identity)
    else:
        check_checkpoint(start, identity)


def check_bucket(recipe: TrainConfig) -> None:
    """Refuse to save into a bucket that cannot be read or written to, or beside checkpoints of another run: they stay.

    Raises:
        ValueError, StorageError: naming it.
    """
    folder, start = recipe.save_folder, recipe.load_path
    if start is not None and is_remote(start):
        place, _, name = start.rstrip("/").rpartition("/")
        if not _Bucket(place).holds(name):
            raise ValueError(f"{start} is not there, or not all of it.")
    newest = next(_Bucket(folder).whole(), None) if folder is not None and is_remote(folder) else None
    if newest is not None and not recipe.autoresume:
        raise ValueError(
            f"{newest} is of an earlier run, and nothing in a bucket is removed: go on with it (autoresume=true), name "
            "another run_name or save_folder, or empty it."
        )
    if folder is not None and is_remote(folder):
        Remote(folder).check_writable()


def _leave_behind(folder: Path, start: str | None) -> None:
    """Remove what is not of the past of a run that begins at a checkpoint, or anew."""
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
                foreign += [] if _read_identity(path) else [("save_folder", path)]
    if "run_name:" not in _text(run / "config.yaml"):
        foreign += [("run_folder", run / name) for name in RUN_FILES if (run / name).exists()]
    if not ({*written_here(model)} or (model / REFERENCE_CARD).exists()):
        text = _text(model / "config.json")
        foreign += [("run_folder", model)] if text and PriorLVLMConfig.model_type not in text else []
    for key, path in foreign[:1]:
        raise ValueError(f"{where}{key}: {path} was not written by a run of this program; name another folder.")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


class _Bucket:
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
                if _is_one_file(name) or self._is_whole(name, local):  # an object is there when all of it is
                    yield f"{self.folder}/{name}"

    def check(self, name: str, identity: Mapping[str, Any]) -> None:
        """:func:`check_checkpoint`, for which those shards are downloaded that hold more than tensors, or the file."""
        with self._local(name) as local:
            if not (self._download(name, local) if _is_one_file(name) else self._is_whole(name, local)):
                raise DamagedError(f"{local} is not there, or not all of it.")
            for shard in places_of(read_metadata(local), tensors=False) if local.is_dir() else ():
                self._download(f"{name}/{shard}", local / shard)
            check_checkpoint(local, identity, whole=local.is_file())

    def holds(self, name: str) -> bool:
        """Whether there is a checkpoint of this name."""
        return self.remote.exists(name if _is_one_file(name) else f"{name}/{METADATA}")

    def _is_whole(self, name: str, local: Path) -> bool:
        """Whether a sharded checkpoint has all shards, of the lengths that its metadata tell, which are downloaded."""
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


def _is_one_file(name: str) -> bool:
    return name.endswith(".pt")


class Checkpoints(CheckpointSaver):
    """Composer's saver, which counts those of the run's earlier starts too, and leaves no copies of remote ones.

    Args:
        recipe: of the run, with a ``save_folder``.
    """

    def __init__(self, recipe: TrainConfig):
        assert recipe.save_folder is not None
        remote = is_remote(recipe.save_folder)
        links = not remote and dist.get_global_rank() == 0  # of a sharded run each rank would remove the first's link
        super().__init__(
            folder=recipe.save_folder,
            filename=CHECKPOINT_NAME,
            remote_file_name=os.path.join(parse_uri(recipe.save_folder)[2], CHECKPOINT_NAME),
            latest_filename=LATEST_NAME if links else None,
            latest_remote_file_name=None,
            save_interval=recipe.save_interval,
            overwrite=True,
            num_checkpoints_to_keep=0 if remote else recipe.save_num_checkpoints_to_keep,
        )
        self.save_folder = recipe.save_folder
        uploader: Any = self.remote_uploader
        if uploader is not None:
            for name in ("init", "check_workers", "wait"):  # where errors of uploads are raised
                setattr(uploader, name, store_errors(self.save_folder)(getattr(uploader, name)))
            # In a process of its own it would import Composer for each rank, and SIGTERM to the group would end it.
            uploader.upload_executor = ThreadPoolExecutor(max_workers=1)

    def save(self, state: State, logger: Logger) -> str:
        """Save now, wait until all ranks have written or uploaded theirs, and say where to."""
        self._save_checkpoint(state, logger)
        self.fit_end(state, logger)
        dist.barrier()
        saved = Path(get_save_filename(state, self.filename.format(state, keep_placeholders=True)))
        return f"{self.save_folder}/{saved.parent.name if state.fsdp_sharded_state_dict_enabled else saved.name}"

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        check_weights(
            state.model, f"{state.run_name}: no checkpoint is saved after batch {state.timestamp.batch.value}"
        )
        earlier = newest_checkpoint(Path(self.folder))
        files = () if earlier is None else earlier.rglob("*") if earlier.is_dir() else (earlier,)
        remedy = "The checkpoints before stay; make room, and the same command with autoresume=true goes on from there."
        try:
            with full_disk_told(self.folder, sum(file.stat().st_size for file in files) or None, remedy):
                super()._save_checkpoint(state, logger)
        except WriteError:
            batch = int(state.timestamp.batch)
            for path in [path for path, at in checkpoints_in(Path(self.folder)).items() if at == batch]:
                remove_checkpoint(path)
            raise

    def state_dict(self) -> dict[str, Any]:
        return {}  # Composer's has a line for every checkpoint ever saved

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        if self.remote_uploader is not None:
            shutil.rmtree(Path(self.folder))  # the uploader has a copy of its own
        elif dist.get_global_rank() == 0:
            saved = checkpoints_in(Path(self.folder))
            oldest_first = sorted(saved, key=lambda path: saved[path])
            for path in oldest_first[: max(0, len(saved) - self.num_checkpoints_to_keep)]:
                remove_checkpoint(path)
