"""Samples above the caption: conversations and documents, with any number of images.

A sample is ``messages``, a list of ``{role, content}`` as of OpenAI and Hugging Face, where a content is a text or a
list of parts, ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. Answers (role ``assistant``) are learned
with their end of turn, unless they have ``weight: 0``; what the other ``ROLES`` say is not. One message of the role
``document`` is text and images as they follow each other: no template is needed, and all of its text is learned.
"""

import struct
from collections.abc import Sequence
from typing import Any

from composer_prior.data.messages import short

ANSWER, DOCUMENT = "assistant", "document"
ROLES = ("system", "developer", "user", ANSWER, "tool")  # of a conversation


class ChatError(ValueError):
    """A conversation that cannot be used, or a chat template that cannot write one; details stand behind a colon."""


def pack_images(images: Sequence[bytes]) -> bytes:
    """Return encoded images as one value of the column ``images``: their number and sizes (uint32), then the bytes."""
    return struct.pack(f"<{len(images) + 1}I", len(images), *map(len, images)) + b"".join(images)


def unpack_images(data: bytes) -> list[bytes]:
    """Return the encoded images of :func:`pack_images`; raise ChatError for other bytes."""
    count = int.from_bytes(data[:4], "little")
    start = 4 * (count + 1)
    sizes = struct.unpack(f"<{count}I", data[4:start]) if 4 <= start <= len(data) else ()
    if len(sizes) != count or start + sum(sizes) != len(data):
        raise ChatError("the column images does not hold its images' sizes and bytes")
    found = []
    for size in sizes:
        found.append(data[start : start + size])
        start += size
    return found


def message(role: str, text: str, image: bool = False) -> dict[str, Any]:
    """Return a message of one text, behind an image where there is one; an empty text is left out."""
    parts: list[dict[str, str]] = [{"type": "image"}] * image
    return {"role": role, "content": parts + [{"type": "text", "text": text}] * bool(text)}


def checked(messages: Any) -> list[dict[str, Any]]:
    """Return messages of role, content (a list of parts) and weight, without other keys.

    Raises:
        ChatError: for what is no conversation to learn.
    """
    if not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
        raise ChatError("messages is not a list of roles and contents")
    kept = [{key: one[key] for key in ("role", "weight") if one.get(key) is not None} for one in messages]
    found = [{**one, "content": _parts(given.get("content"))} for one, given in zip(kept, messages, strict=True)]
    roles = [one.get("role") for one in found]
    for role in roles:
        if role not in (*ROLES, DOCUMENT):
            raise ChatError(f"a message has no known role: {short(repr(role))}, expected {', '.join(ROLES)}")
    for weight in (one.get("weight", 1) for one in found):
        if weight not in (0, 1):  # also false and true
            raise ChatError(f"a weight is neither 0 nor 1: {short(repr(weight))}")
    answers = [one for one in found if one["role"] in (ANSWER, DOCUMENT) and one.get("weight", 1)]
    if DOCUMENT in roles and len(roles) > 1:
        raise ChatError("a document is one message alone")
    if not answers:
        raise ChatError("no answer is learned")
    if not all(any(part.get("text", "").strip() for part in one["content"]) for one in answers):
        raise ChatError("the document has no text" if DOCUMENT in roles else "an answer is empty")
    return found


def _parts(content: Any) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise ChatError(f"the content of a message is neither a text nor a list of parts: {type(content).__name__}")
    found = list[dict[str, str]]()
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise unknown_part(part)
        found.append({"type": "image"} if kind == "image" else {"type": "text", "text": part["text"]})
    return found


def unknown_part(part: Any) -> ChatError:
    """Return the error for a part of a message that is neither a text nor an image."""
    about = f"{part!r} is no text"
    if isinstance(part, dict):
        about = f"of type {part.get('type')!r}, with the fields {', '.join(map(str, part))}"
    return ChatError(f"a part of a message is neither a text nor an image: {short(about)}")
