"""Convert image-caption pairs of any usual format into an MDS data set, in parallel and resumably.

A source is cut into fixed units of work. Each unit becomes separate shards, in any process of any machine; when they
are complete, a small file is written atomically as a record. ``index.json`` is made from these files and written last.
The output depends only on the source and the options, not on the machine or on interruptions; without an index it is
incomplete.

    OUT/index.json                      the data set, written last
    OUT/shard.<unit>.<number>.mds
    OUT/rejected.jsonl                  one line for each rejected sample: id, reason, source, detail
    OUT/conversion.json                 the options, the summary, and the source if it is on the Hub
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from composer_prior.conversion.distribute import convert_units, distributor_of
from composer_prior.conversion.options import VERSION, ConversionError, ConversionOptions, ConversionSummary
from composer_prior.conversion.sources import Source, SourceError, SourceOptions, open_source
from composer_prior.conversion.sources.files import describe
from composer_prior.conversion.units import BAD_FILE_HINT, json_line, scratch, unit_file
from composer_prior.data.files import parse_json
from composer_prior.data.locks import LockedError, locked
from composer_prior.data.messages import one_line
from composer_prior.data.remote import SCHEMES, Output
from composer_prior.data.storage import StorageError, full_disk_told, is_remote, write_whole

_LOCK_SECONDS = 3  # the system takes a lock back when the last process of a killed conversion has ended


def convert_captions(
    source: str | Path, out: str | Path, options: ConversionOptions | None = None, **overrides: Any
) -> ConversionSummary:
    """Convert image-caption pairs into an MDS data set, and return how many were read, written and rejected.

    The columns are ``image`` (bytes), ``caption`` (str) or ``captions`` (json, a list), and, where the source has it,
    ``image_related_spans`` (json: ``[start, end)`` character spans of the caption, or one such list for each caption;
    ``null`` for a caption without). A call after a killed one continues its work; after a complete one it only returns
    the summary.

    Args:
        source: a file, folder or URL, or a data set of the Hub, see
            :func:`composer_prior.conversion.sources.open_source`.
        out: a folder, or a URL (``s3://``, ``gs://``, ``oci://``, ``azure://``, ``hf://`` …). Credentials come from
            the environment, as for streaming.
        options: how to read and convert.
        overrides: fields of :class:`.ConversionOptions`.

    Raises:
        SourceError: the source has an unknown or ambiguous format, or cannot be read at all.
        ConversionError: ``out`` holds other files, too many samples were rejected (``rejected.jsonl`` is written, but
            no index), a process died, an upload failed for good, or the package of ``distributor`` is missing.
        ValueError: nothing can be pushed to ``push_to_hub``, or other data are there.
    """
    options = replace(options or ConversionOptions(), **overrides)
    if options.push_to_hub is None:
        return _convert(source, out, options)
    from composer_prior.data.hub import check_push, push  # here: of safetensors, which conversion does not need

    check_push(options.push_to_hub, "dataset", out, "conversion.json")
    summary = _convert(source, out, options)
    push(out, options.push_to_hub, "dataset", card_of)
    return summary


def _convert(source: str | Path, out: str | Path, options: ConversionOptions) -> ConversionSummary:
    distributor = distributor_of(options)
    opened = open_source(source, **{f.name: getattr(options, f.name) for f in fields(SourceOptions)})
    origin = str(source).rstrip("/") if is_remote(source) else os.path.realpath(Path(source).expanduser())
    identity = hashlib.blake2b(origin.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    settings = {**options.settings, "form": opened.format, "source": identity}
    if options.push_to_hub is not None:
        from composer_prior.data.hub import pushed_file  # here: as above

        if (pushed := pushed_file(options.push_to_hub, "conversion.json")) is not None:
            known = parse_json(pushed).get("settings", {})
            _same_settings(f"push_to_hub={options.push_to_hub}", {**known, "version": VERSION}, settings)
    output = _output(str(out), options)
    with _sole_writer(output):
        complete = _begin(output, settings)
        if complete is not None:
            shutil.rmtree(output.state, ignore_errors=True)
            return complete
        if options.on_bad_file == "raise":
            _refuse_bad_files(source, opened, output)
        units = convert_units(opened, output, options, distributor)
        return _finish(output, settings, units, options.max_rejected, opened.origin)


def card_of(folder: Path) -> str:
    """Return the text of a card of a converted data set, from its ``conversion.json``."""
    known = parse_json((folder / "conversion.json").read_bytes())
    origin, settings = known.get("origin", {}), known["settings"]
    licence = origin.get("license")
    options = [f"| {name} | {value} |" for name, value in sorted(settings.items()) if name != "source" and value]
    return "\n".join(
        [
            "---",
            *([f"license: {licence}"] if licence else []),
            "tags: [composer-prior, mds]",
            "---",
            f"# {folder.resolve().name}",
            "",
            "Images and text as shards of MosaicML Streaming, written by `composer-prior convert`; a recipe of",
            "composer-prior reads them with `train=hf://datasets/USER/NAME`.",
            "",
            f"- Source: {origin.get('source', 'not stated')}; licence: {licence or 'not stated, that of the source'}.",
            f"- {ConversionSummary(**known['summary'])}",
            "",
            *("| option | value |", "| --- | --- |", *options, ""),
        ]
    )


def _refuse_bad_files(source: str | Path, opened: Source, output: Output) -> None:
    """Raise SourceError naming the files that cannot be read."""
    bad = list(opened.bad_files())
    if not bad:
        return
    if not any((output.state / "units").iterdir()):
        shutil.rmtree(output.state, ignore_errors=True)
    files = "a file" if len(bad) == 1 else f"{len(bad)} files"
    raise SourceError(f"{source}: {files} cannot be read: {describe(bad)}; {BAD_FILE_HINT}.")


def _output(out: str, options: ConversionOptions) -> Output:
    if not is_remote(out):
        folder = Path(out).expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise ConversionError(f"{out}: this is a file; name a folder or a remote.")
        state = folder / ".convert"
        state.mkdir(parents=True, exist_ok=True)
        return Output(folder, state)
    if (scheme := urlparse(out).scheme) not in SCHEMES:
        raise ConversionError(f"{out}: {scheme}:// is unknown; name a folder or a remote ({', '.join(SCHEMES)}).")
    remote = out.rstrip("/")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "composer-prior" / "convert"
    digest = hashlib.blake2b(remote.encode(), digest_size=8).hexdigest()
    state = (Path(options.work).expanduser().absolute() if options.work else cache) / digest
    state.mkdir(parents=True, exist_ok=True)
    return Output(remote, state, options.upload_attempts)


@contextmanager
def _sole_writer(output: Output) -> Iterator[None]:
    """Lock the output, and raise errors of writing to it as a ConversionError."""
    try:
        with locked(output.state / "lock", _LOCK_SECONDS), full_disk_told(output.folder or output.state):
            yield
    except LockedError:
        raise ConversionError(f"{output.label}: another conversion is writing here; let it end first.") from None
    except StorageError as error:
        raise ConversionError(str(error)) from error.__cause__


def _begin(output: Output, settings: dict[str, Any]) -> ConversionSummary | None:
    """Prepare the state, or return the summary if the output is complete already."""
    names = output.names()
    finished = output.read("conversion.json", names)
    if finished is not None and (names is None or "index.json" in names):
        with _valid_file(output, "conversion.json"):
            known = parse_json(finished)
            # A complete output of an earlier version is accepted.
            _same_settings(output.label, {**known["settings"], "version": VERSION}, settings)
            return ConversionSummary(**known["summary"])
    started = output.state / "settings.json"
    if started.exists():
        with _valid_file(output, started.name):
            _same_settings(output.label, parse_json(started.read_bytes()), settings)
    else:
        other = (names or set()) - {".convert"}
        if (output.folder is not None and other) or "index.json" in other:
            shutil.rmtree(output.state, ignore_errors=True)
            some = ", ".join(sorted(other)[:3])
            raise ConversionError(f"{output.label}: holds something else ({some}); choose an empty folder.")
        if output.remote is not None:
            output.remote.check_writable()
        write_whole(started, json_line(settings))
    for leftover in output.state.glob("tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    (output.state / "units").mkdir(exist_ok=True)
    return None


@contextmanager
def _valid_file(output: Output, name: str) -> Iterator[None]:
    """Raise a state file of unexpected content as one line."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{output.label}: its {name} is none of a conversion's ({one_line(error, 100)}); choose another output."
        ) from error


def _same_settings(label: str, known: dict[str, Any], settings: dict[str, Any]) -> None:
    if known.get("version") != settings["version"]:
        raise ConversionError(
            f"{label}: begun by another version of composer-prior; delete it, or choose another output."
        )
    for name in sorted({*known, *settings}):
        if known.get(name) != settings.get(name):
            was, now = ("another source", "this one") if name == "source" else (known.get(name), settings.get(name))
            raise ConversionError(
                f"{label}: begun with {name}={was}, not {now}; give the same options, or delete it, or choose "
                "another output."
            )


def _finish(
    output: Output, settings: dict[str, Any], units: int, max_rejected: float, origin: Mapping[str, str]
) -> ConversionSummary:
    """Merge the results of all units, and write the index last."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    example = ""
    folder = scratch(output)
    lost_in = _losses(output, units)
    with open(folder / "rejected.jsonl", "wb") as lines:
        for number in range(units):
            unit = json.loads(unit_file(output.state, number).read_bytes())
            counts.update({name: unit.get(name, 0) for name in ("read", "captions", "samples", "further")})
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
                lines.write(json_line(line))
    ordered = dict(sorted(((k, n) for k, n in reasons.items() if n), key=lambda item: (-item[1], item[0])))
    size = sum(shard["raw_data"]["bytes"] for shard in shards)
    what = "captions" if settings["learn"] is None else "samples"
    summary = ConversionSummary(**counts, reasons=ordered, shards=len(shards), bytes=size, what=what)
    output.publish(folder, ["rejected.jsonl"])
    if not summary.samples and not summary.rejected:
        ignored = summary.ignored
        others = f", but {ignored} members that are no samples; see rejected.jsonl there" if ignored else ""
        raise ConversionError(f"{output.label}: the source holds no {what}{others}.")
    if not summary.samples or summary.rejected > max_rejected * summary.read:
        most = ", ".join(f"{count} {reason}" for reason, count in list(ordered.items())[:3])
        raise ConversionError(
            f"{output.label}: {summary.rejected} of {summary.read} {what} were rejected ({most}), more than "
            f"max_rejected={max_rejected}; see rejected.jsonl there{example}, and mend the source or allow more."
        )
    about = {"settings": settings, "summary": asdict(summary), **({"origin": dict(origin)} if origin else {})}
    write_whole(folder / "conversion.json", json_line(about))
    write_whole(folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
    output.publish(folder, ["conversion.json", "index.json"])
    if output.folder is not None:
        expected = {shard["raw_data"]["basename"] for shard in shards}
        for stray in output.folder.glob("shard.*.mds"):
            if stray.name not in expected:
                stray.unlink()
    shutil.rmtree(output.state, ignore_errors=True)
    return summary


def _losses(output: Output, units: int) -> dict[str, int]:
    """Return for each damaged file the mean captions of intact files minus those read from it, but at least one."""
    read: Counter[str] = Counter()
    cut = set[str]()
    for number in range(units):
        unit = json.loads(unit_file(output.state, number).read_bytes())
        if unit["file"] is not None:
            read[unit["file"]] += unit["read"]
            cut |= {unit["file"]} if unit["cut"] else set()
    whole = [count for file, count in read.items() if file not in cut]
    mean = sum(whole) / len(whole) if whole else 0.0
    return {file: max(1, round(mean - read[file])) for file in cut}
