"""Units of work: any process converts a unit to shards, and a small file records the result."""

import hashlib
import io
import json
import os
import platform
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_prior.conversion.options import ConversionError, ConversionOptions, size_in_bytes
from composer_prior.conversion.sources import SPANS, BadFile, Record, Rejected, Source, read_image
from composer_prior.conversion.sources.base import file_of
from composer_prior.data.conversations import pack_images
from composer_prior.data.images import ImageError, check_image, reencode_image
from composer_prior.data.mds import ShardWriter
from composer_prior.data.messages import short
from composer_prior.data.remote import Output

Result = dict[str, Any]  # the content of the unit's file
Units = Iterator[tuple[int, Any]]  # numbers and units
Results = Generator[tuple[int, Result], None, None]  # numbers and results, in any order

BAD_FILE_HINT = "mend the source, or leave them out with on_bad_file=skip"
_IMAGES_AT_ONCE = 16  # of the largest size, in one record
_LARGEST = 2**31  # bytes of them together: MDS has offsets of 32 bits


@dataclass(frozen=True)
class Task:
    """The source, output and options with which a process converts any unit."""

    source: Source
    output: Output
    options: ConversionOptions
    buffer: io.BytesIO = field(default_factory=io.BytesIO)

    @property
    def columns(self) -> dict[str, str]:
        if self.options.learn is not None:
            return {"images": "bytes", "messages": "json"}
        captions = {"caption": "str"} if self.options.captions == "all" else {"captions": "json"}
        return {"image": "bytes", **captions, **({SPANS: "json"} if self.source.has_spans else {})}


def json_line(value: Any) -> bytes:
    """Return a value as one line of JSON."""
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def unit_file(state: Path, number: int) -> Path:
    """Return the file that records a finished unit."""
    return state / "units" / f"{number:08}.json"


def digest(unit: Any) -> str:
    """Return a digest that changes with the unit."""
    return hashlib.blake2b(repr(unit).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def scratch(output: Output) -> Path:
    """Create this process's folder for unfinished files; processes of other nodes may have the same number."""
    folder = output.state / f"tmp{os.getpid()}@{platform.node()}"
    # The state folder of a local output exists on every node that sees the output; that of a remote may be missing.
    folder.mkdir(parents=output.folder is None, exist_ok=True)
    return folder


def convert_unit(task: Task, number: int, unit: Any) -> Result:
    """Convert one unit of work, write its shards to the output, and return the content of its unit file."""
    folder = scratch(task.output)
    size_limit = size_in_bytes(task.options.size_limit) or 0
    writer = ShardWriter(folder, f"shard.{number:06}", task.columns, size_limit, task.buffer)
    rejected: list[Rejected] = []
    read = captions = samples = further = 0
    for item in task.source.read(unit):
        if isinstance(item, BadFile) and task.options.on_bad_file == "raise":
            raise ConversionError(f"{item.where} cannot be read, or not to its end: {item.detail}; {BAD_FILE_HINT}.")
        kept, problems = _convert(item, task)
        for sample in kept:
            writer.write(sample)
        rejected += problems
        written = sum(len(sample.get("captions", [None])) for sample in kept)
        read += written + sum(problem.count or 0 for problem in problems)
        captions += written
        samples += len(kept)
        further += item.further if kept and isinstance(item, Record) else 0
    writer.finish()
    task.output.publish(folder, [shard["raw_data"]["basename"] for shard in writer.shards])
    return {
        "unit": digest(unit),
        "file": file_of(unit),
        "read": read,
        "captions": captions,
        "samples": samples,
        "further": further,
        "shards": writer.shards,
        "rejected": [_line(problem) for problem in rejected],
        "cut": any(isinstance(problem, BadFile) for problem in rejected),
    }


def _line(problem: Rejected) -> dict[str, Any]:
    """Return the line of a rejection, with its number of captions if that is not 1."""
    line: dict[str, Any] = {
        "id": short(problem.key),
        "reason": problem.reason,
        "source": short(problem.where, 5000),
        "detail": short(problem.detail, 1000),
    }
    if problem.count != 1 or problem.estimated:
        line.update(captions=problem.count, estimated=problem.estimated)
    return line


def _convert(item: Record | Rejected, task: Task) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """Return the samples of one record, and its rejections."""
    if isinstance(item, Rejected):
        return [], [item]
    if item.messages is not None:
        return _convert_messages(item, task)
    options = task.options
    several = len(item.captions) > 1
    keys = [f"{item.key}#{index}" if several else item.key for index in range(max(1, len(item.captions)))]
    try:
        image = _image(item.image, task)
    except ImageError as error:
        return [], [Rejected(key, error.reason, item.where, error.detail) for key in keys]
    if not item.captions:
        return [], [Rejected(item.key, "missing caption", item.where, item.note)]
    spans = item.spans if item.spans is not None else (None,) * len(item.captions)
    kept, problems = [], []
    for key, caption, span in zip(keys, item.captions, spans, strict=True):
        problem = _caption_problem(caption, options.max_caption_chars)
        if problem is None:
            problem = _spans_problem(span, caption, task.source.has_spans)
        if problem is not None:
            problems.append(Rejected(key, problem[0], item.where, problem[1]))
        else:
            kept.append((caption, span))
    if options.captions == "all":
        samples = [{"image": image, "caption": caption, SPANS: span} for caption, span in kept]
    else:
        samples = [{"image": image, "captions": [c for c, _ in kept], SPANS: [s for _, s in kept]}] if kept else []
    return samples, problems


def _convert_messages(item: Record, task: Task) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """Return the sample of a conversation or document, or its rejection."""
    images, size, most = list[bytes](), 0, min(_IMAGES_AT_ONCE * task.options.max_image_bytes, _LARGEST)
    try:
        for image in item.images:
            images.append(_image(image, task))
            size += len(images[-1])
            if size > most:
                raise ImageError("images too large", f"more than {most} bytes together")
    except ImageError as error:
        return [], [Rejected(item.key, error.reason, item.where, error.detail)]
    texts = (part["text"] for message in item.messages for part in message["content"] if part["type"] == "text")
    problems = (_caption_problem(text, task.options.max_caption_chars) for text in texts if text.strip())
    if problem := next(filter(None, problems), None):
        return [], [Rejected(item.key, problem[0], item.where, problem[1])]
    return [{"images": pack_images(images), "messages": item.messages}], []


def _image(image: bytes | str, task: Task) -> bytes:
    """Return the bytes of an image, read, checked and encoded anew as the options say, or raise ImageError."""
    options = task.options
    if isinstance(image, str):
        image = read_image(task.source.images, image, options.max_image_bytes, task.source.folder)
    elif len(image) > options.max_image_bytes:
        raise ImageError("image too large", f"{len(image)} bytes")
    if options.resize is not None or options.reencode is not None:
        return reencode_image(image, options.resize, options.reencode)
    check_image(image, options.check)
    return image


def _caption_problem(caption: Any, limit: int) -> tuple[str, str] | None:
    if caption is None:
        return "missing caption", ""
    if not isinstance(caption, str):
        return "caption is not text", type(caption).__name__
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        return "invalid UTF-8", f"character {error.start} of the caption"
    if not caption.strip():
        return "empty caption", ""
    if len(caption) > limit:
        return "caption too long", f"{len(caption)} characters, at most {limit} are accepted"
    return None


def _spans_problem(spans: Any, caption: str, expected: bool) -> tuple[str, str] | None:
    if spans is None:
        return None
    if not expected:
        return "unexpected spans", f"the first records of the source have no {SPANS}"
    try:
        sound = all(0 <= start < end <= len(caption) and type(start) is type(end) is int for start, end in spans)
    except (TypeError, ValueError):
        sound = False
    return None if sound else ("bad spans", f"{SPANS} must be [start, end) characters of the caption")
