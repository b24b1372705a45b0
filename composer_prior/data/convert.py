"""Turns image-caption pairs of any usual form into an MDS data set, in parallel and resumably.

A source is cut into fixed units of work. Each unit becomes its own shards, in any process; when they are in place, one
small file, written atomically, says so. ``index.json`` is put together from these files and written last. So the output
is a function of the source and the options alone: not of the number of processes, nor of how often the conversion was
killed and started again, and what has no index is not whole.

    OUT/index.json                      the data set, written last
    OUT/shard.<unit>.<number>.mds
    OUT/rejected.jsonl                  one line for each rejected sample: id, reason, source, detail
    OUT/conversion.json                 the options and the summary
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tqdm import tqdm

from composer_prior.data.image_bytes import ImageError, check_image, reencode_image
from composer_prior.data.mds_shard import ShardWriter
from composer_prior.data.sources import (
    SPANS,
    BadFile,
    Record,
    Rejected,
    RejectedImage,
    Source,
    SourceError,
    SourceOptions,
    describe,
    expect_number,
    file_of,
    is_remote,
    open_source,
    read_image,
)
from composer_prior.data.terminal import say

__all__ = ["ConversionError", "ConversionOptions", "ConversionSummary", "convert_captions"]

REMOTES = ("s3", "gs", "oci", "azure", "azure-dl", "hf", "dbfs", "alipan")
_VERSION = 2
_WHAT_TO_DO = "mend the source, or leave them out with on_bad_file=skip"
_LOCK_ATTEMPTS = 30
_REPORT_EVERY = 32
_WITHOUT_EFFECT_ON_OUTPUT = (
    *("processes", "max_rejected", "on_bad_file", "progress", "work"),
    *("upload_attempts", "download_timeout"),
)


class ConversionError(RuntimeError):
    """A conversion that cannot start, cannot go on, or rejected too much."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(SourceOptions):
    """How to convert; the fields of :class:`SourceOptions` say how to read.

    Args:
        captions: what becomes of several captions of one image. ``"all"``: one sample each, in the column ``caption``.
            ``"sample"``: one sample with all of them, in the column ``captions``, of which the loader draws one in each
            epoch.
        max_caption_chars: longer captions are rejected.
        check: ``"structure"`` or ``"full"``, see :func:`composer_prior.data.image_bytes.check_image`.
        resize: shrink images to this longest side. Images pass through unchanged by default.
        reencode: ``"jpeg"``, ``"png"`` or ``"webp"``, with an optional quality as in ``"jpeg:90"``.
        size_limit: the largest shard, in bytes or as in ``"64mb"``.
        max_rejected: the largest share of the captions read that may be rejected.
        on_bad_file: what becomes of a file that cannot be read, or not to its end: an empty one, a Git LFS pointer, one
            that was cut. ``"raise"``: an error that names it. ``"skip"``: it is left out, what was read of it is kept,
            and what it held counts as rejected: what its footer says, or else what the readable files hold on average.
            Samples that are damaged within a file that goes on behind them are rejected one by one in any case.
        processes: how many processes; one per CPU by default. The output does not depend on it.
        progress: show a progress bar; by default where standard error is a terminal.
        work: where a conversion to a remote keeps its state, in order to be resumed. By default a folder of the user's
            cache, named after the remote.
        upload_attempts: how often an upload is tried, with 1, 2, 4 … s between.
    """

    captions: str = "all"
    max_caption_chars: int = 32_768
    check: str = "structure"
    resize: int | None = None
    reencode: str | None = None
    size_limit: int | str = 64 << 20
    max_rejected: float = 0.1
    on_bad_file: str = "raise"
    processes: int | None = None
    progress: bool | None = None
    work: str | None = None
    upload_attempts: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect("captions", self.captions, self.captions in ("all", "sample"), "all or sample")
        _expect("check", self.check, self.check in ("structure", "full"), "structure or full")
        _expect("max_rejected", self.max_rejected, _number(self.max_rejected) and 0 <= self.max_rejected <= 1, "0 to 1")
        _expect("on_bad_file", self.on_bad_file, self.on_bad_file in ("raise", "skip"), "raise or skip")
        _expect("progress", self.progress, self.progress in (None, True, False), "true or false")
        self._as_text("work")
        for name in ("max_caption_chars", "upload_attempts", "resize", "processes"):
            if getattr(self, name) is not None or name not in ("resize", "processes"):
                expect_number(name, getattr(self, name), 1)
        known = self.reencode is None or re.fullmatch(r"png|(jpeg|webp)(:([1-9]\d?|100))?", str(self.reencode))
        _expect("reencode", self.reencode, bool(known), "jpeg, png or webp, with a quality as in jpeg:90")
        size = _bytes(self.size_limit)
        _expect("size_limit", self.size_limit, size is not None and 0 < size < 1 << 32, "below 4gb, as in 64mb")

    @property
    def settings(self) -> dict[str, Any]:
        """What the output depends on."""
        settings = {**asdict(self), "size_limit": _bytes(self.size_limit), "version": _VERSION}
        return {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT_ON_OUTPUT}


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did. ``read = captions + rejected``, where an image without any caption reads as one.

    Args:
        read: captions read.
        captions: captions written.
        samples: samples written; as many as captions, unless several captions share a sample.
        rejected: captions rejected; each has a line in ``rejected.jsonl``, or shares that of the file it was lost with.
        estimated: how many of them are an estimate, because nobody knows what a file held that cannot be read.
        ignored: members of archives that are no samples; they have a line, and do not count.
        reasons: how many of them for which reason, the most frequent first.
        shards: shard files written.
        bytes: their size.
    """

    read: int = 0
    captions: int = 0
    samples: int = 0
    rejected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    estimated: int = 0
    ignored: int = 0

    def __str__(self) -> str:
        reasons = "".join(f"\n  {count:>9,} {reason}" for reason, count in self.reasons.items())
        share = f"{self.rejected / self.read:.2%}" if self.read else "none"
        share += f", {self.estimated:,} of them estimated from what the readable files hold" if self.estimated else ""
        if self.ignored:
            reasons += f"\n  {self.ignored:>9,} members of archives that are no samples, not counted"
        return (
            f"{self.read:,} captions read, {self.captions:,} written as {self.samples:,} samples in {self.shards:,} "
            f"shards ({self.bytes / 1e6:,.1f} MB), {self.rejected:,} rejected ({share}){reasons}"
        )


def convert_captions(
    source: str | Path, out: str | Path, options: ConversionOptions | None = None, **overrides: Any
) -> ConversionSummary:
    """Converts image-caption pairs into an MDS data set.

    The columns are ``image`` (bytes), ``caption`` (str) or ``captions`` (json, a list), and, where the source has it,
    ``image_related_spans`` (json: ``[start, end)`` character spans of the caption, or one such list for each caption;
    ``null`` for a caption without). Killed and called again, it goes on where it was. Called again when it is complete,
    it returns the summary and does nothing.

    Args:
        source: a file, folder or remote, see :func:`composer_prior.data.sources.open_source`.
        out: a folder, or a remote (``s3://``, ``gs://``, ``oci://``, ``azure://``, ``hf://`` …). Credentials come from
            the environment, as everywhere in streaming.
        options: how to read and convert.
        overrides: fields of :class:`ConversionOptions`.

    Returns:
        What was read, written and rejected.

    Raises:
        SourceError: the source has an unknown or ambiguous form, or cannot be read at all.
        ConversionError: ``out`` holds something else, too many samples were rejected (``rejected.jsonl`` is in place,
            and there is no index), a process died, or an upload failed for good.
    """
    options = replace(options or ConversionOptions(), **overrides)
    opened = open_source(source, **{f.name: getattr(options, f.name) for f in dataclasses.fields(SourceOptions)})
    place_of_source = str(source).rstrip("/") if is_remote(source) else os.path.realpath(Path(source).expanduser())
    identity = hashlib.blake2b(place_of_source.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    settings = {**options.settings, "form": opened.form, "source": identity}
    place = _place(str(out), options)
    with _locked(place):
        complete = _begin(place, settings)
        if complete is not None:
            shutil.rmtree(place.state, ignore_errors=True)
            return complete
        if options.on_bad_file == "raise":
            _refuse_bad_files(source, opened, place)
        units = _run(opened, place, options)
        return _finish(place, settings, units, options.max_rejected)


def _refuse_bad_files(source: str | Path, opened: Source, place: Place) -> None:
    """An error that names the files that cannot be read, before any other is."""
    bad = list(opened.bad_files())
    if not bad:
        return
    if not any((place.state / "units").iterdir()):
        shutil.rmtree(place.state, ignore_errors=True)
    files = "a file" if len(bad) == 1 else f"{len(bad)} files"
    raise SourceError(f"{source}: {files} cannot be read: {describe(bad)}; {_WHAT_TO_DO}.")


# places and state -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the output goes, and where the state is kept until it is complete.

    Args:
        out: a local folder, or ``None``.
        remote: the address of a remote, or ``None``.
        state: a local folder.
        attempts: how often an upload is tried.
    """

    out: Path | None
    remote: str | None
    state: Path
    attempts: int = 1

    @property
    def label(self) -> str:
        return self.remote or str(self.out)

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Moves finished files from a local folder to where the output goes."""
        if self.out is not None:
            for name in names:
                os.replace(folder / name, self.out / name)
            return
        for name in names:
            try:
                self.uploader(folder).upload_file(name)
            except Exception as error:
                raise ConversionError(
                    f"{self.remote}/{name}: the upload failed {self.attempts} times ({_one_line(error)}); "
                    "run the same command again to go on."
                ) from error
            (folder / name).unlink(missing_ok=True)

    def uploader(self, folder: Path) -> Any:
        """Streaming's uploader from a local folder."""
        key = (self.remote, str(folder), os.getpid())
        if key not in _UPLOADERS:
            from streaming.base.storage.upload import CloudUploader

            empty = Path(tempfile.mkdtemp(dir=self.state))
            try:
                uploader = CloudUploader.get((str(empty), self.remote or ""), keep_local=True, retry=self.attempts)
            except Exception as error:
                raise ConversionError(f"{self.remote}: cannot be written to ({_one_line(error)}).") from error
            finally:
                empty.rmdir()
            uploader.local = str(folder)
            _UPLOADERS[key] = uploader
        return _UPLOADERS[key]

    def names(self) -> set[str] | None:
        """The names of the files in the output, or ``None`` where a remote cannot list them."""
        if self.out is not None:
            return {entry.name for entry in os.scandir(self.out)}
        try:
            listed = self.uploader(self.state).list_objects()
        except (NotImplementedError, FileNotFoundError):
            return None
        return None if listed is None else {name.rpartition("/")[2] for name in listed}

    def read(self, name: str, names: set[str] | None) -> bytes | None:
        """One small file of the output, or ``None`` if it is not there.

        Args:
            name: of the file.
            names: of all files, see :meth:`names`; not to get one of them from a remote is an error.
        """
        if names is not None and name not in names:
            return None
        if self.out is not None:
            path = self.out / name
            return path.read_bytes() if path.exists() else None
        from composer_prior.data.download import DataError, download_from

        with tempfile.TemporaryDirectory(dir=self.state) as folder:
            local = Path(folder) / name
            try:
                download_from(f"{self.remote}/{name}", local, attempts=1 if names is None else self.attempts)
                return local.read_bytes()
            except DataError as error:
                if names is not None:
                    raise ConversionError(f"{self.remote}/{name} cannot be read: {error}.") from error
                return None  # remotes say in many ways that a file is missing


_UPLOADERS: dict[tuple[str | None, str, int], Any] = {}


def _place(out: str, options: ConversionOptions) -> Place:
    scheme = urlparse(out).scheme
    if not is_remote(out):
        folder = Path(out).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ConversionError(f"{out}: this is a file; name a folder or a remote.")
        state = folder / ".convert"
        state.mkdir(parents=True, exist_ok=True)
        return Place(folder, None, state)
    if scheme not in REMOTES:
        raise ConversionError(f"{out}: {scheme}:// is unknown; name a folder or a remote ({', '.join(REMOTES)}).")
    remote = out.rstrip("/")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "composer-prior" / "convert"
    digest = hashlib.blake2b(remote.encode(), digest_size=8).hexdigest()
    state = Path(options.work).expanduser() if options.work else cache / digest
    state.mkdir(parents=True, exist_ok=True)
    return Place(None, remote, state, options.upload_attempts)


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    """Holds the only right to write to a place.

    The system takes it back when the last process of a killed conversion has ended, which may take a moment.
    """
    with open(place.state / "lock", "w") as file:
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 < _LOCK_ATTEMPTS:
                    time.sleep(0.1)
        else:
            raise ConversionError(f"{place.label}: another conversion is writing here; let it end first.")
        yield


def _begin(place: Place, settings: dict[str, Any]) -> ConversionSummary | None:
    """Prepares the state; the summary, if the output is complete already."""
    names = place.names()
    finished = place.read("conversion.json", names)
    if finished is not None and (names is None or "index.json" in names):
        known = json.loads(finished)
        _same_settings(place, {**known["settings"], "version": _VERSION}, settings)  # it is whole, whoever made it
        return ConversionSummary(**known["summary"])
    started = place.state / "settings.json"
    if started.exists():
        _same_settings(place, json.loads(started.read_bytes()), settings)
    else:
        other = (names or set()) - {".convert"}
        if (place.out is not None and other) or "index.json" in other:
            shutil.rmtree(place.state, ignore_errors=True)
            some = ", ".join(sorted(other)[:3])
            raise ConversionError(f"{place.label}: holds something else ({some}); choose an empty place.")
        _write(started, _json(settings))
    for leftover in place.state.glob("tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    (place.state / "units").mkdir(exist_ok=True)
    return None


def _same_settings(place: Place, known: dict[str, Any], settings: dict[str, Any]) -> None:
    if known.get("version") != settings["version"]:
        raise ConversionError(
            f"{place.label}: begun by another version of composer-prior; delete it, or choose another place."
        )
    for name in sorted({*known, *settings}):
        if known.get(name) != settings.get(name):
            was, now = ("another source", "this one") if name == "source" else (known.get(name), settings.get(name))
            raise ConversionError(
                f"{place.label}: begun with {name}={was}, not {now}; give the same options, or delete it, or choose "
                "another place."
            )


def _write(path: Path, data: bytes) -> None:
    """Writes a whole file or none of it, also if the power fails."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


# units of work --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """All that a process needs in order to convert any unit."""

    source: Source
    place: Place
    options: ConversionOptions
    folder: Path
    buffer: io.BytesIO = field(default_factory=io.BytesIO)

    @property
    def columns(self) -> dict[str, str]:
        captions = {"caption": "str"} if self.options.captions == "all" else {"captions": "json"}
        return {"image": "bytes", **captions, **({SPANS: "json"} if self.source.has_spans else {})}


def _unit_file(state: Path, number: int) -> Path:
    return state / "units" / f"{number:08}.json"


def _digest(unit: Any) -> str:
    return hashlib.blake2b(repr(unit).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def convert_unit(task: Task, number: int, unit: Any, advance: Callable[[int, int], None]) -> None:
    """Converts one unit of work: its shards go to their place, then its unit file says that they are there.

    Args:
        task: what is converted, and how.
        number: the unit's number.
        unit: the unit.
        advance: called with captions and image bytes as they are done; may raise in order to stop.
    """
    folder = task.place.state / f"tmp{os.getpid()}"
    folder.mkdir(exist_ok=True)
    size_limit = _bytes(task.options.size_limit) or 0
    writer = ShardWriter(folder, f"shard.{number:06}", task.columns, size_limit, task.buffer)
    rejected: list[Rejected] = []
    read = captions = samples = 0
    for item in task.source.read(unit):
        if isinstance(item, BadFile) and task.options.on_bad_file == "raise":
            raise ConversionError(f"{item.where} cannot be read, or not to its end: {item.detail}; {_WHAT_TO_DO}.")
        kept, problems, size = _convert(item, task)
        for sample in kept:
            writer.write(sample)
        rejected += problems
        written = sum(len(sample.get("captions", "?")) if "captions" in sample else 1 for sample in kept)
        samples += len(kept)
        captions += written
        lost = sum(problem.count or 0 for problem in problems)
        read += written + lost
        advance(written + lost, size)
    writer.finish()
    task.place.publish(folder, [shard["raw_data"]["basename"] for shard in writer.shards])
    counts = {"read": read, "captions": captions, "samples": samples}
    result = {
        "unit": _digest(unit),
        "file": file_of(unit),
        **counts,
        "shards": writer.shards,
        "rejected": [_line(problem) for problem in rejected],
        "cut": any(isinstance(problem, BadFile) for problem in rejected),
    }
    _write(_unit_file(task.place.state, number), _json(result))


def _line(problem: Rejected) -> dict[str, Any]:
    """The line of a rejection, which says for how many captions it stands if not for one."""
    line: dict[str, Any] = {
        "id": problem.key,
        "reason": problem.reason,
        "source": problem.where,
        "detail": problem.detail,
    }
    if problem.count != 1 or problem.estimated:
        line.update(captions=problem.count, estimated=problem.estimated)
    return line


def _convert(item: Record | Rejected, task: Task) -> tuple[list[dict[str, Any]], list[Rejected], int]:
    """The samples of one record, what of it is rejected, and the size of its image."""
    if isinstance(item, Rejected):
        return [], [item], 0
    options = task.options
    several = len(item.captions) > 1
    keys = [f"{item.key}#{index}" if several else item.key for index in range(max(1, len(item.captions)))]
    try:
        image = item.image
        if isinstance(image, str):
            image = read_image(task.source.images, image, options.max_image_bytes, task.folder)
        elif len(image) > options.max_image_bytes:
            raise RejectedImage("image too large", f"{len(image)} bytes")
        if options.resize is not None or options.reencode is not None:
            image = reencode_image(image, options.resize, options.reencode)
        else:
            check_image(image, options.check)
    except (ImageError, RejectedImage) as error:
        return [], [Rejected(key, error.reason, item.where, error.detail) for key in keys], 0
    if not item.captions:
        return [], [Rejected(item.key, "missing caption", item.where, item.note)], len(image)
    spans = item.spans if item.spans is not None else (None,) * len(item.captions)
    kept, problems = [], []
    for key, caption, span in zip(keys, item.captions, spans, strict=True):
        problem = _caption_problem(caption, options.max_caption_chars) or _spans_problem(
            span, caption, task.source.has_spans
        )
        if problem:
            problems.append(Rejected(key, problem[0], item.where, problem[1]))
        else:
            kept.append((caption, span))
    if options.captions == "all":
        samples = [{"image": image, "caption": caption, SPANS: span} for caption, span in kept]
    else:
        samples = [{"image": image, "captions": [c for c, _ in kept], SPANS: [s for _, s in kept]}] if kept else []
    return samples, problems, len(image)


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


# processes ------------------------------------------------------------------------------------------------------------


def _run(source: Source, place: Place, options: ConversionOptions) -> int:
    """Converts every unit that is not done yet; how many units there are."""
    task = Task(source, place, options, source.folder)
    count = 0

    def missing() -> Iterator[tuple[int, Any]]:
        nonlocal count
        present = place.names()
        for number, unit in enumerate(source.units()):
            count = number + 1
            done = _done(place.state, number, unit, present)
            if done is None:
                yield number, unit
            else:
                shown.skip(done)

    disable = None if options.progress is None else not options.progress
    disable = True if sys.stderr is None else disable
    processes = options.processes or len(os.sched_getaffinity(0))
    with tqdm(total=source.total, unit=" samples", smoothing=0.1, disable=disable, dynamic_ncols=True) as bar:
        shown = _Bar(bar)
        try:
            if processes == 1:
                for number, unit in missing():
                    convert_unit(task, number, unit, shown.advance)
            else:
                _run_parallel(task, missing(), processes, shown)
        except BrokenProcessPool:
            raise ConversionError(
                f"{place.label}: a process died (out of memory?); run the same command again to go on, with fewer "
                "processes= if memory is short."
            ) from None
    return count


def _done(state: Path, number: int, unit: Any, present: set[str] | None) -> int | None:
    """How many captions a finished unit read, or ``None`` if it has to be converted."""
    try:
        known = json.loads(_unit_file(state, number).read_bytes())
    except FileNotFoundError:
        return None
    names = {shard["raw_data"]["basename"] for shard in known["shards"]}
    whole = known["unit"] == _digest(unit) and (present is None or names <= present)
    return known["read"] if whole else None


class _Bar:
    """A progress bar in samples/s and MB/s."""

    def __init__(self, bar: tqdm[Any]):
        self.bar = bar
        self.bytes = 0
        self.start = time.monotonic()

    def advance(self, samples: int, size: int) -> None:
        """Counts what was converted."""
        self.bytes += size
        if not self.bar.disable:
            rate = self.bytes / (time.monotonic() - self.start + 1e-9) / 1e6
            self.bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
            self.bar.update(samples)

    def skip(self, samples: int) -> None:
        """Counts what was converted before, which says nothing about the speed."""
        if not self.bar.disable:
            self.bar.initial += samples
            self.bar.update(samples)


class _Stopped(Exception):
    """The main process asks the others to stop."""


_worker: dict[str, Any] = {}


def _start_worker(task: Task, counters: Any, stop: Any, parent: int) -> None:
    """Prepares a process: it leaves Ctrl-C to its parent, and ends soon after its parent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(task=task, counters=counters, stop=stop)

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(number: int, unit: Any) -> None:
    counters, stop = _worker["counters"], _worker["stop"]
    waiting = [0, 0, 0]

    def advance(samples: int, size: int) -> None:
        waiting[:] = waiting[0] + 1, waiting[1] + samples, waiting[2] + size
        if waiting[0] == _REPORT_EVERY:
            report()
            if stop.is_set():
                raise _Stopped

    def report() -> None:
        with counters.get_lock():
            counters[0] += waiting[1]
            counters[1] += waiting[2]
        waiting[:] = 0, 0, 0

    convert_unit(_worker["task"], number, unit, advance)
    report()


def _run_parallel(task: Task, units: Iterator[tuple[int, Any]], processes: int, bar: _Bar) -> None:
    """Keeps every process busy, with no more than two units each in memory."""
    # Forked processes start at once, and do not run a script again that calls this without a main guard.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    counters, stop = context.Array("q", 2), context.Event()
    shown = [0, 0]

    def show() -> None:
        now = counters[:]
        bar.advance(now[0] - shown[0], now[1] - shown[1])
        shown[:] = now

    def drain(pending: set[Future[None]], limit: int) -> set[Future[None]]:
        while len(pending) > limit:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            show()
            for future in done:
                future.result()
        return pending

    with ProcessPoolExecutor(processes, context, _start_worker, (task, counters, stop, os.getpid())) as pool:
        try:
            pending: set[Future[None]] = set()
            for number, unit in units:
                pending = drain(pending | {pool.submit(_work, number, unit)}, 2 * processes - 1)
            drain(pending, 0)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# the finish -----------------------------------------------------------------------------------------------------------


def _finish(place: Place, settings: dict[str, Any], units: int, max_rejected: float) -> ConversionSummary:
    """Puts the results of all units together; the index comes last."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    example = ""
    folder = place.state / f"tmp{os.getpid()}"
    folder.mkdir(exist_ok=True)
    lost_in = _losses(place, units)
    with open(folder / "rejected.jsonl", "wb") as lines:
        for number in range(units):
            unit = json.loads(_unit_file(place.state, number).read_bytes())
            counts.update({name: unit[name] for name in ("read", "captions", "samples")})
            shards += unit["shards"]
            for line in unit["rejected"]:
                if line.get("captions", 1) is None:
                    line.update(captions=lost_in[line["source"]], estimated=True)
                    counts["read"] += line["captions"]
                lost = line.get("captions", 1)
                counts["rejected"] += lost
                counts["estimated"] += lost * line.get("estimated", False)
                counts["ignored"] += not lost
                reasons[line["reason"]] += lost
                example = example or (f" ({line['source']}: {line['detail']})" if lost and line["detail"] else "")
                lines.write(_json(line))
    ordered = dict(sorted(((k, n) for k, n in reasons.items() if n), key=lambda item: (-item[1], item[0])))
    size = sum(shard["raw_data"]["bytes"] for shard in shards)
    rejected = counts["rejected"]
    summary = ConversionSummary(
        counts["read"],
        counts["captions"],
        counts["samples"],
        rejected,
        ordered,
        len(shards),
        size,
        counts["estimated"],
        counts["ignored"],
    )
    place.publish(folder, ["rejected.jsonl"])
    if not summary.samples and not rejected:
        others = f", but {summary.ignored} members that are no samples; see rejected.jsonl there" * bool(
            summary.ignored
        )
        raise ConversionError(f"{place.label}: the source holds no captions{others}.")
    if not summary.samples or rejected > max_rejected * summary.read:
        most = ", ".join(f"{count} {reason}" for reason, count in list(ordered.items())[:3])
        raise ConversionError(
            f"{place.label}: {rejected} of {summary.read} captions were rejected ({most}), more than "
            f"max_rejected={max_rejected}; see rejected.jsonl there{example}, and mend the source or allow more."
        )
    _write(folder / "conversion.json", _json({"settings": settings, "summary": asdict(summary)}))
    _write(folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
    place.publish(folder, ["conversion.json", "index.json"])
    if place.out is not None:
        expected = {shard["raw_data"]["basename"] for shard in shards}
        for stray in place.out.glob("shard.*.mds"):
            if stray.name not in expected:
                stray.unlink()
    shutil.rmtree(place.state, ignore_errors=True)
    return summary


def _losses(place: Place, units: int) -> dict[str, int]:
    """How many captions each file has lost that cannot be read, or not to its end: what the whole ones have on average,
    less what was read of it, and at least one."""
    read: Counter[str] = Counter()
    cut = set[str]()
    for number in range(units):
        unit = json.loads(_unit_file(place.state, number).read_bytes())
        if unit["file"] is not None:
            read[unit["file"]] += unit["read"]
            cut |= {unit["file"]} if unit["cut"] else set()
    whole = [count for file, count in read.items() if file not in cut]
    mean = sum(whole) / len(whole) if whole else 0.0
    return {file: max(1, round(mean - read[file])) for file in cut}


# small helpers --------------------------------------------------------------------------------------------------------


def _expect(name: str, value: Any, ok: bool, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not accepted: expected {accepted}.")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bytes(size: int | str) -> int | None:
    """A size in bytes, from a number or from text such as ``64mb`` (of 1024 * 1024 bytes, as in streaming)."""
    match = re.fullmatch(r"(\d+)([kmg]?)b?", str(size).lower())
    return int(match[1]) * 1024 ** " kmg".index(match[2] or " ") if match else None


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]


def _option(word: str) -> tuple[str, Any]:
    """Name and value of ``name=value``; text stays as it was written, so that a folder may be named 2017."""
    from omegaconf import OmegaConf

    fields = {f.name: str(f.type) for f in dataclasses.fields(ConversionOptions)}
    name, _, text = word.partition("=")
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, 1, 0)[0]
        raise ValueError(f"{name} is not an option; did you mean {nearest}? Options: {', '.join(fields)}.")
    if text == "null" or (fields[name].startswith("str") and text):
        return name, None if text == "null" else text
    try:
        value = OmegaConf.from_dotlist([word])[name]
    except Exception:
        value = text
    return name, "" if value is None else value


def main(arguments: Sequence[str]) -> int:
    """The command line: ``SOURCE OUT [option=value ...]``, where the options are :class:`ConversionOptions`.

    Args:
        arguments: the words of the command line.

    Returns:
        The exit status: 0 if the conversion is complete.
    """
    names = [f.name for f in dataclasses.fields(ConversionOptions)]
    try:
        words = [word for word in arguments if not re.match(r"\w+=", word)]
        if len(words) != 2 or any(word.startswith("-") for word in words):
            print(f"usage: SOURCE OUT [option=value ...], with the options {', '.join(names)}", file=sys.stderr)
            return 2
        chosen = dict(_option(word) for word in arguments if word not in words)
        say(convert_captions(words[0], words[1], **chosen))
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to go on.", file=sys.stderr)
        return 130
    except (SourceError, ConversionError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
