"""The objects that may be unpickled from a checkpoint; all others are refused, since they could run code."""

import io
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_unsafe_globals_in_checkpoint

# Set by a run: the variable by which Composer, which unpickles whatever it finds, knows what to call before.
ASKED_BY_COMPOSER = {"CHECKPOINT_VALIDATION_FUNCTION": f"{__name__}.holds_no_code"}
METADATA = ".metadata"  # of a sharded checkpoint, which is a folder
# What Composer puts into a checkpoint beside tensors and plain containers: times, and numpy's random state.
_ALLOWED_GLOBALS = re.compile(
    r"datetime\.timedelta|torch\.torch_version\.TorchVersion|numpy\.(dtype|ndarray|dtypes\.\w+DType)"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
)
# Types in the metadata of a sharded checkpoint.
_ALLOWED_IN_METADATA = re.compile(
    r"pathlib\.\w*Path|torch\.(Size|bool|(bfloat|complex|float|int|uint)\d+\w*|serialization\._get_layout)"
    r"|torch\.distributed\.checkpoint\.metadata\.((Tensor|Bytes|Chunk)Storage)?Metadata"
    r"|torch\.distributed\.checkpoint\.metadata\.(MetadataIndex|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
)
SHARD = re.compile(r"__\d+_\d+\.distcp")  # a file of a sharded checkpoint


class DamagedError(ValueError):
    """A checkpoint that is not whole."""


class ForeignError(ValueError):
    """A file that would run code when it is unpickled."""


def holds_no_code(path: str | Path, parts: Sequence[tuple[int, int]] | None = None) -> bool:
    """Refuse a file that would run code when it is unpickled, or else return True; see ``ASKED_BY_COMPOSER``.

    Args:
        path: a checkpoint of one file; ``.metadata`` or a shard of a sharded one.
        parts: offset and length of each value that is read from a shard.
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


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a sharded checkpoint, unless it would run code, is none, or names files elsewhere."""
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
    if not all(SHARD.fullmatch(shard) for shard in shards):
        raise ValueError(f"{path} names files that do not belong to a checkpoint.")
    return metadata


def _refuse_foreign(path: Path, names: Iterable[str], allowed: re.Pattern[str]) -> None:
    foreign = sorted(name for name in names if not allowed.fullmatch(name))
    if foreign:
        raise ForeignError(
            f"{path} holds Python objects ({', '.join(foreign)}) and is not loaded: they could run code."
        )
