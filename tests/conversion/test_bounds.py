"""What an archive, a table or a list claims of itself never costs more than its own size allows."""

import bz2
import json
import os
import tarfile
from pathlib import Path

import pytest
from common.commands import convert as main
from common.commands import inspect
from conversion.test_field import IMAGE, jsonl, pairs, rejections, tar_bytes, write

from composer_prior.conversion.convert import ConversionError, convert_captions
from composer_prior.conversion.sources import SourceError
from composer_prior.data.mds import ShardWriter

DEEP = "[" * 500 + "]" * 500
WHOLE = tar_bytes(pairs("a")).rstrip(b"\0")
WHOLE += bytes(-len(WHOLE) % 512)


def header(kind: bytes, size: int) -> bytes:
    """One of tar, whose size may be negative, as numbers of base 256 can be."""
    info = tarfile.TarInfo("b.png")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


TARS = {
    "a long name": (header(b"L", 1 << 30), "a header of 1073741824 bytes"),
    "a long link": (header(b"K", 1 << 30), "a header of 1073741824 bytes"),
    "an extended header": (header(b"x", 1 << 30), "a header of 1073741824 bytes"),
    "a global header": (header(b"g", 1 << 30), "a header of 1073741824 bytes"),
    "a size below zero": (header(b"0", -1536), "negative size"),
    "a name below zero": (header(b"L", -1536), "a header of -1536 bytes"),
    "a thousand names of one": ((header(b"L", 6) + b"b.png\0".ljust(512, b"\0")) * 1000, "recursion"),
}


@pytest.mark.parametrize("case", TARS)
def test_a_header_of_a_tar_is_not_obeyed_in_everything(case, tmp_path):
    data, reason = TARS[case]
    source = write(tmp_path / "in", {"0.tar": WHOLE + data})
    with open(source / "0.tar", "ab") as file:
        file.truncate(len(WHOLE) + len(data) + (1 << 30) + 4096)  # sparse: it takes no room
    summary = convert_captions(source, tmp_path / "out", processes=1, on_bad_file="skip", max_rejected=1)
    (line,) = rejections(tmp_path / "out")
    assert (summary.samples, line["reason"]) == (1, "broken archive")
    assert reason in line["detail"]


def test_a_compressed_tar_does_not_unpack_without_end(tmp_path):
    source = write(tmp_path / "in", {"0.tar.bz2": bz2.compress(WHOLE + bytes(80 << 20))})
    summary = convert_captions(source, tmp_path / "out", processes=1, on_bad_file="skip", max_rejected=1)
    (line,) = rejections(tmp_path / "out")
    assert (summary.samples, summary.rejected) == (1, 1)
    assert "200 times its size" in line["detail"]


def test_a_parquet_file_does_not_unpack_without_end(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    twice = arrow.DictionaryArray.from_arrays(arrow.array([0] * 4), arrow.array([bytes(70 << 20)]))
    tables = {"0.parquet": {"image": twice}, "1.parquet": {"image": [IMAGE] * 4}}
    (tmp_path / "in").mkdir()
    for name, columns in tables.items():
        table = arrow.table({**columns, "caption": ["a tile"] * 4})
        parquet.write_table(table, tmp_path / "in" / name, compression="zstd")
    summary = convert_captions(tmp_path / "in", tmp_path / "out", processes=1, max_rejected=1)
    assert (summary.samples, summary.reasons) == (4, {"unreadable row": 4})
    assert "more than 200 times as many" in rejections(tmp_path / "out")[0]["detail"]


def test_times_that_python_has_not_are_rows_like_others(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    times = arrow.array([2**62, 2**62 + 1, 0], arrow.timestamp("us"))
    (tmp_path / "in").mkdir()
    columns = {"image": [IMAGE] * 3, "caption": ["one", "two", "three"], "time": times}
    parquet.write_table(arrow.table(columns), tmp_path / "in" / "0.parquet")
    assert convert_captions(tmp_path / "in", tmp_path / "out", processes=1, key_column="time").samples == 3
    with pytest.raises(ConversionError, match="3 caption is not text"):
        convert_captions(tmp_path / "in", tmp_path / "none", processes=1, caption_column="time")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("form", ["jsonl", "json", "webdataset"])
def test_json_nested_deep_is_a_rejected_sample(form, processes, tmp_path):
    bad, good = f'{{"image": "0.png", "caption": {DEEP}}}', '{"image": "0.png", "caption": "a tile"}'
    files = {
        "jsonl": {"captions.jsonl": f"{bad}\n{good}".encode()},
        "json": {"captions.json": f"[{bad}, {good}]".encode()},
        "webdataset": {"0.tar": tar_bytes([("a.png", IMAGE), ("a.json", bad.encode()), *pairs("b")])},
    }
    source = write(tmp_path / "in", {"0.png": IMAGE, **files[form]})
    summary = convert_captions(source, tmp_path / "out", processes=processes, max_rejected=1)
    assert (summary.samples, summary.reasons) == (1, {"malformed JSON": 1})


def test_coco_nested_deep_is_one_line(tmp_path):
    notes = f'{{"images": [{{"id": 1, "file_name": "0.png"}}], "annotations": {DEEP}}}'
    with pytest.raises(SourceError, match="nested more than 100 deep"):
        convert_captions(write(tmp_path / "in", {"captions.json": notes.encode()}), tmp_path / "out")


def test_what_is_no_plain_file_is_a_bad_sample(tmp_path):
    names = ("pipe.png", "sparse.png", "folder.png", "0.png")
    entries = [{"image": name, "caption": name} for name in names]
    source = write(tmp_path / "in", {"0.png": IMAGE, "captions.jsonl": jsonl(*entries)})
    os.mkfifo(source / "pipe.png")
    (source / "folder.png").mkdir()
    with open(source / "sparse.png", "wb") as file:
        file.truncate(4 << 30)
    summary = convert_captions(source, tmp_path / "out", processes=1, max_rejected=1)
    assert summary.reasons == {"not a regular file": 2, "image too large": 1}


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl", "captions.csv", "0.tar", "0.parquet"])
def test_a_pipe_is_no_source(name, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / name)
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert name in error
    assert "not a regular file" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("content", [b"[]", b"[1]", b'{"settings": 1}', b"", DEEP.encode(), b'{"summary": {}}'])
def test_the_conversions_own_files_that_hold_something_else_are_one_line(content, tmp_path, capsys):
    source, out = write(tmp_path / "in", {"0.tar": tar_bytes(pairs("a"))}), tmp_path / "out"
    convert_captions(source, out, processes=1)
    (out / "conversion.json").write_bytes(content)
    assert main([str(source), str(out), "processes=1"]) == 1
    error = capsys.readouterr().err
    assert "conversion.json is none of a conversion's" in error
    assert len(error.splitlines()) == 1


def test_where_the_reasons_are_is_said(tmp_path, capsys):
    source = write(tmp_path / "in", {"0.tar": tar_bytes([*pairs("a"), ("b.png", b"none"), ("b.txt", b"x")])})
    assert main([str(source), str(tmp_path / "out"), "processes=1", "max_rejected=1"]) == 0
    assert f"{tmp_path}/out/rejected.jsonl" in capsys.readouterr().out
    whole = write(tmp_path / "whole", {"0.tar": tar_bytes(pairs("a"))})
    assert main([str(whole), str(tmp_path / "out2"), "processes=1"]) == 0
    assert "rejected.jsonl" not in capsys.readouterr().out


def test_nothing_of_any_length_is_written_out(tmp_path):
    long = "x" * 300_000
    source = write(
        tmp_path / "in", {"0.png": IMAGE, "captions.jsonl": jsonl({"image": long, "caption": "a", "id": long})}
    )
    with pytest.raises(ConversionError) as caught:
        convert_captions(source, tmp_path / "out", processes=1)
    assert len(str(caught.value)) < 1000
    assert os.path.getsize(tmp_path / "out" / "rejected.jsonl") < 2000
    assert "300,000 characters" in json.loads(Path(tmp_path, "out", "rejected.jsonl").read_text())["id"]


@pytest.mark.parametrize("value", [None, 3, [1, 2], {"a": 1}, [None]])
def test_captions_that_are_no_texts_are_one_line(value, tmp_path, capsys):
    writer = ShardWriter(tmp_path, "shard", {"image": "bytes", "captions": "json"}, 1 << 20)
    writer.write({"image": IMAGE, "captions": value})
    writer.finish()
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": writer.shards}))
    assert inspect([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "sample 0" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("index", [DEEP, "[" * 100_000])
def test_an_index_nested_deep_is_one_line(index, tmp_path, capsys):
    (tmp_path / "index.json").write_text(index)
    assert inspect([str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
