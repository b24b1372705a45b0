"""Read untrusted input within bounds: plain files by size, JSON by depth, YAML by size and number of values.

A file of JSON holds one object, or one object per line, which a restarted job continues.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from composer_prior.data.messages import DataError, one_line

MAX_JSON_BYTES = 1 << 30  # of JSON that is read whole; COCO's captions have 0.1 GB
MAX_RECIPE_BYTES = 1 << 20
_MOST_NESTED = 100  # Python's limit depends on the depth of the call, and that of pickle is lower
_MOST_VALUES = 100_000  # of a YAML file, with its aliases expanded


def open_plain(path: str | os.PathLike[str]) -> FileIO:
    """Open a plain file; a pipe, socket, device or folder raises OSError, without waiting for the writer of a pipe."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return cast(FileIO, file)


def read_plain(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a plain file, or raise OSError as :func:`open_plain` does, or if it is larger than ``limit`` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are accepted", os.fspath(path))
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, or raise ValueError if the text is none or is nested more than 100 deep."""
    try:
        return bounded(json.loads(text))
    except RecursionError:
        raise ValueError(f"nested more than {_MOST_NESTED} deep") from None


def bounded(value: Any) -> Any:
    """Return a value of JSON, or raise ValueError if it is nested more than 100 deep."""
    level = [value]
    for _ in range(_MOST_NESTED):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [part for parts in nested for part in parts]
        if not level:
            return value
    raise ValueError(f"nested more than {_MOST_NESTED} deep")


def load_yaml(path: Path) -> Any:
    """Load a YAML file with OmegaConf, without executing anything in it.

    A file of more than 1 MiB raises OSError, and one of more than 100,000 values with its aliases expanded ValueError.
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


def read_object(file: Path) -> dict[str, Any]:
    """Read the object that a file of JSON holds, or raise DataError naming the file."""
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}; restore or remove it.") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} cannot be read: it holds no object; restore or remove it.")
    return found


def begin_lines(out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> list[dict[str, Any]]:
    """Return the lines that exist already, and remove an incomplete last line.

    The settings that the lines depend on lie beside the file in ``{out}.options.json``. FileExistsError names those
    that differ from the given ones, unless ``overwrite`` deletes the lines.
    """
    beside = out.with_name(f"{out.name}.options.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        out.unlink(missing_ok=True)
    if out.exists():
        known: Any = None
        with suppress(OSError, ValueError):
            known = json.loads(beside.read_text())
        if known != settings:
            changed = [key for key in settings if not isinstance(known, dict) or known.get(key) != settings[key]]
            raise FileExistsError(
                f"{out} was not made with these options ({', '.join(changed)} differ); give another out=, or "
                "overwrite=true."
            )
    beside.write_text(json.dumps(settings))
    if not out.exists():
        return []
    whole = out.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    with open(out, "r+b") as file:
        file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise DataError(
            f"{out} has a line that is no JSON ({one_line(error)}); give another out=, or repair it."
        ) from error
