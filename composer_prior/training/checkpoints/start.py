"""The checkpoint from which a run resumes, and the files that a new run replaces."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from composer_prior.data.messages import announce
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.storage import is_remote, written_here
from composer_prior.models.prior_lvlm import PriorLVLMConfig
from composer_prior.training.checkpoints.bucket import Bucket
from composer_prior.training.checkpoints.identity import check_checkpoint, read_identity
from composer_prior.training.checkpoints.pickles import DamagedError
from composer_prior.training.checkpoints.storage import (
    LATEST_NAME,
    batch_of,
    checkpoints_in,
    is_one_file,
    mend_checkpoints,
    remove_checkpoint,
)
from composer_prior.training.config import TrainConfig
from composer_prior.training.reference import REFERENCE_METADATA, model_folder

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
    one_file = is_one_file(start) if is_remote(start) else Path(start).is_file()
    if one_file == sharded:
        raise ValueError(
            f"{start} is {'one file' if one_file else 'sharded'}, and with this parallelism_config checkpoints are "
            f"{'sharded' if sharded else 'one file'}: go on with that of the run (fsdp2.state_dict_type=full is one "
            "file), or give init_from and a run_name of its own."
        )


def _newest_whole(folder: str, identity: Mapping[str, Any]) -> str | None:
    """Return the newest complete checkpoint of a folder or bucket; a folder's incomplete ones are removed."""
    if bucket := Bucket(folder) if is_remote(folder) else None:
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
        Bucket(place).check(name, identity)
    else:
        check_checkpoint(start, identity)


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
                foreign += [] if read_identity(path) else [("save_folder", path)]
    if "run_name:" not in _text(run / "config.yaml"):
        foreign += [("run_folder", run / name) for name in RUN_FILES if (run / name).exists()]
    if not ({*written_here(model)} or (model / REFERENCE_METADATA).exists()):
        text = _text(model / "config.json")
        foreign += [("run_folder", model)] if text and PriorLVLMConfig.model_type not in text else []
    for key, path in foreign[:1]:
        raise ValueError(f"{where}{key}: {path} was not written by a run of this program; name another folder.")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""
