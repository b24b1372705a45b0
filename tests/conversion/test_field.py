"""Sources as people have them: damaged files, stray quotes, odd names, links, conversations, options of any kind."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from common.commands import convert as main
from PIL import Image
from streaming.base.local import LocalDataset

from composer_prior.conversion.convert import ConversionError, ConversionOptions, convert_captions
from composer_prior.conversion.sources import Record, Rejected, SourceError, open_source, read_image
from composer_prior.conversion.sources import lines as source_lines
from composer_prior.conversion.sources.files import parquet_problem, tar_problem


def picture(shade: int = 90, size: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 80, 60)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = picture()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_bytes(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{s}", d) for key in keys for s, d in (("png", IMAGE), ("txt", f"tile {key}".encode()))]


def parquet_bytes(rows: int = 20, **columns: list[Any]) -> bytes:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    columns = columns or {"image": [IMAGE] * rows, "caption": [f"tile {row}" for row in range(rows)]}
    parquet.write_table(arrow.table(columns), buffer, row_group_size=8)
    return buffer.getvalue()


def items(source: Path, **options: Any) -> list[Record | Rejected]:
    opened = open_source(source, **options)
    return [item for unit in opened.units() for item in opened.read(unit)]


def captions(out: Path) -> list[str]:
    data = LocalDataset(str(out))
    return [data[index]["caption"] for index in range(len(data))]


def rejections(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def jsonl(*entries: Any) -> bytes:
    return "\n".join(map(json.dumps, entries)).encode()


# Files that cannot be read --------------------------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0.txt", "a tile" * 200)
    return buffer.getvalue()


KINDS = {
    "a Git LFS pointer": POINTER,
    "empty": b"",
    "a zip archive": zipped(),
    "an HTML page": b"<!DOCTYPE html>\n<html>" + b" " * 600,
}
OTHER = {
    "0.parquet": {"cut after": parquet_bytes()[:-30], "a tar archive": tar_bytes(pairs("a")), "not a Pa": b"x" * 900},
    "0.tar": {"cut after": tar_bytes(pairs("a"))[:300], "a Parquet file": parquet_bytes()},
    "0.tar.gz": {
        "cut after": gzip.compress(os.urandom(4000))[:60],
        "a Parquet file": parquet_bytes(),
        "gzip data without a tar": gzip.compress(b"text" * 99),
    },
}
BAD_FILES = [(name, kind, data) for name, more in OTHER.items() for kind, data in {**KINDS, **more}.items()]


def whole_file(name: str) -> bytes:
    if name.endswith("parquet"):
        return parquet_bytes()
    return tar_bytes(pairs(*(f"{n:03}" for n in range(20))), "w:gz" if name.endswith("gz") else "w")


@pytest.mark.parametrize(("name", "kind", "data"), BAD_FILES, ids=[f"{name}-{kind}" for name, kind, _ in BAD_FILES])
def test_a_file_that_cannot_be_read_says_what_it_is(name, kind, data, tmp_path):
    problem = parquet_problem if name.endswith("parquet") else tar_problem
    (tmp_path / name).write_bytes(data)
    assert kind in problem(tmp_path / name)
    (tmp_path / name).write_bytes(whole_file(name))
    assert problem(tmp_path / name) is None


@pytest.mark.parametrize(
    ("name", "kind", "data", "processes"),
    [("0.parquet", "cut after", OTHER["0.parquet"]["cut after"], 1), ("0.tar", "not a tar", b"x" * 9000, 2)],
)
def test_a_file_that_cannot_be_read_is_an_error_or_counts_for_what_it_held(name, kind, data, processes, tmp_path):
    source = write(tmp_path / "in", {name: data, f"1{name[1:]}": whole_file(name), f"2{name[1:]}": whole_file(name)})
    with pytest.raises((SourceError, ConversionError)) as caught:
        convert_captions(source, tmp_path / "out", processes=processes)
    message = str(caught.value)
    assert name in message
    assert kind in message
    assert "on_bad_file=skip" in message
    assert len(message.splitlines()) == 1
    with pytest.raises(ConversionError, match="20 of 60 captions were rejected"):
        convert_captions(source, tmp_path / "out", processes=processes, on_bad_file="skip")
    summary = convert_captions(source, tmp_path / "out", processes=1, on_bad_file="skip", max_rejected=0.4)
    assert (summary.read, summary.samples, summary.rejected, summary.estimated) == (60, 40, 20, 20)
    assert "20 rejected (33.33%, 20 of them estimated" in str(summary)
    (line,) = rejections(tmp_path / "out")
    assert (line["source"], line["captions"], line["estimated"]) == (name, 20, True)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["summary"]["estimated"] == 20


def test_several_files_that_cannot_be_read_are_named_at_once_and_nothing_is_left(tmp_path):
    bad = {f"{n}.parquet": POINTER for n in range(1, 6)}
    source = write(tmp_path / "in", {"0.parquet": parquet_bytes(), **bad})
    with pytest.raises(SourceError, match=r"5 files cannot be read: 1\.parquet \(.*3\.parquet \(.* and 2 more; mend"):
        convert_captions(source, tmp_path / "out", processes=1)
    assert not (tmp_path / "out" / ".convert").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_was_cut_keeps_what_was_read_and_counts_what_was_not(mode, tmp_path):
    keys = [f"{n:03}" for n in range(40)]
    name = "tar.gz" if mode == "w:gz" else "tar"
    noise = {key: picture(n, 30) for n, key in enumerate(keys)}
    members = [(f"{k}.{s}", d) for k in keys for s, d in (("png", noise[k]), ("txt", os.urandom(200).hex().encode()))]
    whole = tar_bytes(members, mode)
    source = write(tmp_path / "in", {f"0.{name}": whole[: len(whole) // 2], f"1.{name}": whole})
    with pytest.raises((SourceError, ConversionError), match=rf"0\.{name} .*on_bad_file=skip"):
        convert_captions(source, tmp_path / "out", processes=1)
    summary = convert_captions(source, tmp_path / "out", processes=2, on_bad_file="skip", max_rejected=0.5)
    assert summary.read == 80
    assert 50 < summary.samples < 75
    assert summary.reasons["broken archive"] == summary.estimated >= 80 - summary.samples - 1
    convert_captions(source, tmp_path / "again", processes=1, on_bad_file="skip", max_rejected=0.5)
    for file in ("rejected.jsonl", "conversion.json", "index.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_what_was_converted_before_a_bad_file_is_not_converted_again(tmp_path):
    good = whole_file("0.tar.gz")
    source = write(tmp_path / "in", {"0.tar.gz": good, "1.tar.gz": good[:-40]})
    with pytest.raises(ConversionError, match=r"1\.tar\.gz cannot be read, or not to its end"):
        convert_captions(source, tmp_path / "out", processes=1)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("shard.000000.*")}
    summary = convert_captions(source, tmp_path / "out", processes=1, on_bad_file="skip", max_rejected=0.5)
    assert before
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert summary.samples + summary.rejected == summary.read


def test_a_large_hole_in_a_tar_counts_as_the_samples_that_fit_in_it(tmp_path):
    data = bytearray(tar_bytes(pairs(*(f"{n:03}" for n in range(40)))))
    data[20 * 2048 : 30 * 2048] = b"\xff" * (10 * 2048)
    items_ = items(write(tmp_path, {"0.tar": bytes(data)}) / "0.tar")
    assert len([item for item in items_ if isinstance(item, Record)]) == 30
    assert [(i.reason, i.count, i.estimated) for i in items_ if isinstance(i, Rejected)] == [
        ("broken archive", 10, True)
    ]


def test_rows_of_a_parquet_file_that_is_unlike_the_first_are_counted(tmp_path):
    more = parquet_bytes(image=[IMAGE] * 3, caption=["x"] * 3, uid=["a", "b", "c"])
    source = write(tmp_path / "in", {"0.parquet": more, "1.parquet": parquet_bytes(4)})
    with pytest.raises(ConversionError, match=r"1\.parquet cannot be read.*no column 'uid'"):
        convert_captions(source, tmp_path / "out", processes=1, key_column="uid")
    options = {"key_column": "uid", "on_bad_file": "skip", "max_rejected": 0.6}
    summary = convert_captions(source, tmp_path / "out", processes=1, **options)
    assert (summary.read, summary.samples, summary.rejected, summary.estimated) == (7, 3, 4, 0)


@pytest.mark.parametrize(
    ("data", "samples"),
    [(gzip.compress(tar_bytes(pairs(*"abc")))[:-60], 1), (tar_bytes(pairs(*"abc"))[: 6 * 1024], 3)],
)
def test_one_archive_that_was_cut_has_lost_at_least_one(data, samples, tmp_path):
    source = write(tmp_path / "in", {"0.tar": data})
    with pytest.raises((SourceError, ConversionError), match=r"0\.tar .*cut"):
        convert_captions(source, tmp_path / "out", processes=1)
    summary = convert_captions(source, tmp_path / "out", processes=1, on_bad_file="skip", max_rejected=0.9)
    assert summary.samples == samples
    assert summary.reasons["broken archive"] == summary.estimated == 1


def test_a_download_that_left_only_zeros_counts(tmp_path):
    whole = tar_bytes(pairs(*"abcd"))
    source = write(tmp_path / "in", {"0.tar": whole[: 4 * 1024] + bytes(2 << 20), "1.tar": whole})
    with pytest.raises(ConversionError, match=r"1024 broken archive\).*0\.tar: 2097152 bytes at 4096 are only zeros"):
        convert_captions(source, tmp_path / "out", processes=1)


def test_a_list_that_is_something_else_says_what(tmp_path):
    for name, data, message in (
        ("captions.jsonl", POINTER, "a Git LFS pointer"),
        ("captions.csv", b"<html>nothing</html>", "an HTML page"),
        ("captions.tsv", gzip.compress(b"x"), "gzip data"),
        ("captions.csv", "image,caption".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    ):
        source = write(tmp_path / message, {name: data})
        with pytest.raises(SourceError, match=message):
            open_source(source)


def test_an_arrow_file_of_a_saved_dataset_that_is_a_pointer_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["x"]}).save_to_disk(str(tmp_path / "hf"))
    (tmp_path / "hf" / "data-00000-of-00001.arrow").write_bytes(POINTER)
    with pytest.raises(SourceError, match=r"data-00000-of-00001\.arrow \(a Git LFS pointer"):
        open_source(tmp_path / "hf")


# Quotes ---------------------------------------------------------------------------------------------------------------

TABLES = {
    "a lone quote in a table with tabs": (
        "captions.tsv",
        'image\tcaption\n0.png\t"Untitled, 1990\n1.png\ttwo\n2.png\tthree\n3.png\ta 5" pipe\n4.png\tfive\n',
        ['"Untitled, 1990', "two", "three", 'a 5" pipe', "five"],
    ),
    "quotes that are text": (
        "captions.tsv",
        'caption\timage\n"Hello" she said\t0.png\n"Untitled"\t1.png\n5" by 7"\t2.png\n"\t3.png\n',
        ['"Hello" she said', '"Untitled"', '5" by 7"', '"'],
    ),
    "proper quoting with tabs": (
        "captions.tsv",
        'image\tcaption\n0.png\t"two\nlines"\n1.png\t"a ""b"" c"\n2.png\t"plain"\n3.png\t"a\ttab"\n',
        ["two\nlines", 'a "b" c', "plain", "a\ttab"],
    ),
    "a lone quote that meets another at a line's end": (
        "captions.tsv",
        'image\tcaption\n0.png\t"Untitled\n1.png\ttwo\n2.png\tcalled "three"\n3.png\tfour\n',
        ['"Untitled', "two", 'called "three"', "four"],
    ),
    "a lone quote in a table with commas": (
        "captions.csv",
        'image,caption\n0.png,"Untitled\n1.png,two\n2.png,a 5" pipe\n3.png,the 6"\n4.png,"five, six"\n',
        ['"Untitled', "two", 'a 5" pipe', 'the 6"', "five, six"],
    ),
    "a lone quote, and later one that would close it": (
        "captions.csv",
        'image,caption\n0.png,"Untitled\n1.png,two\n2.png,the 6"\n3.png,four\n',
        ['"Untitled', "two", 'the 6"', "four"],
    ),
    "a lone quote where numbers name the images": (
        "captions.csv",
        'image,caption\n000,"Untitled\n001,two\n002,the 6"\n003,four\n',
        ['"Untitled', "two", 'the 6"', "four"],
    ),
    "cells of several lines": (
        "captions.csv",
        'image,caption\n0.png,"two\nlines, one cell"\n1.png,"three\n\nlines ""quoted"""\n2.png,"one"\n',
        ["two\nlines, one cell", 'three\n\nlines "quoted"', "one"],
    ),
    "cells of several lines before the image": (
        "captions.csv",
        'caption,image\r\n"two\r\nlines",0.png\r\n"a, b\r\nlines",1.png\r\nplain,2.png\r\n',
        ["two\r\nlines", "a, b\r\nlines", "plain"],
    ),
    "line ends of old Macs": ("captions.csv", 'image,caption\r0.png,one\r1.png,"two, three"\r', ["one", "two, three"]),
    "the last quote never closes": ("captions.csv", 'image,caption\n0.png,one\n1.png,"never', ["one", '"never']),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_no_quote_swallows_a_row(case, encoding, tmp_path):
    name, text, expected = TABLES[case]
    found = items(write(tmp_path, {name: text.encode(encoding)}))
    assert [item.captions for item in found if isinstance(item, Record)] == [(caption,) for caption in expected]
    assert not [item for item in found if isinstance(item, Rejected)]


def test_a_row_that_a_quote_spoils_is_rejected_alone(tmp_path):
    rows = 'image,caption\n0.png,"Untitled, 1990\n1.png,two\n2.png,"three"\n3.png,"a" b, c\n4.png,five\n'
    found = items(write(tmp_path, {"captions.csv": rows.encode()}))
    assert [item.captions[0] for item in found if isinstance(item, Record)] == ["two", "three", "five"]
    assert [(i.where, i.reason, i.detail) for i in found if isinstance(i, Rejected)] == [
        ("captions.csv:2", "malformed row", "3 cells where the header has 2, stray quotes"),
        ("captions.csv:5", "malformed row", "3 cells where the header has 2, stray quotes"),
    ]


def test_a_quote_that_never_closes_is_looked_for_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(source_lines, "_RECORD_LIMIT", 5000)
    rows = ["no row at all"] * 100_000
    write(tmp_path, {"captions.csv": "\n".join(["image,caption", '0.png,"open', *rows, "1.png,fine"]).encode()})
    opened = open_source(tmp_path)
    found = [item for unit in opened.units() for item in opened.read(unit)]
    assert [item.captions for item in found if isinstance(item, Record)] == [('"open',), ("fine",)]
    assert len(found) == 100_002


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_in_any_usual_encoding(encoding, end, tmp_path):
    lines = [json.dumps({"image": f"{n}.png", "caption": f"sch\u00f6n {n}"}, ensure_ascii=False) for n in range(3)]
    write(tmp_path, {"captions.jsonl": end.join([*lines, ""]).encode(encoding)})
    assert [item.captions for item in items(tmp_path)] == [(f"sch\u00f6n {n}",) for n in range(3)]


@pytest.mark.parametrize("form", ["json", "coco"])
def test_json_in_utf_16(form, tmp_path):
    entries: Any = [{"image": "0.png", "caption": "sch\u00f6n"}]
    if form == "coco":
        notes = [{"image_id": 1, "caption": "sch\u00f6n"}]
        entries = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": notes}
    write(tmp_path, {"captions.json": json.dumps(entries, ensure_ascii=False).encode("utf-16")})
    assert [item.captions for item in items(tmp_path)] == [("sch\u00f6n",)]


# Names in archives ----------------------------------------------------------------------------------------------------


def found_in(tmp_path: Path, members: list[tuple[str, bytes]], **options: Any) -> tuple[dict[str, str], list[Any]]:
    found = items(write(tmp_path, {"0.tar": tar_bytes(members)}) / "0.tar", **options)
    records = {item.key: item.captions[0] for item in found if isinstance(item, Record)}
    return records, [(item.key, item.reason, item.count) for item in found if isinstance(item, Rejected)]


@pytest.mark.parametrize(
    "keys",
    [
        ("photo.v1", "photo.v2", "img.2024.01", "img.2024.02"),
        ("0000", "photo.v1", "photo.v2", "zz"),
        ("a.b/c.d/0.1", "a.b/c.d/0.2", "a.b/e"),
        ("photo", "photo.v2"),
    ],
)
def test_dots_in_a_members_name(keys, tmp_path):
    assert found_in(tmp_path, pairs(*keys)) == ({key: f"tile {key}" for key in keys}, [])


def test_dots_in_names_with_the_caption_in_json(tmp_path):
    members = [
        (f"img.{n}.{s}", d) for n in "12" for s, d in (("png", IMAGE), ("json", f'{{"caption": "{n}"}}'.encode()))
    ]
    assert found_in(tmp_path, members) == ({"img.1": "1", "img.2": "2"}, [])


def test_other_members_are_parts_of_their_sample(tmp_path):
    extra = [("0.cls", b"3"), ("0.cls.txt", b"dog"), ("0.seg.png", IMAGE), ("0.emb.npy", b"x"), ("0.png.md5", b"x")]
    members = sorted([*pairs("0"), *extra, *pairs("photo.v1"), ("photo.v1.md5", b"x")])
    assert found_in(tmp_path, members) == ({"0": "tile 0", "photo.v1": "tile photo.v1"}, [])


def test_every_other_member_is_accounted_for(tmp_path):
    members = [
        ("README", b"about"),
        ("LICENSE.md", b"free"),
        ("__MACOSX/0.png", b"x"),
        ("._0.png", b"x"),
        *pairs("0"),
        ("1.bin", b"x"),
        ("1.npy", b"x"),
        ("b.seg.png", IMAGE),
        ("c.cls.txt", b"dog"),
        ("d.emb.npy", b"x"),
    ]
    assert found_in(tmp_path, members) == (
        {"0": "tile 0"},
        [
            ("README", "not a sample", 0),
            ("__MACOSX/0.png", "not a sample", 0),
            ("._0.png", "not a sample", 0),
            ("LICENSE", "not a sample", 0),
            ("1", "neither image nor caption", 1),
            ("b.seg", "missing caption", 1),
            ("c.cls", "missing image", 1),
            ("d.emb", "neither image nor caption", 1),
        ],
    )


def test_a_readme_is_listed_and_breaks_nothing(tmp_path):
    source = write(tmp_path / "in", {"0.tar": tar_bytes([("README", b"x"), ("README.md", b"x"), *pairs("0")])})
    summary = convert_captions(source, tmp_path / "out", processes=1, max_rejected=0)
    assert (summary.read, summary.samples, summary.rejected, summary.ignored) == (1, 1, 0, 2)
    assert [line["id"] for line in rejections(tmp_path / "out")] == ["README", "README"]
    assert "2 members of archives that are no samples" in str(summary)


def test_names_of_one_stem_are_not_held_in_memory(tmp_path):
    members = [(f"img.{n}.png", os.urandom(1 << 16)) for n in range(300)]
    path = write(tmp_path, {"0.tar": tar_bytes(members)}) / "0.tar"
    opened = open_source(path)
    tracemalloc.start()
    found = [item for unit in opened.units() for item in opened.read(unit)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {(item.reason, item.count) for item in found} == {("missing caption", 1)}
    assert len(found) == 300
    assert peak < 4 << 20


@pytest.mark.parametrize("order", ["images first", "captions first"])
def test_members_that_do_not_stand_together_are_told_what_to_do(order, tmp_path):
    members = pairs(*"abcd")
    first, second = (members[0::2], members[1::2]) if order == "images first" else (members[1::2], members[0::2])
    source = write(tmp_path / "in", {"0.tar": tar_bytes([*first, *second])})
    with pytest.raises(ConversionError, match="8 of 8"):
        convert_captions(source, tmp_path / "out", processes=1)
    lines = [line for line in rejections(tmp_path / "out") if line["reason"] == "duplicate key"]
    assert len(lines) == 4
    assert all("tar --sort=name" in line["detail"] for line in lines)


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"txt": b"\xef\xbb\xbfa tile\r\n\n"}, "a tile"),
        ({"txt": " a tile \n".encode("utf-16")}, " a tile "),
        ({"caption": b"a tile\n"}, "a tile"),
        ({"txt": b" \n", "json": b'{"caption": "a tile"}'}, "a tile"),
        ({"txt": b"", "text": b"a tile"}, "a tile"),
        ({"json": b'\xef\xbb\xbf{"caption": "", "text": "a tile\\n"}'}, "a tile\n"),
        ({"txt": b"\n"}, ""),
    ],
)
def test_the_text_of_a_member(members, caption, tmp_path):
    assert found_in(tmp_path, [("0.png", IMAGE), *((f"0.{s}", d) for s, d in members.items())]) == ({"0": caption}, [])


# Links and paths ------------------------------------------------------------------------------------------------------


def test_links_in_the_folder_that_is_named_are_followed(tmp_path):
    write(tmp_path / "in" / "part0", {"0.tar": tar_bytes(pairs("a"))})
    write(tmp_path / "elsewhere", {"1.tar": tar_bytes(pairs("b")), "blob": tar_bytes(pairs("c"))})
    (tmp_path / "in" / "part1").symlink_to("../elsewhere")
    (tmp_path / "in" / "2.tar").symlink_to("../elsewhere/blob")
    (tmp_path / "in" / "part0" / "loop").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "named").symlink_to("in")
    for name in ("in", "named"):
        assert sorted(item.key for item in items(tmp_path / name)) == ["a", "b", "c"]
    assert [item.key for item in items(tmp_path / "in" / "2.tar")] == ["c"]
    (tmp_path / "in" / "3.tar").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"3\.tar \(a link to what is not there\)"):
        convert_captions(tmp_path / "in", tmp_path / "out", processes=1)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a/0.tar": tar_bytes(pairs("a")), "b/1.tar": tar_bytes(pairs("b"))})
    really = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match=r"b: this folder cannot be read \(Permission denied\)"):
        open_source(tmp_path)


def hub_snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """A snapshot as huggingface_hub lays it down: links to blobs."""
    repository = cache / "datasets--me--tiles"
    for number, (name, data) in enumerate(files.items()):
        write(repository / "blobs", {f"{number:040x}": data})
        link = repository / "snapshots" / "0abc" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / "blobs" / f"{number:040x}", link.parent))
    return repository / "snapshots" / "0abc"


@pytest.mark.parametrize("form", ["jsonl", "tar", "parquet", "paths in parquet"])
def test_a_snapshot_of_the_hub_is_read(form, tmp_path):
    files = {
        "jsonl": {"captions.jsonl": jsonl({"image": "images/0.png", "caption": "tile 0"}), "images/0.png": IMAGE},
        "tar": {"data/0.tar": tar_bytes([("0.png", IMAGE), ("0.txt", b"tile 0")])},
        "parquet": {"data/0.parquet": parquet_bytes(1)},
        "paths in parquet": {"0.parquet": parquet_bytes(image=["0.png"], caption=["tile 0"]), "0.png": IMAGE},
    }[form]
    convert_captions(hub_snapshot(tmp_path, files), tmp_path / "out", processes=1)
    assert captions(tmp_path / "out") == ["tile 0"]


def test_a_snapshot_reaches_no_other_blobs(tmp_path):
    snapshot = hub_snapshot(tmp_path, {"0.png": IMAGE}).resolve()
    assert read_image(snapshot, "0.png", 1 << 20) == IMAGE
    other = write(tmp_path / "datasets--me--other" / "blobs", {"secret": IMAGE})
    (snapshot / "1.png").symlink_to(other / "secret")
    (snapshot / "2.png").symlink_to("/etc/hostname")
    for name in ("1.png", "2.png", "../../blobs/" + "0" * 40):
        with pytest.raises(match="path leaves the source"):
            read_image(snapshot, name, 1 << 20)


def test_a_list_that_is_a_link_finds_the_images_beside_itself_and_beside_the_real_one(tmp_path):
    write(tmp_path / "real", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x"}), "0.png": IMAGE})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "captions.jsonl").symlink_to("../real/captions.jsonl")
    assert convert_captions(tmp_path / "in", tmp_path / "out", processes=1).samples == 1


def test_a_link_to_a_folder_of_images_may_be_named(tmp_path):
    write(tmp_path / "real", {"0.png": IMAGE})
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x"})})
    (tmp_path / "link").symlink_to("real")
    assert convert_captions(source, tmp_path / "out", processes=1, images=tmp_path / "link").samples == 1
    with pytest.raises(SourceError, match=r"images=.*none: no such folder"):
        open_source(source, images=str(tmp_path / "none"))


def listing(folder: Path, form: str, names: list[str]) -> Path:
    """A source in which images have these paths."""
    texts = [f"tile {number}" for number in range(len(names))]
    entries = [{"image": name, "caption": text} for name, text in zip(names, texts, strict=True)]
    if form == "hf":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"image": names, "caption": texts}).save_to_disk(str(folder))
        return folder
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"image_id": number, "caption": text} for number, text in enumerate(texts)]
    data = {
        "jsonl": lambda: jsonl(*entries),
        "json": lambda: json.dumps(entries).encode(),
        "coco": lambda: json.dumps({"images": images, "annotations": notes}).encode(),
        "csv": lambda: "\n".join(["image,caption", *map(",".join, zip(names, texts, strict=True))]).encode(),
        "tsv": lambda: "\n".join(["image\tcaption", *map("\t".join, zip(names, texts, strict=True))]).encode(),
        "parquet": lambda: parquet_bytes(image=names, caption=texts),
    }[form]()
    suffix = "json" if form == "coco" else form
    return write(folder, {f"captions.{suffix}": data})


FORMS_OF_PATHS = ["jsonl", "json", "coco", "csv", "tsv", "parquet", "hf"]


@pytest.mark.parametrize("form", FORMS_OF_PATHS)
def test_any_path_below_the_source_is_read(form, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    names = [
        f"{folder}/0.png",
        f"file://{folder}/0.png",
        "./0.png",
        "a//1.png",
        "a/../0.png",
        "a\\1.png",
        f"/{folder}/0.png",
    ]
    source = listing(folder, form, names)
    write(folder, {"0.png": IMAGE, "a/1.png": IMAGE})
    monkeypatch.chdir(tmp_path.parent)
    summary = convert_captions(source, tmp_path / "out", processes=1)
    assert captions(tmp_path / "out") == [f"tile {number}" for number in range(len(names))]
    assert not summary.rejected


@pytest.mark.parametrize("form", FORMS_OF_PATHS)
@pytest.mark.parametrize("images", ["/", "pictures"])
def test_absolute_paths_below_the_images_that_are_named_are_read(form, images, tmp_path):
    write(tmp_path / "pictures", {"0.png": IMAGE})
    source = listing(tmp_path / "in", form, [f"{tmp_path}/pictures/0.png", f"{tmp_path}/in/1.png"])
    write(tmp_path / "in", {"1.png": IMAGE})
    named = images if images == "/" else str(tmp_path / images)
    convert_captions(source, tmp_path / "out", processes=2, images=named)
    assert captions(tmp_path / "out") == ["tile 0", "tile 1"]


@pytest.mark.parametrize("form", FORMS_OF_PATHS)
def test_paths_that_are_not_read_say_what_to_do(form, tmp_path):
    write(tmp_path / "elsewhere", {"0.png": IMAGE})
    names = [
        "0.png",
        f"{tmp_path}/elsewhere/0.png",
        "../elsewhere/0.png",
        "link.png",
        "https://host/0.png",
        "C:\\x\\0.png",
    ]
    source = listing(tmp_path / "in", form, names)
    write(source, {"0.png": IMAGE})
    (source / "link.png").symlink_to("../elsewhere/0.png")
    convert_captions(source, tmp_path / "out", processes=1, max_rejected=0.9)
    assert captions(tmp_path / "out") == ["tile 0"]
    lines = rejections(tmp_path / "out")
    assert [line["reason"] for line in lines] == [
        *["path leaves the source"] * 3,
        "image is a URL",
        "path leaves the source",
    ]
    for line, words in zip(lines, ["images=", "images=", "images=", "img2dataset", "images="], strict=True):
        assert words in line["detail"]


# Conversations and images of one record -------------------------------------------------------------------------------

ASK = {"from": "human", "value": "<image>\nDescribe it."}
TURNS = {
    "one turn": ([ASK, {"from": "gpt", "value": "a tile"}], "a tile"),
    "several turns": ([ASK, {"from": "gpt", "value": "a tile"}, ASK, {"from": "gpt", "value": "no"}], "a tile"),
    "a system turn": ([{"from": "system", "value": "Be brief."}, ASK, {"from": "gpt", "value": "a tile"}], "a tile"),
    "roles": ([{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a tile"}], "a tile"),
    "the image comes later": (
        [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hello!"},
            ASK,
            {"from": "gpt", "value": "a tile"},
        ],
        "a tile",
    ),
    "no placeholder": ([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a tile"}], "a tile"),
    "a placeholder in the answer": ([ASK, {"from": "gpt", "value": "<image>\na tile"}], "a tile"),
    "no answer": ([ASK], "no answer"),
    "an empty answer": ([ASK, {"from": "gpt", "value": ""}], "no answer"),
}
PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Describe it."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a tile"}]},
]


def table_of(folder: Path, form: str, columns: dict[str, list[Any]]) -> Path:
    entries = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if form == "hf":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
        return folder
    if form == "webdataset":
        members = [m for n, entry in enumerate(entries) for m in ((f"{n}.png", IMAGE), (f"{n}.json", jsonl(entry)))]
        return write(folder, {"0.tar": tar_bytes(members)})
    data = {"jsonl": lambda: jsonl(*entries), "json": lambda: json.dumps(entries).encode()}
    return write(folder, {f"captions.{form}": data.get(form, lambda: parquet_bytes(**columns))()})


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "hf", "webdataset"])
@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("case", [*TURNS, "parts"])
def test_the_answer_about_the_image_is_the_caption(form, column, case, tmp_path):
    turns, expected = TURNS.get(case, (PARTS, "a tile"))
    source = table_of(tmp_path / "in", form, {"image": ["0.png"], column: [turns]})
    (item,) = items(source)
    assert (item.captions if isinstance(item, Record) else item.reason) == (
        ("a tile",) if expected == "a tile" else expected
    )


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "hf"])
def test_conversations_that_are_not_about_one_image_say_so(form, tmp_path):
    plain = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]
    good = [ASK, {"from": "gpt", "value": "a tile"}]
    images = [["0.png"], [], ["0.png", "1.png"], []]
    source = table_of(tmp_path / "in", form, {"image": images, "conversations": [good, plain, good, good]})
    found = items(source)
    assert (found[0].image, found[0].captions) == ("0.png", ("a tile",))
    assert [item.reason for item in found[1:]] == [
        "no image: a text-only conversation",
        "several images",
        "missing image",
    ]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "hf"])
@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("image", [["0.png"], {"path": "0.png"}, [{"path": "0.png", "bytes": None}]])
def test_an_image_in_a_list_or_a_dict(form, column, image, tmp_path):
    source = table_of(tmp_path / "in", form, {column: [image], "caption": ["a tile"]})
    assert [(item.image, item.captions) for item in items(source)] == [("0.png", ("a tile",))]


# Anything in paths, keys and options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "json", "coco"])
@pytest.mark.parametrize("processes", [1, 2])
def test_half_a_surrogate_pair_anywhere_is_a_rejected_row(form, processes, tmp_path):
    entries = [
        {"id": f"\ud83d{n}", "image": ("\ud83d" if n == 1 else "") + f"{n}.png", "caption": "\udcff" * (n == 2) + "x"}
        for n in range(4)
    ]
    source = listing(tmp_path / "in", form, []) if form == "coco" else table_of(tmp_path / "in", form, {"image": []})
    if form == "coco":
        images = [{"id": entry["id"], "file_name": entry["image"]} for entry in entries]
        notes = [{"image_id": entry["id"], "caption": entry["caption"]} for entry in entries]
        write(source, {"captions.json": json.dumps({"images": images, "annotations": notes}).encode()})
    else:
        write(source, {f"captions.{form}": jsonl(*entries) if form == "jsonl" else json.dumps(entries).encode()})
    write(source, {"0.png": IMAGE, "2.png": IMAGE, "3.png": IMAGE})
    summary = convert_captions(source, tmp_path / "out", processes=processes, unit_samples=1, max_rejected=0.6)
    assert (summary.samples, summary.reasons) == (2, {"bad path": 1, "invalid UTF-8": 1})
    assert [line["id"] for line in rejections(tmp_path / "out")] == ["\ud83d1", "\ud83d2"]


def test_names_in_an_archive_that_are_not_text(tmp_path):
    first = [("a\udcff.png", IMAGE), ("a\udcff.txt", b"\xff")]
    archive = tar_bytes([*first, ("b\udcff.txt", b"x\0y"), ("b\udcff.png", IMAGE)])
    convert_captions(write(tmp_path / "in", {"0.tar": archive}), tmp_path / "out", processes=2, max_rejected=0.5)
    assert captions(tmp_path / "out") == ["x\0y"]
    assert [(line["id"], line["reason"]) for line in rejections(tmp_path / "out")] == [("a\udcff", "invalid UTF-8")]


def test_a_number_that_is_too_long_ends_no_array(tmp_path):
    entries = '[{"image": "0.png", "caption": "x", "n": ' + "9" * 5000 + '}, {"image": "1.png", "caption": "y"}]'
    found = items(write(tmp_path, {"captions.json": entries.encode()}))
    assert [item.captions for item in found] == [("x",), ("y",)]


def test_nul_bytes_are_no_end(tmp_path):
    rows = b'image,caption\n0.png,a\0b\n"\0.png","x"\n0.png,"c\0"\n'
    source = write(tmp_path / "in", {"captions.csv": rows, "0.png": IMAGE})
    convert_captions(source, tmp_path / "out", processes=1, max_rejected=0.5)
    assert captions(tmp_path / "out") == ["a\0b", "c\0"]
    assert [line["reason"] for line in rejections(tmp_path / "out")] == ["bad path"]


def test_a_folder_may_be_named_like_a_number(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x", "7": "k"})})
    write(tmp_path, {"007/0.png": IMAGE})
    monkeypatch.chdir(tmp_path)
    assert main([str(source), "out", "images=007", "key_column=7", "work=1", "split=3", "processes=1"]) == 0
    assert ConversionOptions(images=2017, work=Path("w")).settings["images"] == "2017"


@pytest.mark.parametrize(
    "word",
    ["images=", "form=", "split=", "work=", "processes=two", "processes=1.5", "resize=abc", "resize=", "max_rejected=x",
     "max_rejected=.nan", "unit_samples=a", "unit_samples=0", "download_timeout=soon", "progress=maybe", "captions=",
     "check=1", "reencode=7", "size_limit=", "on_bad_file=stop", "max_image_bytes=[1", "max_caption_chars=${x}"],
)  # fmt: skip
def test_an_option_that_is_not_accepted_is_named_in_one_line(word, tmp_path, capsys):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": "0.png", "caption": "x"}), "0.png": IMAGE})
    assert main([str(source), str(tmp_path / "out"), word]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith(f"error: {word.partition('=')[0]}=")
