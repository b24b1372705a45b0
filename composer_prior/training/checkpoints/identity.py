"""The identity of a run, which its checkpoints hold, and the reading of checkpoints without running code."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.checkpoint import DefaultLoadPlanner, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from composer_prior.training.checkpoints.pickles import holds_no_code, read_metadata
from composer_prior.training.checkpoints.storage import check_sums, places_of

RUN_ID = "run_id"  # in the identity of a run, by which trackers know it; not compared
WEIGHT_NAMES = {"weight_names": "transformers"}  # in the identity of a run: how its checkpoints name weights
OLD_NAMES = (
    "{} was written by composer-prior 0.1, whose weights have other names: go on with that version, or start another "
    "run from the model/ folder of its run (init_from, run_name)."
)


class RunIdentity(Callback):
    """Carries in each checkpoint what the run is made of, such as the model's recipe and the data's fingerprint.

    Args:
        identity: in the checkpoint that the run resumes from, if there is one.
        run_id: by which trackers know the run. Default: none.
    """

    def __init__(self, identity: Mapping[str, Any], run_id: str | None = None):
        self.identity, self._run_id = dict(identity), run_id

    def after_load(self, state: State, logger: Logger) -> None:
        if self._run_id is not None:  # an older checkpoint has none, and a sharded one is loaded key by key
            self.identity[RUN_ID] = self._run_id

    def state_dict(self) -> dict[str, Any]:
        return dict(self.identity)


def check_checkpoint(path: str | Path, identity: Mapping[str, Any], whole: bool = True) -> str | None:
    """Refuse a checkpoint before Composer unpickles it, or return the id of its run, if it has one.

    Args:
        path: of a checkpoint, a file or the folder of a sharded one.
        identity: that of the run, see :class:`RunIdentity`.
        whole: all of it is there, and is compared with the sums that it holds. Default: ``True``.

    Raises:
        DamagedError: if it is not whole.
        ValueError: if it would run code when loaded, or belongs to a run of another identity, naming the keys.
    """
    path = Path(path)
    if whole:
        check_sums(path)
    if path.is_dir():
        for shard, parts in places_of(read_metadata(path), tensors=False).items():
            holds_no_code(path / shard, parts)
    theirs = read_identity(path)
    if theirs is None:
        raise ValueError(f"{path} was not written by a run of this program: it does not say what it was made from.")
    there, here = flat(theirs), flat(identity)
    if WEIGHT_NAMES.keys() <= here.keys() - there.keys():
        raise ValueError(OLD_NAMES.format(path))
    differing = [key for key in {**there, **here} if key != RUN_ID and there.get(key) != here.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path} is of another run: {', '.join(differing)} differ ({key}: {there.get(key)!r} there, "
            f"{here.get(key)!r} here). load_path and autoresume go on with the same run; to start another from "
            f"its weights, give init_from={path} and a run_name of its own; to start anew, delete it."
        )
    return theirs.get(RUN_ID)


def read_identity(path: Path) -> dict[str, Any] | None:
    """Read the identity of a checkpoint's run, or None; a sharded one has joined keys ``a.b``."""
    if path.is_dir():
        prefix = f"state.callbacks.{RunIdentity.__qualname__}."
        return {key.removeprefix(prefix): value for key, value in read_sharded(path, prefix).items()} or None
    return read_state(path).get("callbacks", {}).get(RunIdentity.__qualname__)


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint of one file, with tensors mapped from the disk."""
    holds_no_code(path)
    content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    state = content.get("state") if isinstance(content, Mapping) else None
    if not (isinstance(state, Mapping) and isinstance(state.get("model"), Mapping)):
        raise ValueError(f"{path} is no checkpoint as Composer 0.32 writes it: it lacks state.model.")
    return dict(state)


def read_sharded(folder: Path, prefix: str, whole: bool = True) -> dict[str, Any]:
    """Read the entries of a sharded checkpoint with a prefix, without running code in it.

    Args:
        folder: of the checkpoint.
        prefix: of the entries.
        whole: ``False`` reads their names and shapes alone. Default: ``True``.
    """
    if whole:
        check_sums(folder, prefix)
    entries: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=None if whole else "meta")
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in read_metadata(folder).state_dict_metadata.items()
        if name.startswith(prefix)
    }
    if whole:
        load(entries, checkpoint_id=folder, planner=_WeightsOnly(flatten_state_dict=False), no_dist=True)
    return entries


class _WeightsOnly(DefaultLoadPlanner):
    """Reads values that are no tensors without unpickling objects; torch's own planner would."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    joined: dict[str, Any] = {}
    for key, value in tree.items():
        joined |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return joined
