"""Save checkpoints during a run."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, parse_uri
from composer.utils.checkpoint import get_save_filename

from composer_prior.data.remote import store_errors
from composer_prior.data.storage import WriteError, full_disk_told, is_remote
from composer_prior.training.checkpoints.storage import (
    CHECKPOINT_NAME,
    LATEST_NAME,
    checkpoints_in,
    newest_checkpoint,
    remove_checkpoint,
)
from composer_prior.training.config import TrainConfig
from composer_prior.training.finite import check_weights


class Checkpoints(CheckpointSaver):
    """Composer's saver, which counts those of the run's earlier starts too, and leaves no copies of remote ones."""

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
        what = f"{state.run_name}: no checkpoint is saved after batch {state.timestamp.batch.value}"
        check_weights(state.model, what)
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
