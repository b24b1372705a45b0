"""Open a caption data set with an untrusted index, to read its samples by number."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from composer_prior.data.conversations import ChatError, checked
from composer_prior.data.files import MAX_JSON_BYTES, read_plain
from composer_prior.data.messages import NO_INDEX
from composer_prior.data.storage import is_remote


def open_captions(data: str, cache: str, messages: bool = False) -> tuple[Any, bytes]:
    """Return the data set and its index, after checking that its columns run no code and its shards stay inside.

    The data are captions, or with ``messages`` conversations too.
    """
    data = data if is_remote(data) else str(Path(data).expanduser())
    if not is_remote(data) and not Path(data, "index.json").exists():
        raise FileNotFoundError(NO_INDEX.format(data))
    from streaming.base.local import LocalDataset  # here: a missing index is reported before this slow import

    from composer_prior.data.streams import CheckedDataset

    remote: Any = CheckedDataset(local=cache, remote=data.rstrip("/"), batch_size=1) if is_remote(data) else None
    content = read_plain(Path(data if remote is None else cache, "index.json"), MAX_JSON_BYTES)
    try:
        for shard in json.loads(content)["shards"]:
            _check_columns(data, shard, messages)
        return LocalDataset(data) if remote is None else remote, content
    except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{data}: its index.json is no index of a data set ({type(error).__name__}).") from error


def _check_columns(data: str, shard: Mapping[str, Any], messages: bool) -> None:
    columns = dict(zip(shard.get("column_names", ()), shard.get("column_encodings", ()), strict=False))
    name = shard.get("raw_data", {}).get("basename", "")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{data}: its index names {name!r}, which leaves the data set; refused.")
    captions = columns.get("caption") == "str" or columns.get("captions") == "json"
    chats = messages and columns.get("images") == "bytes" and columns.get("messages") == "json"
    if not chats and (columns.get("image") != "bytes" or not captions):
        raise ValueError(f"{data}: columns {columns}; expected image: bytes, and caption: str or captions: json.")
    unsafe = [column for column, encoding in columns.items() if encoding not in ("bytes", "str", "json", "int")]
    if unsafe:
        raise ValueError(f"{data}: column {unsafe[0]!r} is {columns[unsafe[0]]}, which is not read here; drop it.")


def sample_captions(sample: Mapping[str, Any]) -> list[str]:
    """Return the captions of a sample, one or several; of a conversation or document, its texts, none of a bad one."""
    if "messages" in sample:
        with suppress(ChatError):
            return [part["text"] for one in checked(sample["messages"]) for part in one["content"] if "text" in part]
        return []
    captions = [sample["caption"]] if "caption" in sample else sample["captions"]
    return captions if isinstance(captions, list) else [captions]
