"""Data sets as they are downloaded or exported, and what the programs that read them say, to whomever it may be."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from common import commands
from PIL import Image
from streaming.base.local import LocalDataset

from composer_prior.conversion.convert import ConversionError, convert_captions
from composer_prior.conversion.sources import BadFile, Record, Rejected, SourceError, open_source
from composer_prior.conversion.sources.lists import _json_array


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (90, 80, 60)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = picture()
IMAGES = {f"{n}.png": IMAGE for n in range(4)}


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def tar_bytes(members: list[tuple[str, bytes | None]], mode: str = "w") -> bytes:
    """An archive; members without bytes are links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE, "0.png") if data is None else (tarfile.REGTYPE, "")
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


PAIR: list[tuple[str, bytes | None]] = [("0.png", IMAGE), ("0.txt", b"a tile")]


def items(source: Path, **options: Any) -> list[Record | Rejected]:
    opened = open_source(source, **options)
    return [item for unit in opened.units() for item in opened.read(unit)]


def captions_of(found: list[Record | Rejected]) -> list[str]:
    return [caption for item in found if isinstance(item, Record) for caption in item.captions]


def jsonl(*entries: Any) -> str:
    return "\n".join(map(json.dumps, entries))


# Tables ---------------------------------------------------------------------------------------------------------------

FLICKR = 'image_name| comment_number| comment\n0.png| 0| Two men , "one" tall .\n0.png| 1| x; y, z\n1.png| 4   cut\n'
TABLES: dict[str, tuple[str, str, str, list[str], dict[str, str]]] = {
    "semicolons": (
        "csv",
        "utf-8-sig",
        'image;caption\r\n0.png;"two\nlines; one cell"\r\n1.png;"lone\r\n2.png;the 6"\r\n3.png;a, b | c\r\n',
        ["two\nlines; one cell", '"lone', 'the 6"', "a, b | c"],
        {},
    ),
    "tabs": ("csv", "utf-16", 'image\tcaption\r\n0.png\t"a, ""b"""\r\n1.png\tc, d\r\n', ['a, "b"', "c, d"], {}),
    "commas in .tsv": ("tsv", "utf-8", 'image,caption\n0.png,"a, b"\n', ["a, b"], {}),
    "spaces": ("csv", "utf-8", "image, caption\n0.png, one\n1.png, two\n", ["one", "two"], {}),
    "Flickr30k": (
        "csv",
        "utf-8",
        FLICKR,
        ['Two men , "one" tall .', "x; y, z"],
        {"image_column": "image_name", "caption_column": "comment"},
    ),
    "names without suffix and number": (
        "csv",
        "utf-8",
        'image,caption\nab/cd,"open\nab/ef,two\nab/gh,the 6"\n',
        ['"open', "two", 'the 6"'],
        {},
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_as_programs_export_them(case, tmp_path):
    suffix, encoding, text, expected, options = TABLES[case]
    found = items(write(tmp_path, {f"captions.{suffix}": text.encode(encoding)}), **options)
    assert captions_of(found) == expected
    assert [item.detail for item in found if isinstance(item, Rejected)] == (
        ["2 cells where the header has 3"] if case == "Flickr30k" else []
    )


WORDS = [
    *("a", "b c", 'say "hi"', 'q"', '"q', '5" x 7"', '"all"', '""', "it's", "é", "1990", "by 2 men"),
    *("x, y", "semi; 3", "tab\there", "pipe | p", "line 1\nline 2", "a\r\nb", "", "  "),
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoted", [True, False])
def test_rows_of_any_captions_are_read_as_they_were_written(delimiter, quoted, tmp_path):
    """With quotes, all of it; without, where no word has a delimiter, no row is lost or joined to another."""
    random = Random(0)
    words = WORDS if quoted else WORDS[:12]
    for _ in range(150):
        rows = [(f"{n}.png", " ".join(random.choices(words, k=3))) for n in range(random.randint(1, 6))]
        order = random.choice([1, -1])
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter=delimiter, lineterminator=random.choice(["\n", "\r\n"]))
        table = [("image", "caption")[::order], *(row[::order] for row in rows)]
        text = "\n".join(map(delimiter.join, table))
        if quoted:
            writer.writerows(table)
            text = buffer.getvalue()
        found = items(write(tmp_path, {"captions.csv": text.encode()}))
        if quoted:
            assert [(item.image, *item.captions) for item in found if isinstance(item, Record)] == rows
        assert [item.image for item in found if isinstance(item, Record)] == [image for image, _ in rows]


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_an_array_of_anything_is_read_in_pieces(chunk, tmp_path):
    entries = [1, -12.5e3, "a]b", "\\u00e9", None, True, [1, [2]], {"a": {"b": [1, 2]}}, {}, 12345]
    for length in range(len(entries) + 1):
        text = json.dumps(entries[:length])
        file = write(tmp_path, {"a.json": text}) / "a.json"
        assert list(_json_array(file, chunk)) == entries[:length]
        for end in range(1, len(text)):
            *before, last = _json_array(write(tmp_path, {"a.json": text[:end]}) / "a.json", chunk)
            assert isinstance(last, BadFile)
            assert before == entries[: len(before)]


def test_what_is_no_object_is_a_rejected_item(tmp_path):
    text = '[{"image": "0.png", "caption": "x"}, null, "x", 5, {"image": "1.png", "caption": "y"}]'
    found = items(write(tmp_path, {"captions.json": text}))
    assert captions_of(found) == ["x", "y"]
    assert [item.reason for item in found if isinstance(item, Rejected)] == ["malformed record"] * 3


ENTRIES = [json.dumps({"image": f"{n % 4}.png", "caption": f"tile {n:03}"}) for n in range(100)]
BROKEN_ARRAYS = {
    "cut": (f"[{', '.join(ENTRIES)}"[:-9], "malformed or cut in item 99", 99, 1),
    "damaged": (f"[{', '.join([*ENTRIES[:40], '{?}', *ENTRIES[40:]])}]", "malformed or cut in item 40", 40, 60),
    "two arrays": (f"[{', '.join(ENTRIES[:50])}]\n[{', '.join(ENTRIES[50:])}]", "text behind the end", 50, 50),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_array_is_an_error_or_counts_for_what_is_left(case, processes, tmp_path):
    text, message, good, lost = BROKEN_ARRAYS[case]
    source = write(tmp_path / "in", {"captions.json": text, **IMAGES})
    options = {"processes": processes, "unit_samples": 30}
    with pytest.raises(ConversionError, match=rf"captions\.json cannot be read.*{message}.*on_bad_file=skip"):
        convert_captions(source, tmp_path / "out", **options)
    summary = convert_captions(source, tmp_path / "out", on_bad_file="skip", max_rejected=0.7, **options)
    assert summary.samples == good
    assert summary.rejected == summary.estimated == pytest.approx(lost, abs=1)
    assert summary.read == summary.captions + summary.rejected


def test_lines_of_json_may_be_named_json(tmp_path):
    entries = [{"image": f"{n}.png", "caption": f"tile {n}"} for n in range(2)]
    for ends in ("\n", "\r\n"):
        source = write(tmp_path / repr(ends), {"captions.json": jsonl(*entries).replace("\n", ends), **IMAGES})
        assert open_source(source).format == "jsonl"
        assert captions_of(items(source)) == ["tile 0", "tile 1"]
    coco = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": [{"image_id": 0, "caption": "x"}]}
    for indent in (None, 1):
        source = write(tmp_path / str(indent), {"captions.json": json.dumps(coco, indent=indent) + "\n\n"})
        assert open_source(source).format == "coco"


def test_coco_with_ids_of_another_kind_is_one_line(tmp_path):
    coco = {"images": [{"id": [0], "file_name": "0.png"}], "annotations": []}
    with pytest.raises(SourceError, match="not COCO captions"):
        open_source(write(tmp_path, {"captions.json": json.dumps(coco)}))


def test_all_captions_of_a_rejected_record_count(tmp_path):
    pair = {"image": "0.png", "captions": ["x", "y"]}
    entries = [
        {"image": None, "captions": ["a", "b", "c"]},
        {"image": ["0.png", "1.png"], "captions": ["a", "b"]},
        *({"id": key, **pair} for key in "kzk"),
    ]
    source = write(tmp_path / "in", {"captions.jsonl": jsonl(*entries), **IMAGES})
    summary = convert_captions(source, tmp_path / "out", processes=1, max_rejected=0.9)
    assert (summary.read, summary.captions) == (11, 4)
    assert summary.reasons == {"missing image": 3, "several images": 2, "duplicate key": 2}
    notes = [{"id": n, "image_id": 0, "caption": "x"} for n in range(4)]
    coco = {"images": [{"id": 0, "file_name": None}], "annotations": notes}
    (item,) = items(write(tmp_path / "coco", {"captions.json": json.dumps(coco)}))
    assert isinstance(item, Rejected)
    assert item.count == 4


# Archives -------------------------------------------------------------------------------------------------------------


def test_compressed_archives_are_read_or_named_and_never_passed_over(tmp_path):
    modes = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tbz2": "w:bz2", "tar.xz": "w:xz"}
    archives: dict[str, bytes | str] = {f"{suffix}/0.{suffix}": tar_bytes(PAIR, mode) for suffix, mode in modes.items()}
    source = write(tmp_path / "in", archives)
    assert captions_of(items(source)) == ["a tile"] * len(modes)
    write(source, {"1.tar.zst": b"\x28\xb5\x2f\xfd" + bytes(800)})
    with pytest.raises(SourceError, match=r"1\.tar\.zst \(zstd data; unpack it"):
        convert_captions(source, tmp_path / "out", processes=1)


def test_no_member_of_any_name_vanishes(tmp_path):
    random = Random(0)
    stems = ["a", "b", "d/a", "v1.0/a", "a.v1", "a.v2", "d.x/a.v1", ".h", "A", "a b"]
    suffixes = [".png", ".txt", ".json", ".PNG", ".npy", ".seg.png", "", ".v1.txt", ".caption.txt"]
    for _ in range(300):
        names = [stem + suffix for stem in random.choices(stems, k=4) for suffix in random.sample(suffixes, 2)]
        data = {"g": IMAGE, "G": IMAGE, "n": b'{"caption": "x"}'}
        source = write(tmp_path, {"0.tar": tar_bytes([(name, data.get(name[-1], b"x")) for name in names])})
        keys = [item.key for item in items(source)]
        assert all(any(name == key or name.startswith(f"{key}.") for key in keys) for name in names)


def test_members_without_a_caption_say_what_there_is_instead(tmp_path):
    members = [*PAIR, ("1.png", None), ("2.png", IMAGE), ("2.json", b'{"blip": "x"}'), ("3.png", IMAGE), ("3.cls", b"")]
    source = write(tmp_path / "in", {"0.tar": tar_bytes(members)})
    convert_captions(source, tmp_path / "out", processes=1, max_rejected=0.9)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["detail"]) for line in lines] == [
        ("not a regular file", "a link; pack the archive with tar -h --hard-dereference"),
        ("missing caption", "choose one of blip with caption_column="),
        ("missing caption", "choose one of cls with caption_column="),
    ]


# What is no source says what to do ------------------------------------------------------------------------------------

NO_SOURCES: dict[str, tuple[dict[str, bytes | str], str, str]] = {
    "a folder of zip files": ({"0.zip": b"PK\3\4"}, "", r"unpack the \.zip files first"),
    "a zip file": ({"0.zip": b"PK\3\4"}, "0.zip", "unpack it first"),
    "Flickr8k": ({"captions.txt": "image,caption\n", **IMAGES}, "", "name the file that holds them, with form="),
    "a list of an unusual name": ({"captions.txt": "image,caption\n"}, "captions.txt", r"with form= \(jsonl, csv"),
    "no header": ({"cc.tsv": "a bus\thttp://x/1.jpg\n"}, "", "whose first line has to name the columns: no column"),
}


@pytest.mark.parametrize("case", NO_SOURCES)
def test_what_is_no_source_says_what_to_do(case, tmp_path):
    files, name, message = NO_SOURCES[case]
    with pytest.raises(SourceError, match=message) as error:
        open_source(write(tmp_path / "in", files) / name)
    assert len(str(error.value).splitlines()) == 1


def test_lists_of_urls_say_what_to_do(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"URL": ["http://x/1.jpg"], "TEXT": ["x"]}), tmp_path / "0.parquet")
    with pytest.raises(SourceError, match="download the images first, with img2dataset"):
        open_source(tmp_path)


def test_images_that_are_elsewhere_say_what_to_do(tmp_path):
    source = write(tmp_path / "in", {"captions.csv": "image,caption\n0.png,x\n", "Pictures/0.png": IMAGE})
    with pytest.raises(ConversionError, match=r"missing file\).*which images= names"):
        convert_captions(source, tmp_path / "out", processes=1)
    assert convert_captions(source, tmp_path / "there", processes=1, images=str(source / "Pictures")).samples == 1


# Versions and words ---------------------------------------------------------------------------------------------------


def test_what_another_version_has_finished_is_left_alone_and_what_it_has_begun_is_refused(tmp_path):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x"}), **IMAGES})
    out = tmp_path / "out"
    first = convert_captions(source, out, processes=1)
    known = json.loads((out / "conversion.json").read_text())
    known["settings"]["version"] = 1
    known["summary"].pop("estimated")
    (out / "conversion.json").write_text(json.dumps(known))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert_captions(source, out, processes=1) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ConversionError, match="begun with captions=all, not sample"):
        convert_captions(source, out, captions="sample")
    begun = write(tmp_path / "begun", {".convert/settings.json": json.dumps(known["settings"])})
    with pytest.raises(ConversionError, match="begun by another version of composer-prior; delete it"):
        convert_captions(source, begun, processes=1)


SAY = """
import sys
from composer_prior.data.messages import say
if sys.argv[1] == "pipe":
    sys.stdin.readline()
say("caf\\u00e9 \\ud83d\\ude00" * 9999)
say("end")
"""


@pytest.mark.parametrize("kind", ["ascii", "pipe", "full", "closed"])
def test_nobody_who_listens_is_no_error(kind):
    """Characters that a terminal does not know, a reader that has gone, a full disk and no output at all."""
    if kind == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    where = {"closed": ">&-", "full": ">/dev/full"}.get(kind, "")
    command = ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, "-c", SAY, kind]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        if kind == "pipe":
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
        said, error = process.communicate("go\n")
    assert (process.returncode, error) == (0, "")
    assert kind != "ascii" or said.startswith("caf\\xe9 ")


@pytest.mark.parametrize("program", ["convert", "inspect"])
def test_a_program_ends_well_although_its_summary_cannot_be_printed(program, tmp_path, monkeypatch):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "café"}), **IMAGES})
    convert_captions(source, tmp_path / "data", processes=1)
    words = {"convert": [str(source), str(tmp_path / "out"), "processes=1"], "inspect": [str(tmp_path / "data")]}
    with open("/dev/null", "wb", buffering=0) as null:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(null, "ascii"))
        assert commands.run_job(program, words[program]) == 0
        monkeypatch.undo()


INDICES = ["", "null", "[]", "{}", '{"shards": 3}', '{"shards": []}', '{"shards": [{}]}', '{"shards": [3]}']


@pytest.mark.parametrize("index", [*INDICES, '{"shards": [{"column_names": ["image"]}]}', "cut", "gone"])
def test_a_damaged_data_set_is_one_line(index, tmp_path, capsys):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x"}), **IMAGES})
    convert_captions(source, tmp_path / "out", processes=1)
    (shard,) = (tmp_path / "out").glob("*.mds")
    if index == "cut":
        os.truncate(shard, 200)
    elif index == "gone":
        shard.unlink()
    else:
        (tmp_path / "out" / "index.json").write_text(index)
    assert commands.inspect([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("word", ["limit=abc", "limit=0", "samples=-1", "samples=", "alpha=x", "floor=[1"])
def test_an_option_of_the_report_that_is_not_accepted_is_named(word, tmp_path, capsys):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x"}), **IMAGES})
    convert_captions(source, tmp_path / "out", processes=1)
    assert len(LocalDataset(str(tmp_path / "out"))) == 1
    assert commands.inspect([str(tmp_path / "out"), word]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert word.partition("=")[0] in error
