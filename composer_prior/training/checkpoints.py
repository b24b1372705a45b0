"""Checkpoints: which are whole, to which run they belong, and what may be unpickled from them."""

import re
import shutil
import signal
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.serialization import get_unsafe_globals_in_checkpoint

CHECKPOINT_NAME = "ep{epoch}-ba{batch}-rank{rank}.pt"
LATEST_NAME = "latest-rank0.pt"
# What Composer puts into a checkpoint beside tensors and plain containers: times, and numpy's random state.
_ALLOWED_GLOBALS = re.compile(
    r"datetime\.timedelta|torch\.torch_version\.TorchVersion|numpy\.(dtype|ndarray|dtypes\.\w+DType)"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
)


class RunIdentity(Callback):
    """Carries in each checkpoint what the run is made of.

    Args:
        identity: names and values, such as the model's recipe and the fingerprints of tokenizer and data.
    """

    def __init__(self, identity: Mapping[str, Any]):
        self.identity = dict(identity)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.identity)


def check_checkpoint(path: str | Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint before Composer unpickles it.

    Args:
        path: of a checkpoint in one file.
        identity: that of the run, see :class:`RunIdentity`.

    Raises:
        ValueError: if it is not whole, would run code when loaded, or belongs to a run of another identity; one line
            that names the keys.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole checkpoint.")
    foreign = [name for name in get_unsafe_globals_in_checkpoint(path) if not _ALLOWED_GLOBALS.fullmatch(name)]
    if foreign:
        raise ValueError(f"{path} holds Python objects ({', '.join(foreign)}) and is not loaded: they could run code.")
    # Nothing but the allowed names is in there, as was just seen.
    state = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["state"]
    theirs = state.get("callbacks", {}).get(RunIdentity.__qualname__)
    if theirs is None:
        raise ValueError(f"{path} was not written by a run of this program: it does not say what it was made from.")
    differing = _differing_keys(theirs, identity)
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path} is of another run: {', '.join(differing)} differ ({key}: {_at(theirs, key)!r} there, "
            f"{_at(identity, key)!r} here). Set run_name, or delete it to start anew."
        )


def _differing_keys(theirs: Any, ours: Any, prefix: str = "") -> list[str]:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        return [
            d for key in keys for d in _differing_keys(theirs.get(key), ours.get(key), f"{prefix}.{key}".strip("."))
        ]
    return [] if theirs == ours else [prefix]


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def mend_checkpoints(folder: Path) -> Path | None:
    """Make the newest whole checkpoint the latest, after a run that was killed at any moment.

    A checkpoint that was being written is removed, and the link to the latest one, which is replaced in two steps, is
    set again.

    Returns:
        the newest whole checkpoint, a file or the folder of a sharded one, or None.
    """
    whole = []
    for path in folder.glob("ep*-ba*"):
        batch = re.match(r"ep\d+-ba(\d+)", path.name)
        if batch is None:
            continue
        if (path / ".metadata").is_file() if path.is_dir() else zipfile.is_zipfile(path):
            whole.append((int(batch[1]), path))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    latest = folder / LATEST_NAME
    if latest.is_symlink():
        latest.unlink()
    if not whole:
        return None
    newest = max(whole)[1]
    latest.symlink_to(newest.name)
    return newest


class Preempted(Exception):
    """Training was asked to stop by SIGTERM."""


class StopOnSigterm(Callback):
    """Stop at the end of the batch when any rank has received SIGTERM, as nodes that are taken away do."""

    def __init__(self) -> None:
        self._received = False

    def fit_start(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: Any) -> None:
        self._received = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        received = state.device.tensor_to_device(torch.tensor([self._received], dtype=torch.uint8))
        dist.all_reduce(received, reduce_operation="MAX")
        if received.item():
            raise Preempted
