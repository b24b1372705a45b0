"""A file of captions beside a folder of images: JSONL, CSV, TSV, a JSON array (LLaVA's too), COCO; or of text alone."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from composer_prior.conversion.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    KEY_COLUMNS,
    SPANS,
    BadFile,
    Record,
    Rejected,
    Seen,
    Source,
    SourceError,
    SourceOptions,
    pick_columns,
)
from composer_prior.conversion.sources.files import beginning, kind_of
from composer_prior.conversion.sources.images import find_inside
from composer_prior.conversion.sources.lines import LINE_LIMIT, encoding_of, header_of, lines, open_text, rows
from composer_prior.conversion.sources.records import (
    chat_of,
    conversation_of,
    found_instead,
    image_of,
    record_of,
    value_of,
)
from composer_prior.data.files import MAX_JSON_BYTES, bounded, parse_json
from composer_prior.data.images import ImageError

_MOST_DIGITS = 4000
_UNIT_BYTES = 64 << 20  # of images within the list
_PADDING = re.compile(r"[ \t\r\n,]*")
_BEHIND = re.compile(r"[ \t\r\n,\]]")


@dataclass(frozen=True, kw_only=True)
class ListSource(Source):
    """A file that lists images by path: JSONL, CSV, TSV, a JSON array (LLaVA's too), COCO; or text files.

    Consecutive lines with the same image are the captions of one record. A damaged list cannot be opened.
    """

    files: tuple[Path, ...]  # one, or several of text

    @classmethod
    def open(cls, files: Sequence[Path], format: str, options: SourceOptions) -> "ListSource":
        for file in files:
            _check_text(file)
        folder = files[0].parent.resolve()
        source = cls(files=tuple(files), format=format, options=options, folder=folder, images=folder)
        records = [item for item in islice(source._entries(), 1000) if isinstance(item, Record)]
        names = [record.image for record in records[:20] if isinstance(record.image, str)]
        images = options.images_folder() or _images_folder(files[0], names)
        return replace(source, images=images, has_spans=any(record.spans is not None for record in records))

    def units(self) -> Iterator[tuple[Record | Rejected, ...]]:
        unit, size = list[Record | Rejected](), 0
        for item in _unique(_grouped(self._entries())):
            unit.append(item)
            images = (item.image, *item.images[1:]) if isinstance(item, Record) else ()
            size += sum(len(image) for image in images if isinstance(image, bytes))
            if len(unit) >= self.options.unit_samples or size >= _UNIT_BYTES:
                yield tuple(unit)
                unit, size = [], 0
        if unit:
            yield tuple(unit)

    def read(self, unit: tuple[Record | Rejected, ...]) -> Iterator[Record | Rejected]:
        return iter(unit)

    def _entries(self) -> Iterator[Record | Rejected]:
        readers = {"jsonl": _read_jsonl, "json": _read_json_array, "coco": _read_coco, "txt": _read_text}
        read = readers.get(self.format, _read_table)
        return chain.from_iterable(read(file, self.options) for file in self.files)


def _check_text(file: Path) -> None:
    """Raise SourceError for a file that is no text."""
    try:
        head, _ = beginning(file)
    except OSError as error:
        raise SourceError(f"{file}: it cannot be read ({error.strerror or error}).") from error
    problem = kind_of(head)
    if encoding_of(file) == "utf-8-sig" and b"\0" in head[:4]:
        problem = "UTF-16 without a byte order mark, or no text at all; save it as UTF-8"
    if problem:
        raise SourceError(f"{file}: {problem}.")


def _images_folder(file: Path, names: list[str]) -> Path:
    """Return the first likely folder that has an image."""
    # captions_train2017.json of COCO lies in annotations/, beside train2017/.
    split = file.stem.removeprefix("captions_")
    for here in dict.fromkeys((file.parent, file.resolve().parent)):
        for folder in (here, here / "images", here / split, here.parent / split, here.parent / "images"):
            root = folder.resolve()
            for name in names:
                with suppress(OSError, ValueError):
                    if os.path.exists(find_inside(root, name)):
                        return root
    return file.parent.resolve()


def _read_jsonl(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    for number, line in lines(path):
        where, key = f"{path.name}:{number}", f"line {number}"
        if line is None:
            yield Rejected(key, "line too long", where, f"at most {LINE_LIMIT} bytes are accepted")
            continue
        if not line.strip():
            continue
        try:
            entry = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Rejected(key, "invalid UTF-8", where, f"byte {error.start} of the line")
        except ValueError as error:
            yield Rejected(key, "malformed JSON", where, str(error)[:200])
        else:
            yield entry_record(entry, key, where, options)


def _read_table(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    delimiter, padded, chosen = _columns(path, options)
    header = [cell.strip() for cell in padded]
    images = header.index(chosen.image_column) if chosen.image_column in header else 0  # text alone has none
    for number, row, quotes in rows(path, delimiter, len(header), images):
        where, key = f"{path.name}:{number}", f"line {number}"
        if row is None:
            yield Rejected(key, "line too long", where, f"at most {LINE_LIMIT} bytes are accepted")
            continue
        if len(row) != len(header):
            detail = f"{len(row)} cells where the header has {len(header)}" + (f", {quotes}" if quotes else "")
            yield Rejected(key, "malformed row", where, detail)
            continue
        entry: dict[str, Any] = dict(zip(header, row if header == padded else map(str.strip, row), strict=True))
        if SPANS in entry:
            try:
                entry[SPANS] = parse_json(entry[SPANS] or "null")
            except ValueError:
                yield Rejected(key, "bad spans", where, "not JSON")
                continue
        yield entry_record(entry, key, where, chosen)


def _columns(path: Path, options: SourceOptions) -> tuple[str, list[str], SourceOptions]:
    """Return a table's delimiter, the cells of its first line, and the options with its columns."""
    usual = "\t,;|" if path.suffix.lower() == ".tsv" or options.form == "tsv" else ",;\t|"
    problems: list[tuple[bool, SourceError]] = []
    for delimiter in usual:
        cells = header_of(path, delimiter)
        header, where = [cell.strip() for cell in cells], f"{path.name}, whose first line has to name the columns"
        try:
            image, caption = pick_columns(header, options, where)
            return delimiter, cells, replace(options, image_column=image, caption_column=caption)
        except SourceError as error:
            problems.append((len(cells) > 1, error))
    raise max(problems, key=lambda problem: problem[0])[1]


def _read_json_array(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    for number, entry in enumerate(_json_array(path)):
        where, key = f"{path.name}[{number}]", f"item {number}"
        try:
            yield entry if isinstance(entry, BadFile) else entry_record(bounded(entry), key, where, options)
        except ValueError as error:
            yield Rejected(key, "malformed JSON", where, str(error))


def _json_array(path: Path, chunk: int = 1 << 20) -> Iterator[Any]:
    """Yield the items of a JSON array, read in pieces, and a bad file if the array is truncated or text follows it.

    The bad file counts the items of mean size that fit into the rest.
    """

    def bad(detail: str) -> "BadFile":
        read = file.buffer.tell() - len(buffer) + position  # type: ignore[attr-defined]
        count = max(1, round((path.stat().st_size - read) * number / max(1, read)))
        return BadFile(path.name, "malformed JSON", path.name, detail, count, estimated=True)

    # Python refuses to read an integer of more digits.
    decoder = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < _MOST_DIGITS else None)
    number = position = 0
    with open_text(path) as file:
        buffer = file.read(chunk).lstrip().removeprefix("[")
        while True:
            position = _PADDING.match(buffer, position).end()  # type: ignore[union-attr]
            if buffer.startswith("]", position):
                more = buffer[position + 1 :].strip()
                while not more and (buffer := file.read(chunk)):
                    more, position = buffer.strip(), 0
                if more:
                    yield bad(f"text behind the end of the array, which has {number} items")
                return
            try:
                item, end = decoder.raw_decode(buffer, position)
                whole = isinstance(item, dict) or _BEHIND.match(buffer, end) is not None  # a number may go on
            except (json.JSONDecodeError, RecursionError):
                whole = False
            if not whole:
                held = len(buffer) - position
                more = file.read(max(chunk, held)) if held < LINE_LIMIT else ""
                if not more:
                    yield bad(f"malformed or cut in item {number}")
                    return
                buffer, position = buffer[position:] + more, 0
                continue
            yield item
            position = end
            number += 1


def _read_text(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    """Yield a document for each block of lines between blank ones."""
    block, first, size = list[bytes](), 0, 0
    for number, line in chain(lines(path), [(0, b"")]):
        if line is None or line.strip():
            first, size = first or number, size + (LINE_LIMIT if line is None else len(line))
            block += [line] if line is not None and size < LINE_LIMIT else []
        elif first:
            where, key = f"{path.name}:{first}", f"line {first}"
            if size < LINE_LIMIT:
                text = b"".join(block).decode("utf-8", "surrogateescape").replace("\r\n", "\n").strip("\n")
                yield conversation_of(None, [text], key, where, str(options.learn))
            else:
                yield Rejected(key, "block too long", where, f"less than {LINE_LIMIT} bytes are accepted")
            block, first, size = [], 0, 0


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError or TypeError for another one."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are accepted")
    with open_text(path) as file:
        return {**parse_json(file.read())}


def _read_textvqa(path: Path, data: dict[str, Any], options: SourceOptions) -> Iterator[Record | Rejected]:
    for number, one in enumerate(data["data"]):
        known = isinstance(one, dict) and "question_id" in one
        entry = {"id": one["question_id"], "image": f"{one.get('image_id')}.jpg", **one} if known else one
        yield entry_record(entry, str(number), f"{path.name}:data[{number}]", options)


def _read_vqa(path: Path, data: dict[str, Any], options: SourceOptions) -> Iterator[Record | Rejected]:
    """Yield the questions of a file with the answers of the file of annotations beside it."""
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    try:
        answers = {one["question_id"]: one for one in _read_object(beside)["annotations"]}
        questions = [
            (one["question_id"], one["image_id"], one["question"], answers.get(one["question_id"], {}))
            for one in data["questions"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: not questions of VQA, which need 'questions' (question_id, image_id, question) and, in "
            f"{beside.name}, 'annotations' (question_id, multiple_choice_answer): {type(error).__name__} {error}."
        ) from error
    for number, (question_id, image_id, question, answer) in enumerate(questions):
        image = f"COCO_{data.get('data_subtype')}_{image_id!s:0>12}.jpg"
        entry = {**answer, "id": question_id, "image": image, "question": question}
        yield entry_record(entry, str(question_id), f"{path.name}:questions[{number}]", options)


def _read_coco(path: Path, options: SourceOptions) -> Iterator[Record | Rejected]:
    try:
        data = _read_object(path)
        is_textvqa = "images" not in data and isinstance(data.get("data"), list)
        questions = _read_vqa if "questions" in data else _read_textvqa if is_textvqa else None
        images, annotations = ((), ()) if questions else (data["images"], data["annotations"])
        by_image: dict[Any, list[dict[str, Any]]] = {}
        for annotation in annotations:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        entries = [(image["id"], image["file_name"]) for image in images]
        known = {image_id for image_id, _ in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: not COCO captions, which need 'images' (id, file_name) and 'annotations' (image_id, caption): "
            f"{type(error).__name__} {error}."
        ) from error
    if questions:
        if options.learn is None:
            raise SourceError(f"{path}: questions are no captions of images; convert them with learn=answers.")
        yield from questions(path, data, options)
    name = options.caption_column or "caption"
    for number, (image_id, file_name) in enumerate(entries):
        where = f"{path.name}:images[{number}]"
        found = by_image.pop(image_id, [])
        try:
            if not isinstance(file_name, str):
                raise ImageError("missing image", "file_name is not text")
            image = image_of(file_name) or ""
        except ImageError as error:
            yield Rejected(str(image_id), error.reason, where, error.detail, max(1, len(found)))
            continue
        captions = tuple(annotation.get(name) for annotation in found)
        if options.learn is not None:
            for place, caption in enumerate(captions or (None,)):
                yield conversation_of(image, caption, f"{image_id}#{place}", where, options.learn, explicit=True)
            continue
        spans = tuple(a.get(SPANS) for a in found) if any(SPANS in a for a in found) else None
        yield Record(str(image_id), image, captions, where, spans, explicit=True)
    for image_id, orphans in by_image.items():
        if image_id not in known:
            for orphan in orphans:
                key = str(orphan.get("id", image_id))
                yield Rejected(key, "unknown image id", f"{path.name}:annotations", f"image_id {image_id!r}")


def entry_record(entry: Any, key: str, where: str, options: SourceOptions) -> Record | Rejected:
    """Return the record of one JSON object or row of a table; without an id, its key is its image's path."""
    if not isinstance(entry, dict):
        return Rejected(key, "malformed record", where, "not an object")
    given = value_of(entry, options.key_column, KEY_COLUMNS)
    name = str(given) if isinstance(given, (str, int)) and str(given) else None
    if options.learn is not None:
        return chat_of(entry, name or key, where, options, name is not None)
    image = value_of(entry, options.image_column, IMAGE_COLUMNS)
    caption = value_of(entry, options.caption_column, CAPTION_COLUMNS)
    key = name or (image if isinstance(image, str) and 0 < len(image) < 256 and image[:5] != "data:" else key)
    record = record_of(image, caption, entry.get(SPANS), key, where, name is not None, SPANS in entry)
    if isinstance(record, Record):
        lacks_text = not record.captions and found_instead(entry, options.caption_column, CAPTION_COLUMNS)
        return replace(record, note=lacks_text) if lacks_text else record
    lacks_image = record.reason == "missing image" and found_instead(entry, options.image_column, IMAGE_COLUMNS)
    return replace(record, detail=lacks_image) if lacks_image else record


def _grouped(entries: Iterable[Record | Rejected]) -> Iterator[Record | Rejected]:
    """Join neighbouring records of the same key and image into one record with all their captions."""

    def same(item: Record | Rejected) -> Any:
        return (item.key, item.image) if isinstance(item, Record) and item.messages is None else object()

    for _, group in groupby(entries, same):
        items: list[Any] = list(group)
        first = items[0]
        if len(items) == 1:
            yield first
            continue
        records: list[Record] = []
        for item in items:
            if first.explicit and any(item.captions == record.captions for record in records):
                same_caption, count = "with the same caption", max(1, len(item.captions))
                yield Rejected(item.key, "duplicate key", item.where, same_caption, count)
            else:
                records.append(item)
        captions = tuple(caption for record in records for caption in (record.captions or (None,)))
        spans: Any = tuple(span for r in records for span in (r.spans or (None,) * max(len(r.captions), 1)))
        spans = spans if any(r.spans is not None for r in records) else None
        yield replace(first, captions=captions, spans=spans, further=sum(record.further for record in records))


def _unique(items: Iterable[Record | Rejected]) -> Iterator[Record | Rejected]:
    """Reject repeated ids or, in a source without ids, repeated pairs of image and caption."""
    seen = Seen()
    for item in items:
        if isinstance(item, Record) and item.messages is not None:  # LLaVA's have one id for several about an image
            new = seen.add(item.key if item.explicit else "", item.messages, item.images)
            yield item if new else Rejected(item.key, "duplicate key", item.where, "with the same messages")
        elif isinstance(item, Rejected) or (item.explicit and seen.add(item.key)):
            yield item
        elif item.explicit:
            yield Rejected(item.key, "duplicate key", item.where, count=max(1, len(item.captions)))
        else:
            kept = [index for index, caption in enumerate(item.captions) if seen.add(item.image, caption)]
            for _ in range(len(item.captions) - len(kept)):
                yield Rejected(item.key, "duplicate key", item.where, "this image had this caption before")
            if len(kept) == len(item.captions):
                yield item
            elif kept:
                spans = None if item.spans is None else tuple(item.spans[index] for index in kept)
                yield replace(item, captions=tuple(item.captions[index] for index in kept), spans=spans)
