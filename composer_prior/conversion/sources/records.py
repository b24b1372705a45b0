"""Images and captions from the fields of an entry in any format, also of LLaVA's conversations."""

import codecs
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from composer_prior.conversion.sources.base import Record, Rejected
from composer_prior.data.files import parse_json
from composer_prior.data.images import ImageError, image_in_text

_HUMAN = ("human", "user")
_MODEL = ("gpt", "assistant", "model", "chatgpt", "bot")
_PLACEHOLDER = "<image>"
_PART_IMAGES = ("image", "image_url", "path", "url", "base64", "source", "data")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Turn = tuple[str, str, list[Any]]  # role, text and images


def value_of(entry: dict[str, Any], wanted: str | None, usual: Sequence[str]) -> Any:
    """Return the wanted field, or else the first of the usual ones that is not empty."""
    if wanted:
        return entry.get(wanted)
    for name in usual:
        if value := entry.get(name):
            return value
    return next((entry[name] for name in usual if name in entry), None)


def record_of(
    image: Any, caption: Any, spans: Any, key: str, where: str, explicit: bool = False, has_spans: bool = False
) -> Record | Rejected:
    """Return a :class:`Record` from the values of its fields.

    ``image`` is bytes, a path, a dict of one of them, or a list of one of these; ``caption`` a text, a list of texts,
    or a conversation, of which the answer about the image is the caption; ``spans`` are of the caption, or of each.
    """
    turns = _turns(caption)
    count = max(1, len(several(caption, spans)[0])) if turns is None else 1
    try:
        found = image_of(image)
        if found is None and turns:
            found = image_of([part for _, _, images in turns for part in images if part != _PLACEHOLDER])
    except ImageError as error:
        return Rejected(key, error.reason, where, error.detail, count)
    if found is None:
        if turns and not any(images for _, _, images in turns):
            return Rejected(key, "no image: a text-only conversation", where)
        return Rejected(key, "missing image", where, "neither a path nor the bytes of an image", count)
    if turns is not None:
        caption = _answer(turns)
        if caption is None:
            return Rejected(key, "no answer", where, f"none about the image in a conversation of {len(turns)} turns")
    captions, each = several(caption, spans)
    return Record(key, found, captions, where, each if has_spans else None, explicit)


def image_of(value: Any) -> bytes | str | None:
    """Return the one image of a field as bytes or as a path, None without one, or raise ImageError for several."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise ImageError("several images", f"{len(value)} of them; a record has one")
        return image_of(value[0]) if value else None
    if isinstance(value, dict):
        data = next((value[name] for name in ("bytes", "data", "base64") if value.get(name)), None)
        if isinstance(data, str):  # JSON has no bytes
            data = image_in_text(data, is_path=False)
        return image_of(data or value.get("path") or value.get("url") or value.get("source"))
    if isinstance(value, str) and value:
        found = image_in_text(value)
        return value if found is None else found
    return value if isinstance(value, bytes) and value else None


def several(caption: Any, spans: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return one caption or a list of them as a tuple, with as many lists of spans."""
    if not isinstance(caption, (list, tuple)):
        return (() if caption is None else (caption,)), (spans,)
    each = tuple(spans) if isinstance(spans, list) and len(spans) == len(caption) else (spans,) * len(caption)
    return tuple(caption), each


def decode_text(data: bytes) -> str:
    """Decode the text of a file, without a byte order mark; invalid bytes become surrogates."""
    if data.startswith(_UTF16):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _turns(value: Any) -> list[Turn] | None:
    """Return the turns of a conversation; None for anything else."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            value = parse_json(value)
    if not (isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value)):
        return None
    if not any("from" in turn or "role" in turn for turn in value):
        return None
    return [_turn(turn) for turn in value]


def _turn(turn: dict[str, Any]) -> Turn:
    role = turn.get("from") or turn.get("role")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    texts, images = list[str](), list[Any]()
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, dict):
            if "image" in str(part.get("type")):
                images.append(next(filter(None, map(part.get, _PART_IMAGES)), _PLACEHOLDER))
            part = part.get("text")
        if isinstance(part, str):
            texts.append(part)
            images += [_PLACEHOLDER] * (_PLACEHOLDER in part)
    return role.lower() if isinstance(role, str) else "", "\n".join(texts), images


def _answer(turns: Sequence[Turn]) -> str | None:
    """Return the model's first answer after the image was shown, or its first answer."""
    shown = [index for index, (role, _, images) in enumerate(turns) if role in _HUMAN and images]
    later = turns[shown[0] :] if shown else turns
    text = next((text for role, text, _ in later if role in _MODEL), "")
    if _PLACEHOLDER in text:
        text = text.replace(_PLACEHOLDER, "").strip()
    return text if text.strip() else None
