"""Every form of source gives the same records, and nothing in one can lead out of it or end the reading."""

import gzip
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from composer_prior.conversion.convert import ConversionError, convert_captions
from composer_prior.conversion.sources import Record, Rejected, SourceError, lines, lists, open_source, read_image
from composer_prior.data.images import ImageError

COLOURS = ("red", "green", "blue")


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))


def items(source, **options) -> list:
    opened = open_source(source, **options)
    return [item for unit in opened.units() for item in opened.read(unit)]


def image_bytes(record: Record, root: Path) -> bytes:
    return record.image if isinstance(record.image, bytes) else read_image(root, record.image, 1 << 20)


def make_jsonl(folder: Path) -> Path:
    pictures(folder)
    lines = [json.dumps({"image": f"{colour}.png", "caption": f"a {colour} one"}) for colour in COLOURS]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def make_csv(folder: Path) -> Path:
    pictures(folder)
    rows = [f'{colour}.png,"a {colour} one"\n' for colour in COLOURS]
    (folder / "captions.csv").write_text("image,caption\n" + "".join(rows))
    return folder


def make_tsv(folder: Path) -> Path:
    pictures(folder)
    rows = [f"a {colour} one\t{colour}.png\n" for colour in COLOURS]
    (folder / "anything.tsv").write_text("\ufeffcaption\tfile_name\n" + "".join(rows))
    return folder


def make_llava(folder: Path) -> Path:
    pictures(folder / "images")
    data = [
        {
            "id": colour,
            "image": f"{colour}.png",
            "conversations": [
                {"from": "human", "value": "Describe.\n<image>"},
                {"from": "gpt", "value": f"a {colour} one"},
            ],
        }
        for colour in COLOURS
    ]
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(data, indent=1))
    return folder / "blip_laion_cc_sbu_558k.json"


def make_coco(folder: Path) -> Path:
    pictures(folder / "train2017")
    images = [{"id": number, "file_name": f"{colour}.png"} for number, colour in enumerate(COLOURS)]
    notes = [{"id": 9 + n, "image_id": n, "caption": f"a {colour} one"} for n, colour in enumerate(COLOURS)]
    (folder / "annotations").mkdir()
    path = folder / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes[::-1]}))
    return path


def make_webdataset(folder: Path) -> Path:
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir()
    for number, colours in enumerate((COLOURS[:2], COLOURS[2:])):
        with webdataset.TarWriter(str(folder / f"{number:05}.tar")) as tar:
            for index, colour in enumerate(colours):
                sample = {"png": picture(colour), "txt": f"a {colour} one", "json": {"key": colour}}
                tar.write({"__key__": f"{number:05}{index:04}", **sample})
        # What img2dataset leaves beside each tar.
        (folder / f"{number:05}.parquet").write_bytes(b"")
        (folder / f"{number:05}_stats.json").write_text("{}")
    return folder


def make_parquet(folder: Path) -> Path:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder.mkdir()
    images = [{"bytes": picture(colour), "path": None} for colour in COLOURS]
    table = arrow.table({"image": images, "text": [f"a {colour} one" for colour in COLOURS]})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=2)
    return folder


def make_hf(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(colour)} for colour in COLOURS], "caption": [f"a {c} one" for c in COLOURS]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    datasets.DatasetDict(train=data).save_to_disk(str(folder))
    return folder


MAKERS = [make_jsonl, make_csv, make_tsv, make_llava, make_coco, make_webdataset, make_parquet, make_hf]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("unit_samples", [1, 2, 100])
def test_every_form_gives_the_same_records(make, unit_samples, tmp_path):
    path = make(tmp_path / "data")
    found = items(path, unit_samples=unit_samples)
    root = open_source(path).images
    assert [item.captions for item in found] == [(f"a {colour} one",) for colour in COLOURS]
    assert [image_bytes(item, root) for item in found] == [picture(colour) for colour in COLOURS]
    assert len({item.key for item in found}) == 3


def test_options_name_columns_and_images(tmp_path):
    pictures(tmp_path / "pictures")
    (tmp_path / "list.csv").write_text("a,b,c\nk1,red.png,one\nk2,blue.png,two\n")
    options = {"image_column": "b", "caption_column": "c", "key_column": "a", "images": str(tmp_path / "pictures")}
    found = items(tmp_path / "list.csv", **options)
    assert [(item.key, item.image, item.captions) for item in found] == [
        ("k1", "red.png", ("one",)),
        ("k2", "blue.png", ("two",)),
    ]


def test_several_captions_are_one_record(tmp_path):
    lines = [
        {"image": "a.png", "caption": ["one", "two"]},
        {"image": "b.png", "caption": "three"},
        {"image": "b.png", "caption": "four"},
        {"image": "b.png", "caption": "four"},
        {"image": "a.png", "caption": "five"},
        {"image": "a.png", "caption": "one"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = items(tmp_path)
    records = [(item.image, item.captions) for item in found if isinstance(item, Record)]
    assert records == [("a.png", ("one", "two")), ("b.png", ("three", "four")), ("a.png", ("five",))]
    assert [item.reason for item in found if isinstance(item, Rejected)] == ["duplicate key"] * 2


def test_an_id_may_not_come_twice(tmp_path):
    lines = [{"id": 7, "image": "a.png", "caption": "x"}, {"id": 7, "image": "b.png", "caption": "y"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = items(tmp_path, unit_samples=1)
    assert first.key == "7"
    assert second == Rejected("7", "duplicate key", "captions.jsonl:2")


def test_parquet_and_hf_reject_repeated_keys(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": ["a.png", "b.png", "c.png"], "caption": ["x", "y", "z"], "uid": ["1", "2", "1"]}
    data = datasets.Dataset.from_dict(columns)
    data.save_to_disk(str(tmp_path / "hf"))
    data.to_parquet(str(tmp_path / "one.parquet"))
    for path in (tmp_path / "hf", tmp_path / "one.parquet"):
        for unit_samples in (1, 8):
            found = items(path, key_column="uid", unit_samples=unit_samples)
            assert [isinstance(item, Rejected) for item in found] == [False, False, True], path
            assert (found[2].key, found[2].reason) == ("1", "duplicate key")


def test_spans_go_with_their_captions(tmp_path):
    lines = [
        {"image": "a.png", "caption": "a red car", "image_related_spans": [[2, 5]]},
        {"image": "b.png", "captions": ["x", "y"], "image_related_spans": [[[0, 1]], []]},
        {"image": "c.png", "caption": "plain"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert open_source(tmp_path).has_spans
    assert [item.spans for item in items(tmp_path)] == [([[2, 5]],), ([[0, 1]], []), None]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image": "a.png", "caption": "\xff"}', "invalid UTF-8"),
        (b'{"image": "a.png", "caption": ', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'["a.png", "caption"]', "malformed record"),
        (b'{"caption": "no image"}', "missing image"),
        (b'{"image": 3, "caption": "x"}', "missing image"),
        (b'{"image": "a.png", "id": ' + b"9" * 5000 + b"}", "malformed JSON"),
    ],
)
def test_a_bad_line_is_rejected_and_the_next_is_read(line, reason, tmp_path):
    (tmp_path / "captions.jsonl").write_bytes(line + b'\n{"image": "b.png", "caption": "fine"}')
    bad, good = items(tmp_path)
    assert (bad.reason, bad.where) == (reason, "captions.jsonl:1")
    assert good.captions == ("fine",)


def test_an_endless_line_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_LIMIT", 1000)
    (tmp_path / "captions.jsonl").write_bytes(b"x" * 5500 + b'\n{"image": "b.png", "caption": "fine"}\n')
    bad, good = items(tmp_path)
    assert bad.reason == "line too long"
    assert good.where == "captions.jsonl:2"


def test_csv_survives_its_own_pitfalls(tmp_path):
    rows = b'image,caption\na.png,"two\nlines, one cell"\nb.png,x,y\n\nc.png,\xff\nd.png,"never closed\n'
    (tmp_path / "captions.csv").write_bytes(rows)
    two, wide, bad, last = items(tmp_path)
    assert two.captions == ("two\nlines, one cell",)
    assert wide.reason == "malformed row"
    assert bad.captions == ("\udcff",)  # rejected as invalid UTF-8 by the conversion
    assert last.captions == ('"never closed',)


ENTRIES = st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text())))


@settings(deadline=None)
@given(ENTRIES, st.integers(1, 9))
def test_a_json_array_is_read_in_pieces_of_any_size(tmp_path_factory, data, chunk):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(data, indent=chunk % 3 or None), encoding="utf-8")
    assert list(lists._json_array(path, chunk)) == data


@pytest.mark.parametrize("text", ["[1, 2]", '[{"image": "a"', '[{"a": 1} {]'])
def test_a_broken_json_array_is_named(text, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ConversionError, match=r"captions\.json"):
        convert_captions(path, tmp_path / "out", processes=1)


@pytest.mark.parametrize("text", ['{"images": []}', '{"images": [{}], "annotations": []}', "{"])
def test_json_that_is_not_coco_is_named(text, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(SourceError, match="not COCO captions"):
        items(path)


def test_coco_rejects_what_does_not_join(tmp_path):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "c.png"}]
    notes = [{"id": 5, "image_id": 1, "caption": "x"}, {"id": 6, "image_id": 77, "caption": "lost"}]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    found = items(path)
    assert [(i.key, i.reason) for i in found if isinstance(i, Rejected)] == [
        ("1", "duplicate key"),
        ("6", "unknown image id"),
    ]
    assert [(i.image, i.captions) for i in found if isinstance(i, Record)] == [("a.png", ("x",)), ("c.png", ())]


def test_unknown_and_ambiguous_sources_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"no such file or folder\. Accepted: a folder with captions\.jsonl"):
        open_source(tmp_path / "none")
    with pytest.raises(SourceError, match="no captions found"):
        open_source(tmp_path)
    make_jsonl(tmp_path / "two")
    make_csv(tmp_path / "two")
    with pytest.raises(SourceError, match="ambiguous, it holds jsonl, csv"):
        open_source(tmp_path / "two")
    assert len(items(tmp_path / "two", form="csv")) == 3
    assert len(items(tmp_path / "two" / "captions.jsonl")) == 3
    with pytest.raises(SourceError, match="form='xml' is unknown: use one of jsonl"):
        open_source(tmp_path / "two", form="xml")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(SourceError, match="name the one to convert"):
        open_source(tmp_path)


def test_a_missing_column_names_those_there(tmp_path):
    (tmp_path / "captions.csv").write_text("link,words\nx,y\n")
    with pytest.raises(SourceError, match=r"choose one of its columns \(link, words\) with image_column="):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="no column 'nope'"):
        open_source(tmp_path, image_column="nope")


def test_hf_splits_have_to_be_chosen(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["x"]})
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "hf"))
    with pytest.raises(SourceError, match=r"choose one of its splits \(train, test\)"):
        open_source(tmp_path / "hf")
    assert items(tmp_path / "hf", split="test")[0].image == "a.png"


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match=r"composer-prior\[convert\]"):
        open_source(tmp_path)


def test_broken_parquet_files_are_rejected(tmp_path):
    path = make_parquet(tmp_path / "data")
    whole = (path / "train-00000-of-00001.parquet").read_bytes()
    (path / "a-cut.parquet").write_bytes(whole[:-20])
    damaged = bytearray(whole)
    damaged[4:40] = b"\xff" * 36
    (path / "z-damaged.parquet").write_bytes(damaged)
    found = items(path, unit_samples=1)
    assert (found[0].reason, found[0].where) == ("unreadable file", "a-cut.parquet")
    assert [item.captions for item in found[1:4]] == [(f"a {colour} one",) for colour in COLOURS]
    assert len(found) == 7, "each row of the damaged file is accounted for"


def test_parquet_text_that_is_not_utf8_keeps_its_row(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    text = arrow.array([b"fine", b"\xff bad", b"also fine"]).view(arrow.string())
    parquet.write_table(arrow.table({"image": ["a", "b", "c"], "caption": text}), tmp_path / "x.parquet")
    assert [item.captions[0] for item in items(tmp_path)] == ["fine", "\udcff bad", "also fine"]


# Paths that lead out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "path leaves the source"),
        ("a/../../secret.png", "path leaves the source"),
        ("/etc/hostname", "path leaves the source"),
        ("link.png", "path leaves the source"),
        ("linked/secret.png", "path leaves the source"),
        ("loop.png", "unreadable file"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("", "bad path"),
        ("a\0b", "bad path"),
        ("x" * 5000, "unreadable file"),
        ("none.png", "missing file"),
        ("large.png", "image too large"),
    ],
)
def test_images_outside_the_source_are_not_read(name, reason, tmp_path):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "large.png").write_bytes(bytes(1001))
    os.mkfifo(root / "pipe")
    with pytest.raises(ImageError) as caught:
        read_image(root.resolve(), name, 1000)
    assert caught.value.reason == reason


def test_a_link_within_the_source_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bytes")
    (tmp_path / "b.png").symlink_to("a.png")
    assert read_image(tmp_path.resolve(), "b.png", 100) == b"bytes"


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def test_hostile_tar_members_are_rejected(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "../../evil.png", picture())
        add(tar, "/abs.png", picture())
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "device.png", type=tarfile.CHRTYPE)
        add(tar, "huge.png", bytes(3000))
        for key in ("a", "b", "a"):
            add(tar, f"{key}.png", picture())
            add(tar, f"{key}.txt", b"caption")
        add(tar, "c.png", picture())
        add(tar, "c.png", picture())
        add(tar, "d.png", picture())
        add(tar, "d.jpg", picture())
        add(tar, "e.txt", b"no image")
        add(tar, "f.png", picture())
        add(tar, "f.json", b"{")
        add(tar, "readme", b"no suffix")
    found = items(tmp_path, max_image_bytes=2000)
    assert [(item.key, item.reason) for item in found if isinstance(item, Rejected)] == [
        ("../../evil.png", "path leaves the source"),
        ("/abs.png", "path leaves the source"),
        ("link.png", "not a regular file"),
        ("device.png", "not a regular file"),
        ("huge.png", "image too large"),
        ("a", "duplicate key"),
        ("c", "duplicate key"),
        ("d", "several images"),
        ("e", "missing image"),
        ("readme", "not a sample"),
        ("f", "malformed JSON"),
    ]
    assert [item.key for item in found if isinstance(item, Record)] == ["a", "b"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_cut_anywhere_says_so(suffix, tmp_path):
    path = tmp_path / f"0{suffix}"
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as tar:
        for key in "abc":
            add(tar, f"{key}.png", picture())
            add(tar, f"{key}.txt", b"caption")
    whole, end = path.read_bytes(), 6 * 1024 if suffix == ".tar" else None
    for length in range(0, end or len(whole), 97):
        path.write_bytes(whole[:length])
        assert "broken archive" in [item.reason for item in items(path) if isinstance(item, Rejected)], length


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_damaged_tar_header_loses_no_other_sample(suffix, tmp_path):
    path = tmp_path / f"0{suffix}"
    with tarfile.open(path.with_suffix(""), "w") as tar:
        for key in "abcd":
            add(tar, f"{key}.png", picture())
            add(tar, f"{key}.txt", f"caption {key}".encode())
    data = bytearray(path.with_suffix("").read_bytes())
    path.with_suffix("").unlink()
    data[2048:2060] = b"garbage here"  # b.png
    data[4096 + 1024 : 4096 + 1030] = b"\xff" * 6  # c.txt
    path.write_bytes(gzip.compress(data) if suffix == ".tar.gz" else data)
    found = items(path)
    assert [item.captions for item in found if isinstance(item, Record)] == [("caption a",), (), ("caption d",)]
    assert [(item.key, item.reason, item.detail) for item in found if isinstance(item, Rejected)] == [
        (path.name, "broken archive", "1024 bytes at 2048 are no members"),
        ("b", "missing image", "members: txt"),
        (path.name, "broken archive", "1024 bytes at 5120 are no members"),
    ]


def test_tars_that_were_joined_are_read_whole(tmp_path):
    for key in "ab":
        with tarfile.open(tmp_path / key, "w") as tar:
            add(tar, f"{key}.png", picture())
            add(tar, f"{key}.txt", b"caption")
    (tmp_path / "joined.tar").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    assert [item.key for item in items(tmp_path / "joined.tar")] == ["a", "b"]
