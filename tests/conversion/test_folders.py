"""Folders of images with a file of text each, as programs for training and downloading leave them."""

import json
import os
import unicodedata

import pyarrow
import pytest
from conversion.test_field import IMAGE, captions, picture, rejections, write
from pyarrow import parquet

from composer_prior.conversion.convert import ConversionError, convert_captions
from composer_prior.conversion.sources import SourceError, open_source

FOLDERS = {
    "kohya": {
        "10_tile/a.png": IMAGE,
        "10_tile/a.txt": b"one\n",
        "10_tile/b.PNG": IMAGE,
        "10_tile/b.caption": b"two",
        "10_tile/a.npz": b"latents",
        "meta_lat.json": b'{"a": {"tags": ""}}',
    },
    "SimpleTuner": {"a.png": IMAGE, "a.txt": b"one", "b.v1.png": IMAGE, "b.v1.txt": b"two", "s.json": b'{"x": 1}'},
    "img2dataset": {
        "00000/000000000.png": IMAGE,
        "00000/000000000.txt": b"one",
        "00000/000000000.json": b'{"caption": "not this", "key": "0"}',
        "00000/000000001.png": IMAGE,
        "00000/000000001.json": b'{"caption": "two", "key": "1"}',
        "00000.parquet": b"",
        "00000_stats.json": b'{"count": 2}',
    },
    "macOS": {
        f"{unicodedata.normalize('NFC', 'é')}.png": IMAGE,
        f"{unicodedata.normalize('NFD', 'é')}.txt": b"one",
        "z.png": IMAGE,
        "z.txt": b"two",
        "._z.txt": b"x",
    },
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("processes", [1, 2])
def test_texts_beside_images_are_their_captions(kind, processes, tmp_path):
    source = write(tmp_path / "in", FOLDERS[kind])
    assert open_source(source).format == "folder"
    summary = convert_captions(source, tmp_path / "out", processes=processes, unit_samples=1)
    assert (summary.samples, summary.rejected) == (2, 0)
    assert sorted(captions(tmp_path / "out")) == ["one", "two"]


def test_what_is_missing_or_no_file_is_rejected_alone(tmp_path):
    files = {"a.png": IMAGE, "a.txt": b"one", "b.png": IMAGE, "c.txt": b"three", "d.txt": b"four", "README.txt": b"x"}
    source = write(tmp_path / "in", files)
    os.mkfifo(source / "d.png")
    with pytest.raises(ConversionError, match="rejected"):
        convert_captions(source, tmp_path / "out", processes=1)
    summary = convert_captions(source, tmp_path / "out", processes=1, max_rejected=1)
    assert (summary.samples, captions(tmp_path / "out")) == (1, ["one"])
    found = {
        line["source"].partition(":")[2]: (line["reason"], line["detail"]) for line in rejections(tmp_path / "out")
    }
    assert found["b"] == ("missing caption", "no file of this name ends in .txt, .caption, .text, .json beside it")
    assert found["c"][0] == "missing image"
    assert found["d.png"][0] == "not a regular file"


def test_a_list_comes_first_and_form_decides(tmp_path):
    line = json.dumps({"image": "a.png", "caption": "listed"}).encode()
    source = write(tmp_path / "in", {"a.png": IMAGE, "a.txt": b"beside", "metadata.jsonl": line})
    assert open_source(source).format == "jsonl"
    convert_captions(source, tmp_path / "out", processes=1, form="folder")
    assert captions(tmp_path / "out") == ["beside"]
    with pytest.raises(SourceError, match="no captions found here"):
        open_source(write(tmp_path / "images", {"a.png": IMAGE}))


def test_a_text_that_has_changed_is_read_again(tmp_path):
    source = write(tmp_path / "in", {"a.png": IMAGE, "a.txt": b"one", "b.png": b"none", "b.txt": b"two"})
    with pytest.raises(ConversionError):
        convert_captions(source, tmp_path / "out", processes=1, unit_samples=1)
    write(source, {"a.txt": b"another", "b.png": picture(9)})
    convert_captions(source, tmp_path / "out", processes=1, unit_samples=1)
    assert captions(tmp_path / "out") == ["another", "two"]


@pytest.mark.parametrize(
    ("files", "form"),
    [
        ({"train.parquet": b"TABLE", "train/a.png": IMAGE}, "parquet"),
        ({"captions.json5": b"", "logo.png": IMAGE, "logo.txt": b"logo", "list.json": "COCO"}, "coco"),
    ],
)
def test_what_stands_beside_images_is_not_taken_for_their_texts(files, form, tmp_path):
    coco = {"images": [{"id": 1, "file_name": "b.png"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    more = {f"{letter}.png": IMAGE for letter in "abcd"} if form == "coco" else {}
    content = {name: json.dumps(coco).encode() if data == "COCO" else data for name, data in files.items()}
    source = write(tmp_path / "in", {**content, **more})
    if form == "parquet":
        table = pyarrow.table({"image": ["train/a.png"], "caption": ["a tile"]})
        parquet.write_table(table, source / "train.parquet")
    assert open_source(source).format == form
