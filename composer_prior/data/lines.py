"""JSON files: one object, or one object per line, which a restarted job continues."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from composer_prior.data.messages import DataError, one_line


def read_object(file: Path) -> dict[str, Any]:
    """Read the object that a file of JSON holds.

    Raises:
        DataError: naming the file.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}; restore or remove it.") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} cannot be read: it holds no object; restore or remove it.")
    return found


def begin_lines(out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> list[dict[str, Any]]:
    """Return the lines that exist already, and remove an incomplete last line.

    Args:
        out: the file; its settings lie beside it in ``{out}.options.json``.
        settings: all options that the lines depend on.
        overwrite: delete existing lines.

    Raises:
        FileExistsError: if the file was made with other settings, naming those that differ.
    """
    beside = out.with_name(f"{out.name}.options.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not overwrite:
        known: Any = None
        with suppress(OSError, ValueError):
            known = json.loads(beside.read_text())
        if known != settings:
            changed = [key for key in settings if not isinstance(known, dict) or known.get(key) != settings[key]]
            raise FileExistsError(
                f"{out} was not made with these options ({', '.join(changed)} differ); give another out=, or "
                "overwrite=true."
            )
    elif out.exists():
        out.unlink()
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
