"""Files of one JSON object per line that are written as results come, and gone on with when a job is started again."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def begin_lines(out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> list[dict[str, Any]]:
    """The lines that are there already; one that was not written to its end is taken away.

    Args:
        out: the file; its settings lie beside it in ``{out}.options.json``.
        settings: what the lines depend on.
        overwrite: begin anew.

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
    return [json.loads(line) for line in whole.splitlines()]
