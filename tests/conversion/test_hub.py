"""Data sets of the Hub as sources, and what is pushed there, with a small Hub on loopback."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from common.commands import convert
from common.hub import TOKEN, serving
from PIL import Image
from streaming.base.local import LocalDataset

from composer_prior.conversion.convert import ConversionError, convert_captions
from composer_prior.conversion.sources import SourceError, arrow, open_source
from composer_prior.data.hub import check_push, push


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(images, texts):
    buffer = io.BytesIO()
    rows = [{"image": image, "caption": text} for image, text in zip(images, texts, strict=True)]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(buffer)
    return buffer.getvalue()


def inside(first, last):
    return parquet(
        [{"bytes": png(shade), "path": None} for shade in range(first, last)],
        [f"shade {n}" for n in range(first, last)],
    )


def tar(count):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(count):
            for end, data in (("png", png(number)), ("txt", f"shade {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    arrow._streamed.cache_clear()
    with serving(monkeypatch, tmp_path / "cache") as served:
        yield served


@pytest.fixture
def shades(hub):
    """A data set of two files to train on and one to test with, and a commit before without the second."""
    card = b"---\nlicense: cc-by-4.0\n---\n"
    hub.commit("datasets/u/shades", {"README.md": card, "data/train-0.parquet": inside(0, 5)})
    hub.commit("datasets/u/shades", {"data/train-1.parquet": inside(5, 8), "data/test-0.parquet": inside(8, 9)})
    return hub


def samples(out):
    return [(sample["caption"], sample["image"]) for sample in LocalDataset(str(out))]


def expected(*shades):
    return [(f"shade {shade}", png(shade)) for shade in shades]


def test_a_split_is_converted_as_it_is_downloaded(shades, tmp_path):
    url = "hf://datasets/u/shades/train"
    summary = convert_captions(url, tmp_path / "out", processes=2)
    assert (summary.read, summary.samples, summary.shards) == (8, 8, 2)
    assert samples(tmp_path / "out") == expected(*range(8))
    assert not [one for one in shades.requests if "test-0.parquet" in one and "resolve" in one]
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".parquet"], "no copy"
    about = json.loads((tmp_path / "out/conversion.json").read_text())
    assert about["origin"] == {"source": f"hf://datasets/u/shades@{2:040x}/train", "license": "cc-by-4.0"}
    assert convert_captions(url, tmp_path / "out") == summary


def test_revisions_and_splits_are_chosen_in_the_url(shades, tmp_path):
    convert_captions(f"hf://datasets/u/shades@{1:040x}", tmp_path / "before", processes=1)
    assert samples(tmp_path / "before") == expected(*range(5))
    convert_captions("hf://datasets/u/shades", tmp_path / "test", split="test", processes=1)
    assert samples(tmp_path / "test") == expected(8)


def test_a_subset_is_chosen_in_the_url(hub, tmp_path):
    subsets = b"".join(b"- config_name: %c\n  data_files: %c.parquet\n" % (name, name) for name in b"ab")
    files = {"README.md": b"---\nconfigs:\n" + subsets + b"---\n", "a.parquet": inside(0, 1), "b.parquet": inside(1, 3)}
    hub.commit("datasets/u/two", files)
    convert_captions("hf://datasets/u/two/b/train", tmp_path / "b", processes=1)
    assert samples(tmp_path / "b") == expected(1, 2)
    with pytest.raises(SourceError, match=r"available configs: \['a', 'b'\].*Expected hf://datasets/USER/NAME\["):
        open_source("hf://datasets/u/two")


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("hf://datasets/u/shades", {}, r"choose one of its splits \(train, test\): hf://datasets/u/shades/train\."),
        ("hf://datasets/u/shades/none", {}, r"choose one of its splits \(train, test\)"),
        ("hf://datasets/u/shades@none", {}, r"cannot be read: "),
        ("hf://datasets/u/none", {}, r"cannot be read: "),
        ("hf://datasets/u/secret", {}, r"the hub denies access; log in \(hf auth login, or HF_TOKEN\)"),
        ("hf://datasets/u", {}, r"expected hf://datasets/USER/NAME\[@REVISION\]"),
        ("hf://datasets/u/shades/train", {"caption_column": "text"}, r"no column 'text'"),
    ],
)
def test_what_cannot_be_read_is_one_line(shades, monkeypatch, url, options, message):
    shades.commit("datasets/u/secret", {})
    shades.private.add("datasets/u/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(SourceError, match=message) as error:
        open_source(url, **options)
    assert "\n" not in str(error.value)
    assert "hf_other" not in str(error.value)


def test_images_may_be_files_of_the_repository_and_of_no_other(hub, tmp_path):
    """The user's token must not fetch what a data set names elsewhere."""
    lines = "".join(f"{number}.png,shade {number}\n" for number in range(3))
    files = {f"train/{number}.png": png(number) for number in range(3)}
    named = {"train/a..png": png(3), "train/metadata.csv": f"file_name,text\n{lines}a..png,shade 3\n".encode()}
    hub.commit("datasets/u/files", {**files, **named})
    convert_captions("hf://datasets/u/files", tmp_path / "files", processes=1)
    assert samples(tmp_path / "files") == expected(*range(4))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for name, data in {**files, "train/metadata.csv": f"file_name,text\n{lines}"}.items():
            opened.writestr(name, data)
    hub.commit("datasets/u/zipped", {"data.zip": archive.getvalue()})
    convert_captions("hf://datasets/u/zipped", tmp_path / "zipped", processes=1)
    assert samples(tmp_path / "zipped") == expected(*range(3))
    hub.commit("datasets/u/secret", {"0.png": png(0)})
    hub.private.add("datasets/u/secret")
    local, mine, buffer = tmp_path / "local.png", "hf://datasets/u/thief@main/0.png", io.BytesIO()
    local.write_bytes(png(1))
    paths = ["hf://datasets/u/secret@main/0.png", "hf://datasets/u/thief@main/../../../secret/resolve/main/0.png"]
    paths += [str(local), f"file://{local}", f"file://{local}::{mine}", f"simplecache::file://{local}::{mine}"]
    pq.write_table(pa.table({"image": paths, "caption": ["mine"] * 6}), buffer)
    hub.commit("datasets/u/thief", {"0.png": png(0), "train.parquet": buffer.getvalue()})
    with pytest.raises(ConversionError, match="6 of 6 captions were rejected"):
        convert_captions("hf://datasets/u/thief", tmp_path / "thief", processes=1)
    assert not [one for one in hub.requests if "secret" in one]


def test_archives_are_read_too(hub, tmp_path):
    hub.commit("datasets/u/tars", {"train/0.tar": tar(3)})
    convert_captions("hf://datasets/u/tars", tmp_path / "out", processes=1, image_column="png", key_column="__key__")
    assert samples(tmp_path / "out") == expected(*range(3))


def test_a_damaged_file_is_named_or_left_out(shades, tmp_path):
    whole = shades.repositories["datasets/u/shades"][-1]["data/train-1.parquet"]
    shades.commit("datasets/u/shades", {"data/train-1.parquet": whole[:200] + bytes(100) + whole[300:]})
    url, out = "hf://datasets/u/shades/train", tmp_path / "out"
    with pytest.raises(ConversionError, match=f"{3:040x}/train/1 cannot be read"):
        convert_captions(url, out, processes=1)
    summary = convert_captions(url, tmp_path / "skipped", processes=1, on_bad_file="skip", max_rejected=0.9)
    assert summary.rejected >= 1
    assert samples(tmp_path / "skipped")[:5] == expected(*range(5))


def test_a_converted_data_set_is_pushed_with_its_card(shades, tmp_path, capsys):
    out = tmp_path / "shades-mds"
    words = ["hf://datasets/u/shades/train", str(out), "processes=1", "push_to_hub=u/mds"]
    assert convert(words) == 0
    assert f"{out} is pushed to http://127.0.0.1" in capsys.readouterr().out
    assert "datasets/u/mds" in shades.private
    pushed = shades.repositories["datasets/u/mds"][-1]
    assert {*pushed} == {"README.md", *(file.name for file in out.iterdir())}
    assert all(pushed[file.name] == file.read_bytes() for file in out.iterdir())
    card = pushed["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\ntags: [composer-prior, mds]\n---\n# shades-mds\n")
    assert f"- Source: hf://datasets/u/shades@{2:040x}/train; licence: cc-by-4.0." in card
    assert "8 captions read, 8 written as 8 samples" in card
    assert "| captions | all |" in card
    assert TOKEN.encode() not in b"".join(pushed.values())


def test_a_push_without_permission_is_refused_before_anything_is_read(shades, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert convert(["hf://datasets/u/shades/train", str(tmp_path / "out"), "push_to_hub=u/mds"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: push_to_hub=u/mds: the hub denies access; log in")
    assert "hf_other" not in message
    assert not (tmp_path / "out").exists()
    assert convert(["hf://datasets/u/shades/train", "s3://bucket/x", "push_to_hub=u/mds"]) == 1
    assert "s3://bucket/x is a remote" in capsys.readouterr().err


def test_other_data_are_refused_before_anything_is_made(shades, tmp_path):
    url, out = "hf://datasets/u/shades/train", tmp_path / "out"
    shades.commit("datasets/u/scores", {"index.json": b"{}", "scores.json": b"{}"})
    with pytest.raises(ValueError, match=r"u/scores: other data are there \(index\.json without conversion\.json\)"):
        convert_captions(url, out, push_to_hub="u/scores")
    there = {"index.json": b"{}", "conversion.json": json.dumps({"settings": {"form": "hub"}}).encode()}
    shades.commit("datasets/u/mds", there)
    with pytest.raises(ConversionError, match=r"^push_to_hub=u/mds: begun with .*=None, not .*; give the same options"):
        convert_captions(url, out, push_to_hub="u/mds")
    with pytest.raises(ValueError, match=r"u/mds: other data are there \(index\.json without scores\.json\)"):
        check_push("u/mds", "dataset", out, "scores.json")
    assert not out.exists()
    assert shades.repositories["datasets/u/mds"][-1] == there


def test_a_push_is_one_commit_without_former_weights_that_leaves_a_card_of_yours(hub, tmp_path, capsys):
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("new")
    (tmp_path / "README.md").write_text("composer-prior")
    old = {"model.safetensors": b"old", "model.safetensors.index.json": b"old", "of/mine.safetensors": b"mine"}
    old |= {"adapter_model.safetensors": b"mine"}
    hub.commit("models/u/model", {**old, "README.md": b"mine"})
    push(tmp_path, "u/model", "model")
    assert len(hub.repositories["models/u/model"]) == 3
    kept = {
        "of/mine.safetensors": b"mine",
        "adapter_model.safetensors": b"mine",
        "README.md": b"mine",
        "model-00001-of-00002.safetensors": b"new",
    }
    assert hub.repositories["models/u/model"][-1] == kept
    hub.commit("models/u/model", {"README.md": b"a former card of composer-prior"})
    push(tmp_path, "u/model", "model")
    assert hub.repositories["models/u/model"][-1]["README.md"] == b"composer-prior"
    hub.commit("datasets/u/data", {"shard.000000.00000.mds": b"old", "shard.00000.000.mds": b"old", "mine.mds": b""})
    push(tmp_path, "u/data", "dataset")
    assert [name for name in hub.repositories["datasets/u/data"][-1] if name.endswith(".mds")] == ["mine.mds"]
    assert "was not pushed" not in capsys.readouterr().out


def test_a_failing_push_is_one_line(hub, tmp_path, capsys):
    folder = tmp_path / "my model"
    hub.commit("models/u/model", {"model.safetensors": b"old"})
    push(folder, "u/model", "model")
    assert "was not pushed to u/model: the folder is missing or empty\n" in capsys.readouterr().out
    assert hub.repositories["models/u/model"][-1] == {"model.safetensors": b"old"}
    folder.mkdir()
    Path(folder, "config.json").write_text("{}")
    hub.fails = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        push(folder, "u/model", "model")
    assert capsys.readouterr().out == ""
    push(folder, "u/model", "model")
    said = capsys.readouterr().out.rstrip("\n")
    assert said.startswith(f"{folder} was not pushed to u/model: ")
    options = "--repo-type model --exclude '.*' --delete 'model*.safetensors*'"
    assert said.endswith(f"to push it: hf upload u/model '{folder}' {options}")
    push(folder, "u/data", "dataset", lambda _: "card")
    assert capsys.readouterr().out.endswith("; to push it, repeat the command\n")
    assert "\n" not in said
    assert TOKEN not in said
