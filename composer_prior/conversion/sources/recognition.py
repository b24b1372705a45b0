"""The format of a source, from the names and beginnings of its files."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from composer_prior.conversion.sources.arrow import HFSource, ParquetSource
from composer_prior.conversion.sources.base import FORMATS, IMAGE_SUFFIXES, Source, SourceError, SourceOptions
from composer_prior.conversion.sources.images import normal_form
from composer_prior.conversion.sources.lines import open_text
from composer_prior.conversion.sources.lists import ListSource
from composer_prior.conversion.sources.tar import NEIGHBOURS, FolderSource, TarSource

_ACCEPTED = (
    "a folder with captions.jsonl, captions.csv, captions.tsv or captions.json, such a file itself, COCO captions or "
    "LLaVA JSON, images with a .txt, .caption or .json of the same name each, .tar shards, .parquet files, or a "
    "Hugging Face dataset saved to disk; with learn=answers or all also conversations, documents and .txt files"
)
_LOOKED_AT = 1 << 16  # files, or characters
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), "webdataset"),
    ".parquet": "parquet",
}


def open_local(path: Path, options: SourceOptions) -> Source:
    """Recognise the format of a file or folder and open it; for errors see :func:`.open_source`."""
    path = path.expanduser().absolute()  # units may be read by processes with another working folder
    is_text = options.learn is not None and path.suffix.lower() == ".txt" and path.is_file()
    format, files = _recognise(path, options.form or ("txt" if is_text else None))
    root = path if path.is_dir() else path.parent
    if options.learn is not None and format in ("webdataset", "folder"):
        raise SourceError(
            f"{path}: learn={options.learn} reads jsonl, json, coco, csv, tsv, txt, parquet and hf, not {format}."
        )
    if options.learn is None and format == "txt":
        raise SourceError(f"{path}: text alone is no caption of an image; with learn=all it is converted to documents.")
    if format == "webdataset":
        return TarSource.open(root, files, options)
    if format == "parquet":
        return ParquetSource.open(root, files, options)
    if format == "folder":
        return FolderSource.open(path, files, options)
    if format == "hf":
        return HFSource.open(path, options)
    return ListSource.open(files, format, options)


def _suffix_format(path: Path) -> str | None:
    name = path.name.lower()
    return next((format for suffix, format in _SUFFIXES.items() if name.endswith(suffix)), None)


def _recognise(path: Path, wanted: str | None) -> tuple[str, list[Path]]:
    """Return the format of a source and the files that make it up."""
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder. Accepted: {_ACCEPTED}.")
    found = _folder_formats(path, wanted) if path.is_dir() else _file_formats(path)
    if wanted is not None:
        # A file is read in the wanted format, whatever its name; in a folder the format selects files.
        if not path.is_dir():
            return wanted, [path]
        found = {format: files for format, files in found.items() if format == wanted}
    if not found:
        raise SourceError(f"{path}: no {wanted or 'captions'} found here{_what_to_do(path)}. Accepted: {_ACCEPTED}.")
    if len(found) > 1:
        raise SourceError(f"{path}: ambiguous, it holds {', '.join(found)}: choose with form=, or name the file.")
    format, files = next(iter(found.items()))
    if format not in ("webdataset", "folder", "parquet", "hf", "txt") and len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        many = f"it holds {len(files)} {format} files ({names})"
        raise SourceError(f"{path}: ambiguous, {many}: name the one to convert.")
    return format, files


def _what_to_do(path: Path) -> str:
    """Return advice for files that are often given instead of a source."""
    if path.suffix.lower() == ".zip":
        return "; unpack it first"
    if not path.is_dir():
        return f"; if it has one of these formats, name it with form= ({', '.join(FORMATS)})"
    if any(file.suffix.lower() == ".zip" for file in islice(_files_below(path), _LOOKED_AT)):
        return "; unpack the .zip files first"
    return "; name the file that holds them, with form= where its suffix is unusual"


def _file_formats(path: Path) -> dict[str, list[Path]]:
    format = _suffix_format(path)
    format = _json_format(path) if format == "json" else format
    return {format: [path]} if format else {}


def _folder_formats(path: Path, wanted: str | None) -> dict[str, list[Path]]:
    names = {file.name for file in path.iterdir()}
    if {"dataset_dict.json"} & names or {"dataset_info.json", "state.json"} <= names:
        return {"hf": [path]}
    if "index.json" in names and any(name.endswith(".mds") for name in names):
        raise SourceError(f"{path}: this is an MDS data set already; train on it as it is. Accepted: {_ACCEPTED}.")
    named = [path / f"captions{suffix}" for suffix in _SUFFIXES if f"captions{suffix}" in names]
    if named:
        return _merge(_file_formats(file) for file in named)
    files = list(_files_below(path))
    if (archives := archives_of(files)) and wanted != "folder":
        return archives
    images, texts = (
        {normal_form(str(file.with_suffix(""))) for file in files if file.suffix.lower()[1:] in suffixes}
        for suffixes in (IMAGE_SUFFIXES, NEIGHBOURS)
    )
    pairs = images & texts
    others = (None, "webdataset", "parquet")
    top = (file for file in sorted(path.iterdir()) if file.is_file() and _suffix_format(file) not in others)
    lists = _merge(_file_formats(file) for file in top if normal_form(str(file.with_suffix(""))) not in pairs)
    # Beside images that mostly have texts, a JSON object is probably metadata that a program wrote about them.
    noted = not lists or (lists.keys() <= {"coco"} and 2 * len(pairs) > len(images))
    if pairs and (wanted == "folder" or (wanted is None and noted)):
        return {"folder": files}
    documents = sorted(file for file in path.glob("*.txt") if file.is_file() and not file.name.startswith("."))
    return {"txt": documents} if documents and not images and wanted in (None, "txt") and not lists else lists


def _files_below(path: Path) -> Iterator[Path]:
    """Yield all files of a folder that are not hidden; links to folders are followed, each real folder once."""
    seen = set[tuple[int, int]]()
    for folder, folders, files in os.walk(path, onerror=_refuse_folder, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise SourceError(f"{error.filename}: this folder cannot be read ({error.strerror}).") from error


def archives_of(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the tar shards and Parquet files among some files, in order, by format."""
    found = _merge(
        {format: [file]} for file in sorted(files) if (format := _suffix_format(file)) in ("webdataset", "parquet")
    )
    # img2dataset writes metadata beside each tar or folder, as 00000.parquet; they are not a second source.
    stems = {file.with_suffix("") for file in found.get("webdataset", [])}
    tables = [
        file
        for file in found.pop("parquet", [])
        if file.with_suffix("") not in stems and not (file.stem.isdigit() and file.with_suffix("").is_dir())
    ]
    return {**found, **({"parquet": tables} if tables else {})}


def _merge(formats: Iterable[dict[str, list[Path]]]) -> dict[str, list[Path]]:
    merged: dict[str, list[Path]] = {}
    for found in formats:
        for format, files in found.items():
            merged.setdefault(format, []).extend(files)
    return merged


def _json_format(path: Path) -> str | None:
    with open_text(path) as file:
        head = file.read(_LOOKED_AT).lstrip()
    first, _, more = head.partition("\n")
    if head.startswith("{") and more.strip():
        with suppress(ValueError, RecursionError):
            if json.loads(first):
                return "jsonl"
    return {"[": "json", "{": "coco"}.get(head[:1])
