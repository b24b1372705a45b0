"""Checkpoints: which are whole, to which run they belong, and what may be unpickled from them."""

import errno
import io
import json
import pickle
import re
import signal
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_prior.data.hub import load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.data.storage import is_remote
from composer_prior.data.tokenizer import add_image_tokens, tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.language import parts_of
from composer_prior.models.model_folder import fitting_weights
from composer_prior.models.prior_lvlm import PriorLVLMConfig

# Set by a run: CHECKPOINT_VALIDATION_FUNCTION is the variable by which Composer knows what to call.
ASKED_BY_COMPOSER = {"CHECKPOINT_VALIDATION_FUNCTION": f"{__name__}.holds_no_code"}
CHECKPOINT_NAME = "ep{epoch}-ba{batch}-rank{rank}.pt"
LATEST_NAME = "latest-rank0.pt"
WEIGHT_NAMES = {"weight_names": "transformers"}  # in the identity of a run: how its checkpoints name weights
METADATA = ".metadata"  # of a sharded checkpoint, which is a folder
# What Composer puts into a checkpoint beside tensors and plain containers: times, and numpy's random state.
_ALLOWED_GLOBALS = re.compile(
    r"datetime\.timedelta|torch\.torch_version\.TorchVersion|numpy\.(dtype|ndarray|dtypes\.\w+DType)"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
)
# What describes the contents of a sharded checkpoint.
_ALLOWED_IN_METADATA = re.compile(
    r"pathlib\.\w*Path|torch\.(Size|bool|(bfloat|complex|float|int|uint)\d+\w*|serialization\._get_layout)"
    r"|torch\.distributed\.checkpoint\.metadata\.((Tensor|Bytes|Chunk)Storage)?Metadata"
    r"|torch\.distributed\.checkpoint\.metadata\.(MetadataIndex|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
)
_NAME = re.compile(r"ep\d+-ba(\d+)(-rank\d+\.pt)?")  # of a checkpoint
_SHARD = re.compile(r"__\d+_\d+\.distcp")  # a file of a sharded checkpoint


class DamagedError(ValueError):
    """A checkpoint that is not whole."""


class ForeignError(ValueError):
    """A file that would run code when it is unpickled."""


class RunIdentity(Callback):
    """Carries in each checkpoint what the run is made of.

    Args:
        identity: names and values, such as the model's recipe and the fingerprints of tokenizer and data.
    """

    def __init__(self, identity: Mapping[str, Any]):
        self.identity = dict(identity)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.identity)


def check_checkpoint(path: str | Path, identity: Mapping[str, Any], whole: bool = True) -> None:
    """Refuse a checkpoint before Composer unpickles it.

    Args:
        path: of a checkpoint, a file or the folder of a sharded one.
        identity: that of the run, see :class:`RunIdentity`.
        whole: all of it is there, and is compared with the sums that it holds. Default: ``True``.

    Raises:
        DamagedError: if it is not whole.
        ValueError: if it would run code when loaded, or belongs to a run of another identity; one line that names the
            keys.
    """
    path = Path(path)
    if whole:
        check_sums(path)
    if path.is_dir():
        for shard, parts in places_of(read_metadata(path), tensors=False).items():
            holds_no_code(path / shard, parts)
    theirs = _read_identity(path)
    if theirs is None:
        raise ValueError(f"{path} was not written by a run of this program: it does not say what it was made from.")
    there, here = flat(theirs), flat(identity)
    if WEIGHT_NAMES.keys() <= here.keys() - there.keys():
        raise ValueError(_old_names(path))
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path} is of another run: {', '.join(differing)} differ ({key}: {there.get(key)!r} there, "
            f"{here.get(key)!r} here). load_path and autoresume go on with the same run; to start another from "
            f"its weights, give init_from={path} and a run_name of its own; to start anew, delete it."
        )


def check_sums(path: Path, prefix: str = "") -> None:
    """Refuse a checkpoint that is cut or whose bytes have changed, by the CRC that torch stores with each value.

    Args:
        path: a file or the folder of a sharded one.
        prefix: of a sharded one, the names of the values to read. Default: all.

    Raises:
        DamagedError: naming what is damaged.
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


def holds_no_code(path: str | Path, parts: Sequence[tuple[int, int]] | None = None) -> bool:
    """Refuse a file that would run code when it is unpickled.

    Composer, which unpickles whatever it finds, calls this for each file of a checkpoint before it reads it; see
    :data:`ASKED_BY_COMPOSER`.

    Args:
        path: a checkpoint of one file; ``.metadata`` or a shard of a sharded one.
        parts: offset and length of each value that is read from a shard.

    Returns:
        that it is so.

    Raises:
        ValueError: naming what it holds.
    """
    path = Path(path)
    if path.name == METADATA:
        read_metadata(path.parent)
        return True
    with open(path, "rb") as file:
        for value in [file] if parts is None else (_create_file_view(file, *part) for part in parts):
            try:
                foreign = get_unsafe_globals_in_checkpoint(cast(IO[bytes], value))
            except Exception as error:  # what torch says of bytes that it did not write has many types
                raise DamagedError(f"{path} is not a whole checkpoint.") from error
            _refuse_foreign(path, foreign, _ALLOWED_GLOBALS)
    return True


def _read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint of one file, with tensors mapped from the disk."""
    holds_no_code(path)
    content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    state = content.get("state") if isinstance(content, Mapping) else None
    if not (isinstance(state, Mapping) and isinstance(state.get("model"), Mapping)):
        raise ValueError(f"{path} is no checkpoint as Composer 0.32 writes it: it lacks state.model.")
    return dict(state)


def _read_identity(path: Path) -> dict[str, Any] | None:
    """Read the identity of a checkpoint's run, or None; a sharded one has joined keys ``a.b``."""
    if path.is_dir():
        prefix = f"state.callbacks.{RunIdentity.__qualname__}."
        return {key.removeprefix(prefix): value for key, value in _read_sharded(path, prefix).items()} or None
    return _read_state(path).get("callbacks", {}).get(RunIdentity.__qualname__)


def _refuse_foreign(path: Path, names: Iterable[str], allowed: re.Pattern[str]) -> None:
    foreign = sorted(name for name in names if not allowed.fullmatch(name))
    if foreign:
        raise ForeignError(
            f"{path} holds Python objects ({', '.join(foreign)}) and is not loaded: they could run code."
        )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    joined: dict[str, Any] = {}
    for key, value in tree.items():
        joined |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return joined


def mend_checkpoints(folder: Path) -> Path | None:
    """Make the newest whole checkpoint the latest, after a run that was killed at any moment.

    A checkpoint that was being written is removed, and the link to the latest one, which is replaced in two steps, is
    set again.

    Returns:
        the newest whole checkpoint, a file or the folder of a sharded one, or None.
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


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a file or the folder of a sharded one, in which other files stay."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError):  # another rank removes it, too
        for file in path.iterdir():
            if _SHARD.fullmatch(file.name) or file.name in (METADATA, f"{METADATA}.tmp"):
                file.unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def is_complete(path: Path) -> bool:
    """Whether the writing of a checkpoint came to its end; what has become of it since, :func:`check_sums` tells."""
    return (path / METADATA).is_file() if path.is_dir() else zipfile.is_zipfile(path)


def find_checkpoint(path: str) -> None:
    """Refuse what is no checkpoint, a file or the folder of a sharded one, but what holds or is made from one."""
    place = Path(path)
    if not place.exists():
        raise ValueError("there is no such checkpoint")
    if (place / "config.json").is_file():
        raise ValueError("this is a model, without what a run goes on from; init_from starts a run from its weights")
    if place.is_dir() and not any(_SHARD.fullmatch(file.name) or file.name == METADATA for file in place.iterdir()):
        newest = newest_checkpoint(place / "checkpoints") or newest_checkpoint(place)
        raise ValueError(f"this is a folder; name a checkpoint{f' in it, such as {newest}' if newest else ''}")


def find_weights(path: str) -> Path:
    """Where the weights are that a path names: a checkpoint, or a model in Hugging Face form.

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


def load_weights(path: str, model: ComposerLVLM) -> str:
    """Give a model the weights of another run, and nothing else of it; what the run was made from may differ.

    The weights fit if names and shapes of all of a part's weights (vision, projector, language) are the same, and the
    tokenizer, which says what each row of the embeddings stands for. A part that is not there at all, as in a language
    model on text, stays as it is.

    Args:
        path: see :func:`find_weights`.
        model: with whole weights, on the CPU.

    Returns:
        a line on what was loaded from where.

    Raises:
        ValueError: naming what does not fit.
    """
    source = find_weights(path)
    weights, fingerprint = read_weights(source)
    remedy = "init_from needs the same architecture and tokenizer"
    if fingerprint is not None and fingerprint != tokenizer_fingerprint(model.tokenizer):
        raise ValueError(f"init_from={path}: it was trained with another tokenizer than tokenizer.name; {remedy}.")
    parts: dict[str, Any] = parts_of(model.model)
    target: Any = model.model
    loaded = list(parts)
    if not any(name.startswith("model.model.vision_tower.") for name in weights):  # a language model on text
        loaded, target = ["language"], parts["language"]
    found = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    try:
        target.load_state_dict(fitting_weights(found, target), strict=False)  # what is not there is tied
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}; {remedy}.") from error
    kept = sorted({*parts} - {*loaded})
    without = f"; {', '.join(kept)} stay as the recipe says" if kept else ""
    return f"Weights: {', '.join(sorted(loaded))} from {source}{without}"


def read_weights(source: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return weights by their names in a :class:`.ComposerLVLM`, and the fingerprint of their tokenizer if known.

    Raises:
        ValueError: also for a checkpoint of composer-prior 0.1, whose names are others.
    """
    if source.is_file():
        check_sums(source)
        state = _read_state(source)
        weights = {name.removeprefix("module."): tensor for name, tensor in state["model"].items()}
        fingerprint = state.get("callbacks", {}).get(RunIdentity.__qualname__, {}).get("tokenizer")
    elif (source / METADATA).is_file():
        prefix = "state.model."
        weights = {name.removeprefix(prefix): tensor for name, tensor in _read_sharded(source, prefix).items()}
        fingerprint = (_read_identity(source) or {}).get("tokenizer")
    else:
        if json.loads((source / "config.json").read_bytes()).get("model_type") == PriorLVLMConfig.model_type:
            lvlm = ImageTextModel.from_pretrained(source)
            model, tokenizer = lvlm.model, lvlm.tokenizer
        else:
            model = load_pretrained(AutoModelForCausalLM, source, dtype=torch.float32)
            tokenizer = load_pretrained(AutoTokenizer, source)
            add_image_tokens(tokenizer)
        return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tokenizer_fingerprint(
            tokenizer
        )
    if any(name.startswith("model.language.") for name in weights):
        raise ValueError(_old_names(source))
    return weights, fingerprint


def _old_names(path: Path) -> str:
    return (
        f"{path} was written by composer-prior 0.1, whose weights have other names: go on with that version, or start "
        "another run from the model/ folder of its run (init_from, run_name)."
    )


def _read_sharded(folder: Path, prefix: str) -> dict[str, Any]:
    """Read the entries of a sharded checkpoint with a prefix, without running code in it."""
    check_sums(folder, prefix)
    entries: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in read_metadata(folder).state_dict_metadata.items()
        if name.startswith(prefix)
    }
    load(entries, checkpoint_id=folder, planner=_WeightsOnly(flatten_state_dict=False), no_dist=True)
    return entries


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a sharded checkpoint.

    Raises:
        ValueError: if it would run code when it is unpickled, is none, or names files elsewhere.
    """
    path = folder / METADATA

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            _refuse_foreign(path, [f"{module}.{name}"], _ALLOWED_IN_METADATA)
            return super().find_class(module, name)

    try:
        metadata = Restricted(io.BytesIO(path.read_bytes())).load()
        shards = {info.relative_path for info in metadata.storage_data.values()}
    except Exception as error:  # what pickle says of damaged bytes has many types
        if isinstance(error, ForeignError | OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise DamagedError(f"{path} does not describe a checkpoint.") from error
    if not all(_SHARD.fullmatch(shard) for shard in shards):
        raise ValueError(f"{path} names files that do not belong to a checkpoint.")
    return metadata


def places_of(metadata: Metadata, prefix: str = "", tensors: bool = True) -> dict[str, list[tuple[int, int]]]:
    """Where a sharded checkpoint's values are, or those that are no tensors: offset and length of each, by file."""
    places: dict[str, list[tuple[int, int]]] = {}
    for index, info in (metadata.storage_data or {}).items():
        is_tensor = isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        if index.fqn.startswith(prefix) and (tensors or not is_tensor):
            places.setdefault(info.relative_path, []).append((info.offset, info.length))
    return places


class _WeightsOnly(DefaultLoadPlanner):
    """Reads values that are no tensors without unpickling objects; torch's own planner would."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


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
