"""Images and captions from the fields of an entry in any format, also of LLaVA's conversations."""

import codecs
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from operator import ne
from typing import Any

from composer_prior.conversion.sources.base import (
    ANSWER_COLUMNS,
    CHAT_COLUMNS,
    CHAT_IMAGE_COLUMNS,
    Record,
    Rejected,
    SourceOptions,
    may_be_image,
)
from composer_prior.data.conversations import ChatError, checked, unknown_part
from composer_prior.data.files import parse_json
from composer_prior.data.images import ImageError, image_in_text
from composer_prior.data.messages import short

_HUMAN = ("human", "user")
_MODEL = ("gpt", "assistant", "model", "chatgpt", "bot")
_SYSTEM = ("system", "developer")  # left out where they say nothing
_PLACEHOLDER = "<image>"
_TEXTS = (None, "text", "input_text", "output_text")  # types of a part of text
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


def found_instead(entry: dict[str, Any], wanted: str | None, usual: Sequence[str]) -> str:
    """Return which fields an entry has if it lacks the wanted one, or all of the usual ones; "" if it does not."""
    names = [wanted] if wanted else [*dict.fromkeys(usual)]
    if any(name in entry for name in names):
        return ""
    return f"found {short(', '.join(map(str, entry))) or 'no field'}; expected {', '.join(names)}"


def chat_of(
    entry: dict[str, Any], key: str, where: str, options: SourceOptions, explicit: bool = False
) -> Record | Rejected:
    """Return a :class:`.Record` of messages from the fields of an entry, see :func:`conversation_of`."""
    image = value_of(entry, options.image_column, CHAT_IMAGE_COLUMNS)
    usual = (options.caption_column,) if options.caption_column else CHAT_COLUMNS
    name = next(filter(entry.get, usual), None) or next((name for name in usual if name in entry), None)
    text = None if name is None else entry[name]
    if not text and options.caption_column is None:
        try:
            images, text = _made_of(entry, image)
            image = images if options.image_column is None else image
        except (KeyError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
            return Rejected(key, "malformed record", where, f"{kind}{error}"[:200])
    if not text and "question" in entry and options.caption_column is None:
        return Rejected(key, "no answer", where, "the question has none")
    if text is None and name is None:
        return Rejected(key, "no known field", where, found_instead(entry, options.caption_column, CHAT_COLUMNS))
    turns = _parsed(text)
    if name in ("messages", "conversations") and not (
        turns and isinstance(turns, (list, tuple)) and isinstance(turns[0], dict)
    ):
        return Rejected(key, "malformed messages", where, f"{name} is no list of roles and contents")
    record = conversation_of(image, text, key, where, str(options.learn), explicit)
    if isinstance(record, Record) and not record.images and options.image_column is None:
        other = next((name for name, value in entry.items() if value and may_be_image(name)), None)
        if other is not None:
            remedy = "name the field of the image with image_column=, or read text alone with image_column=none"
            return Rejected(key, "missing image", where, f"{other!r} may name one: {remedy}")
    return record


def _made_of(entry: dict[str, Any], image: Any) -> tuple[Any, Any]:
    """Return images and text of an entry of MMC4, or of a question with answers about ``image``.

    An image of MMC4 stands before the sentence that it matches. Of several answers the most frequent one is taken, the
    first of equal ones. Raises KeyError, TypeError or ValueError for an entry that is not as these data sets have it.
    """
    if "text_list" in entry and "image_info" in entry:
        sentences, about = _parsed(entry["text_list"]), _parsed(entry["image_info"])
        shown: dict[int, list[Any]] = {number: [] for number in range(len(sentences))}
        for one in about:
            if (place := one["matched_text_index"]) not in shown:
                raise ValueError(f"matched_text_index {place} is none of {len(sentences)} sentences")
            shown[place].append(one["image_name"])
        images, texts = list[Any](), list[Any]()
        for names, text in zip(shown.values(), sentences, strict=True):
            if names or not texts:
                images += [*names, None]
                texts += [*[None] * len(names), []]
            texts[-1].append(text)
        return images, [None if one is None else " ".join(one) for one in texts]
    answers = _parsed(next(filter(None, map(entry.get, ANSWER_COLUMNS)), None))
    if "question" in entry and answers:
        each = answers if isinstance(answers, list) else [answers]
        counted = Counter(one["answer"] if isinstance(one, dict) else one for one in each)
        return image, [{"user": entry["question"], "assistant": counted.most_common(1)[0][0]}]
    return image, None


def record_of(
    image: Any, caption: Any, spans: Any, key: str, where: str, explicit: bool = False, has_spans: bool = False
) -> Record | Rejected:
    """Return a :class:`.Record` from the values of its fields.

    ``image`` is bytes, a path, a dict of one of them, or a list of one of these; ``caption`` a text, a list of texts,
    or a conversation, of which the answer about the image is the caption; ``spans`` are of the caption, or of each.
    """
    turns = _turns(caption)
    count = max(1, len(several(caption, spans)[0])) if turns is None else 1
    further = False
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
        further = sum(role in _MODEL for role, _, _ in turns) > 1
        if caption is None:
            return Rejected(key, "no answer", where, f"none about the image in a conversation of {len(turns)} turns")
    captions, each = several(caption, spans)
    return Record(key, found, captions, where, each if has_spans else None, explicit, further=int(further))


def conversation_of(
    image: Any, text: Any, key: str, where: str, learn: str, explicit: bool = False
) -> Record | Rejected:
    """Return a :class:`.Record` of messages from the values of its fields.

    ``text`` is a conversation, as of OpenAI, Hugging Face or LLaVA; a list of pairs ``{user, assistant}``; a list of
    texts with None, or "", in the places of images; or a text. ``image`` is one or several as in :func:`record_of`,
    with None, or "", in the places of texts. Images that no text names stand before the first one; a text with images
    is the answer to them, unless all text is learned. Several texts of one image are captions, which are rejected.
    """
    try:
        return _conversation(image, _parsed(text), key, where, learn, explicit)
    except ChatError as error:
        reason, _, detail = str(error).partition(": ")
        return Rejected(key, reason, where, detail)


def _conversation(image: Any, text: Any, key: str, where: str, learn: str, explicit: bool) -> Record | Rejected:
    if isinstance(text, (list, tuple)) and len(text) == 1 and isinstance(text[0], str):
        text = text[0]
    given = [*image] if isinstance(image, (list, tuple)) else [image]
    messages, inner = list[dict[str, Any]](), list[Any]()
    several = isinstance(text, (list, tuple))
    turns = text if several and any(isinstance(one, dict) for one in text) else None
    for turn in turns or ():
        if not isinstance(turn, dict):
            raise ChatError(f"a message is no object: {short(repr(turn))}")
        said: list[Any] = [(role, turn[role]) for role in ("user", "assistant") if turn.get(role) is not None]
        if not said:
            value = turn["value"] if turn.get("value") is not None else turn.get("content")
            said = [(turn.get("from") or turn.get("role"), value)]
        for role, content in said:
            role = role.lower() if isinstance(role, str) else role
            role = "user" if role in _HUMAN else "assistant" if role in _MODEL else role
            if content is None and role not in _SYSTEM:
                raise ChatError(f"a message has no content: its fields are {short(', '.join(map(str, turn)))}")
            kept = {"weight": turn.get("weight")} if role == "assistant" else {}
            messages.append({"role": role, "content": [] if content is None else _parts(content, inner), **kept})
    if turns is None:
        slots = [[] if one is None else _parts(one, inner) for one in (text if several else [text])]
        gaps = isinstance(image, (list, tuple)) and any(given) and several and (None in text or not all(given))
        gaps = gaps and not any(part["type"] == "image" for slot in slots for part in slot)
        if gaps and len(given) != len(slots):
            lengths = f'{len(given)} images and {len(slots)} texts, with null or "" in the other\'s places'
            return Rejected(key, "images and text differ", where, f"{lengths}, are not of one length")
        alternate = len(given) == len(slots) and all(map(ne, map(bool, given), map(bool, slots)))
        parallel = several and (None in text or alternate)
        for place, one in enumerate(given if parallel else ()):
            if one and place < len(slots) and not slots[place]:
                slots[place] = [{"type": "image"}]
        messages = [{"role": "document", "content": _joined(slots, "\n\n")}]
    try:
        images = [found for one in [*given, *inner] if (found := image_of(one)) is not None]
    except ImageError as error:
        return Rejected(key, error.reason, where, error.detail)
    named = sum(part["type"] == "image" for one in messages for part in one["content"])
    if turns is None and several and len(images) == 1 and not named and learn != "all":
        remedy = "list each in a record of its own, or make one document of them with learn=all"
        return Rejected(key, "several captions", where, f"{len(text)} texts of one image; {remedy}")
    if images and not named:
        first = next((one for one in messages if one["role"] in ("user", "document")), messages[0])
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif named != len(images):
        return Rejected(key, "images and text differ", where, f"the text names {named}, the record has {len(images)}")
    answers = [one for one in messages if one["role"] == "assistant"]
    if isinstance(text, str) and turns is None and images and not named and learn != "all":  # a caption
        parts = messages[0]["content"]
        shown, said = ([part for part in parts if part["type"] == kind] for kind in ("image", "text"))
        messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": said}]
    if learn == "last":
        for one in answers[:-1]:
            one["weight"] = 0
    if learn == "all" and turns is not None:
        messages = [{"role": "document", "content": _joined([one["content"] for one in messages], "\n")}]
    messages = [one for one in messages if one["content"] or one["role"] not in _SYSTEM]
    return Record(key, images[0] if images else b"", (), where, None, explicit, checked(messages), tuple(images))


def _parts(content: Any, inner: list[Any]) -> list[dict[str, str]]:
    """Return the parts of a content; images that it holds itself are added to ``inner``."""
    found: list[dict[str, str]] = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, dict) and "image" in str(part.get("type")):
            source = next(filter(None, map(part.get, _PART_IMAGES)), None)
            inner += [] if source is None else [source]
            found.append({"type": "image"})
            continue
        text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXTS else part
        if not isinstance(text, str):
            raise unknown_part(part)
        pieces = text.split(_PLACEHOLDER)
        for number, piece in enumerate(pieces):
            piece = piece.strip("\n") if len(pieces) > 1 else piece  # LLaVA's line break beside an image
            found += [{"type": "image"}] * bool(number) + [{"type": "text", "text": piece}] * bool(piece)
    return found


def _joined(slots: Sequence[list[dict[str, str]]], between: str) -> list[dict[str, str]]:
    """Return the parts of all slots, neighbouring texts as one."""
    found: list[dict[str, str]] = []
    for part in (part for slot in slots for part in slot):
        if found and found[-1]["type"] == part["type"] == "text":
            found[-1] = {"type": "text", "text": found[-1]["text"] + between + part["text"]}
        else:
            found.append(part)
    return found


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


def _parsed(value: Any) -> Any:
    """Return the list that a text is in JSON, or any other value as it is."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            return parse_json(value)
    return value


def _turns(value: Any) -> list[Turn] | None:
    """Return the turns of a conversation; None for anything else."""
    value = _parsed(value)
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
