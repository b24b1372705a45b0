"""Read untrusted input within bounds: plain files by size, JSON by depth, YAML by size and number of values."""

import errno
import json
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

MAX_JSON_BYTES = 1 << 30
"""Of JSON that is read whole; COCO's captions have 0.1 GB."""
MAX_RECIPE_BYTES = 1 << 20
_MOST_NESTED = 100  # Python's limit depends on the depth of the call, and that of pickle is lower
_MOST_VALUES = 100_000  # of a YAML file, with its aliases expanded


def open_plain(path: str | os.PathLike[str]) -> FileIO:
    """Open a plain file, without waiting for the writer of a pipe.

    Raises:
        OSError: also for a pipe, socket, device or folder.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return cast(FileIO, file)


def read_plain(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a plain file.

    Raises:
        OSError: as for :func:`open_plain`, or the file is larger than ``limit`` bytes.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are accepted", os.fspath(path))
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if the text is not JSON, or is nested more than 100 deep.
    """
    try:
        return bounded(json.loads(text))
    except RecursionError:
        raise ValueError(f"nested more than {_MOST_NESTED} deep") from None


def bounded(value: Any) -> Any:
    """Return a value of JSON, unless it is nested too deeply to work with.

    Raises:
        ValueError: if it is nested more than 100 deep.
    """
    level = [value]
    for _ in range(_MOST_NESTED):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [part for parts in nested for part in parts]
        if not level:
            return value
    raise ValueError(f"nested more than {_MOST_NESTED} deep")


def load_yaml(path: Path) -> Any:
    """Load a YAML file with OmegaConf, without executing anything in it.

    Raises:
        ValueError: for a file that is larger than 1 MiB, or has more than 100,000 values when its aliases are written
            out.
    """
    text = read_plain(path, MAX_RECIPE_BYTES).decode("utf-8-sig")
    try:
        counts: dict[int, int] = {}
        if (root := yaml.compose(text, yaml.SafeLoader)) is not None and _count(root, counts) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values, with its aliases written out")
        return OmegaConf.load(path)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values below a node, with its aliases expanded."""
    if id(node) not in counts:
        counts[id(node)] = 1  # an alias of itself counts as one
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = parts if isinstance(node, yaml.CollectionNode) else ()
        counts[id(node)] = 1 + sum(_count(part, counts) for part in inner)
    return counts[id(node)]
