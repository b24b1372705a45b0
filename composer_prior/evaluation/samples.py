"""Samples of benchmarks from files: files read or refused in one line, unusable entries, images, and categories."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from PIL import Image

from composer_prior.conversion.sources.images import find_inside, normal_form
from composer_prior.data.files import MAX_JSON_BYTES, parse_json, read_plain
from composer_prior.data.images import ImageError, check_image, decode_rgb, image_in_text, read_image_file
from composer_prior.data.messages import DataError, announce, one_line, short

T = TypeVar("T")


class Unusable(ValueError):
    """Raised for an entry that no sample can be made of.

    The reason is a short fixed phrase that follows a number of entries, such as ``without a caption``; the detail says
    what exactly is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason = reason


def usable(data: str, entries: Iterable[tuple[str, Any]], make: Callable[[Any], T]) -> list[T]:
    """Make samples of entries; a line says how many are left out, why, and names the first.

    The entries of ``data`` come with their places, such as ``file.json, line 3``.

    Raises:
        DataError: if no entry is usable.
    """
    made: list[T] = []
    reasons: Counter[str] = Counter()
    first = ""
    for place, entry in entries:
        try:
            made.append(make(entry))
        except Unusable as error:
            reasons[error.reason] += 1
            first = first or f"{place}: {one_line(error)}"
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            reasons["malformed"] += 1
            first = first or f"{place}: {type(error).__name__}, {one_line(error)}"
    total = len(made) + reasons.total()
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if not made:
        raise DataError(
            f"{data}: none of its {total} entries can be used ({why}); {first}." if total else f"{data} is empty."
        )
    if reasons:
        announce(f"{data}: {reasons.total()} of {total} entries are left out ({why}); the first is {first}.")
    return made


def value(entry: Any, *names: str) -> Any:
    """Return the value of the first of these keys that an entry has; raise :class:`Unusable` without one."""
    for name in names:
        found = entry.get(name) if isinstance(entry, Mapping) else None
        if found is not None and found != "" and found != []:
            return found
    raise Unusable(f"without {names[0]}", f"it has no {' or '.join(names)}")


def text(entry: Any, *names: str) -> str:
    """Return the text of the first of these keys that an entry has; raise :class:`Unusable` without one."""
    found = value(entry, *names)
    if not isinstance(found, str) or not found.strip():
        raise Unusable(f"without {names[0]}", f"its {names[0]} is {short(repr(found))}, not a text")
    return found


def data_files(data: str) -> list[Path]:
    """Return the JSON files of ``data=``: one, or those of a folder; raise a DataError if there is none."""
    path = Path(data).expanduser()
    files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(f"data={data}: there is no such file{'' if files else ' (*.json, *.jsonl) in that folder'}.")
    return files


def read_json(file: Path) -> Any:
    """Read JSON, or JSON Lines as a list, whatever the name of the file; a DataError names file and line."""
    try:
        written = read_plain(file, MAX_JSON_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error
    try:
        return parse_json(written)
    except ValueError as error:
        whole = error
    found = []
    for number, line in enumerate(written.split("\n"), start=1):
        try:
            if line.strip():
                found.append(parse_json(line))
        except ValueError as error:
            wrong = error if found else whole
            place = f"line {number}" if found else "it"
            raise DataError(f"{file}: {place} is no JSON ({one_line(wrong)}); repair or remove it.") from error
    if not found:
        raise DataError(f"{file} is empty.")
    return found


def numbered(file: Path, content: Any) -> list[tuple[str, Any]]:
    """Return the entries of a list or of an object, each with its place."""
    if isinstance(content, Mapping):
        return [(f"{file.name}, {key}", entry) for key, entry in content.items()]
    return [(f"{file.name}, entry {number}", entry) for number, entry in enumerate(content, start=1)]


class ImageFolder:
    """Images by name, in a folder or in one of the folders below it.

    No name leads out of the folder, except through a link inside it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"images={folder}: there is no such folder.")
        self._root = self.folder.resolve()

    def find(self, *names: str) -> Path | bytes:
        """Return the file of an image with one of these names, or the image itself if the name is its base64.

        Raise :class:`Unusable` if there is none, or a name stands for several files.
        """
        try:
            if (embedded := image_in_text(names[0])) is not None:
                check_image(embedded)
                return embedded
        except ImageError as error:
            raise Unusable("without their image", f"{short(names[0], 40)}: {error}") from error
        problem = f"there is no {short(names[0])} in {self.folder}"
        for name in names:
            try:
                if (file := self._file(name)) is not None:
                    return file
            except ImageError as error:
                problem = f"{short(name)}: {error}"
        for name in names:
            found = self._below.get(normal_form(os.path.basename(name)), [])
            if len(found) > 1:
                raise Unusable("with a name of several images", f"{name} is both {found[0]} and {found[1]}")
            with suppress(ImageError):
                if found and self._file(str(found[0].relative_to(self.folder))) is not None:
                    return found[0]
        raise Unusable("without their image", problem)

    def _file(self, name: str) -> Path | None:
        plain = os.path.normpath(os.path.join(self._root, name))
        below = plain.startswith(os.path.join(self._root, ""))  # a link there is the user's own, and followed
        place = plain if below and os.path.exists(plain) else find_inside(self._root, name)
        if os.path.exists(place) and not os.path.isfile(place):
            raise ImageError("not a regular file")
        return Path(place) if os.path.exists(place) else None

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for folder, folders, files in os.walk(self.folder):
            folders.sort()
            for name in files:
                found[normal_form(name)].append(Path(folder, name))
        return found


def load_image(image: Path | bytes) -> Image.Image:
    """Load an image as RGB, from its file or its bytes; a DataError names it."""
    try:
        return decode_rgb(image if isinstance(image, bytes) else read_image_file(image))
    except ImageError as error:
        name = image_name(image) if isinstance(image, bytes) else image
        raise DataError(f"{name} cannot be read: {one_line(error)}; replace it or take its entry out.") from error


def other_images(images: Sequence[Any]) -> list[int]:
    """Return for each sample another with another image, half of all samples away; itself if there is none."""
    count = len(images)
    if len(set(images)) < 2:
        return list(range(count))
    found = []
    for number, image in enumerate(images):
        other = (number + max(1, count // 2)) % count
        while images[other] == image:
            other = (other + 1) % count
        found.append(other)
    return found


def digest(*parts: Any) -> str:
    """Return a short text that differs if the parts do."""
    return xxhash.xxh64(repr(parts).encode()).hexdigest()


def image_name(image: Path | bytes, name: str = "") -> str:
    """Return a name of an image, by default that of its file; a digest if it has none."""
    return f"image {xxhash.xxh64(image).hexdigest()}" if isinstance(image, bytes) else name or image.name


def file_size(image: Path | bytes) -> tuple[str, int]:
    """Return the name and size of an image, for a fingerprint."""
    return image_name(image), len(image) if isinstance(image, bytes) else image.stat().st_size


def with_category(counts: Mapping[str, float], category: str) -> dict[str, float]:
    """Return the counts of a sample for all samples and for its category (``name/category``)."""
    return {**counts, **({f"{name}/{category}": count for name, count in counts.items()} if category else {})}


def per_category(
    sums: Mapping[str, np.ndarray], figures: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the figures of all samples and of each category (``name/category``)."""
    groups: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, total in sums.items():
        name, _, category = key.partition("/")
        groups[category][name] = total
    return {
        f"{name}/{category}" if category else name: figure
        for category, group in groups.items()
        for name, figure in figures(group).items()
    }
