"""Buckets that do not let a user in: one line at once that names bucket and endpoint, before anything is made."""

import json
from pathlib import Path

import pytest
from common.commands import caption, convert, inspect
from common.fault_proxy import FaultProxy
from common.models import small_lm
from common.recipes import recipe
from common.s3_server import s3_server
from composer.utils import S3ObjectStore

from composer_prior.data import download
from composer_prior.data.messages import DataError, OneLineError
from composer_prior.data.remote import Output, Remote
from composer_prior.data.scores import ScoresError
from composer_prior.data.storage import StorageError
from composer_prior.data.stores import PROBE, service
from composer_prior.data.streams import CheckedDataset
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.scoring.score import ScoreJob, score_captions
from composer_prior.training.run import train

pytest.importorskip("moto")


@pytest.fixture(scope="module")
def server():
    with s3_server("private") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        store = S3ObjectStore("private")
        yield environment["S3_ENDPOINT_URL"], store


@pytest.fixture
def refusing(server, monkeypatch):
    """A function that puts a proxy before the server, which refuses some requests."""
    proxies = []

    def start(refuse):
        proxies.append(FaultProxy(server[0], refuse=refuse))
        monkeypatch.setenv("S3_ENDPOINT_URL", proxies[-1].address)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    with open(folder / "captions.jsonl", "w") as lines:
        for number in range(2):
            sample = make_sample("train", number)
            (folder / f"{number}.png").write_bytes(sample["image"])
            lines.write(json.dumps({"image": f"{number}.png", "caption": sample["caption"]}) + "\n")
    return str(folder)


def everything(status):
    return lambda method, path: status


def writing(method, path):
    return 403 if method in ("PUT", "POST") else None


def denied(proxy, bucket="private"):
    return rf"access denied to bucket {bucket} at {proxy.address} \(403(, AccessDenied)?\)"


@pytest.mark.parametrize("status", [400, 403])
def test_what_will_not_change_is_not_tried_again(status, refusing, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 1000.0)
    proxy = refusing(everything(status))
    named = denied(proxy) if status == 403 else rf"(400|ExpiredToken).*\(bucket private at {proxy.address}\)"
    with pytest.raises(DataError, match=named) as caught:
        Remote("s3://private/data").get("index.json", tmp_path / "index.json")
    assert "not found" not in str(caught.value)
    with pytest.raises(DataError, match=rf"^s3://private/data/index\.json cannot be read: .*{named}"):
        CheckedDataset(remote="s3://private/data", local=str(tmp_path / "local"), batch_size=1)
    with pytest.raises(StorageError, match=named):
        Remote("s3://private/data").names()
    with pytest.raises(StorageError, match=named):
        Remote("s3://private/data").check_writable()
    assert sum(proxy.refused.values()) < 20


@pytest.mark.parametrize("status", [400, 403])
def test_an_upload_that_is_refused_is_not_tried_again(status, refusing, tmp_path):
    proxy = refusing(lambda method, path: status if method == "PUT" else None)
    (tmp_path / "file").write_bytes(b"?")
    with pytest.raises(StorageError, match=rf"^s3://private/out/file: the upload failed 1 times .*{proxy.address}"):
        Output("s3://private/out", tmp_path, attempts=7).publish(tmp_path, ["file"])
    assert proxy.refused == {"PUT": 1}


def test_what_tries_a_bucket_is_removed_again(server, refusing):
    _, store = server
    Remote("s3://private/tried").check_writable()
    assert store.list_objects("tried") == []
    refusing(lambda method, path: 403 if method == "DELETE" else None)
    Remote("s3://private/tried").check_writable()
    assert store.list_objects("tried") == [f"tried/{PROBE}"]
    assert Output("s3://private/tried", Path("/tmp")).names() == set()


def test_an_endpoint_is_told_without_its_password(monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "https://me:secret@store.example:9000/path")
    assert service("s3://private/data") == "bucket private at https://store.example:9000"
    assert service("/data") == ""


@pytest.mark.parametrize(
    ("refuse", "problem"),
    [(everything(403), "listed"), (everything(400), "listed"), (writing, "written to")],
    ids=["nothing", "400", "read only"],
)
def test_conversion_says_so_before_it_converts(refuse, problem, refusing, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("composer_prior.conversion.convert.convert_units", None)
    proxy = refusing(refuse)
    assert convert([source, f"s3://private/{tmp_path.name}", f"work={tmp_path / 'work'}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: s3://private/{tmp_path.name}: cannot be {problem} (")
    assert f"bucket private at {proxy.address}" in lines[0]


def test_commands_that_read_say_so_in_one_line(refusing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("composer_prior.inference.caption.load", None)  # before any model is loaded
    proxy = refusing(everything(403))
    for command in (
        lambda: convert(["s3://private/data", str(tmp_path / "out")]),
        lambda: convert(["s3://private/data/0.tar", str(tmp_path / "out")]),
        lambda: caption(["run", "s3://private/pictures", f"out={tmp_path / 'c.jsonl'}"]),
        lambda: inspect(["s3://private/data"]),
    ):
        assert command() == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: s3://private/")
        assert f"access denied to bucket private at {proxy.address} (403" in lines[0]
        assert "not found" not in lines[0]


@pytest.mark.parametrize("refuse", [everything(403), writing], ids=["nothing", "read only"])
def test_scores_say_so_before_a_reference_is_loaded(refuse, refusing, tokenizer, tmp_path, monkeypatch, scenes):
    small_lm(tokenizer, seed=1).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    monkeypatch.setattr("composer_prior.scoring.score.ReferenceLM", None)
    proxy = refusing(refuse)
    job = ScoreJob(
        out="s3://private/scores",
        reference=str(tmp_path / "reference"),
        tokenizer={"name": str(tmp_path / "reference")},
        dataset={"local": str(scenes / "train")},
    )
    with pytest.raises(ScoresError, match=denied(proxy)):
        score_captions(job)


@pytest.mark.parametrize(
    "overrides",
    [
        ["save_folder=s3://private/run"],
        ["save_folder=s3://private/run", "autoresume=true"],
        ["callbacks.hf_checkpointer={interval: 1ep, save_folder: s3://private/run}"],
    ],
)
def test_a_run_that_may_not_write_is_refused_before_anything_is_made(overrides, refusing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    proxy = refusing(writing)
    with pytest.raises((ValueError, OneLineError), match=denied(proxy)) as caught:
        train(recipe("reference", *overrides))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        ["save_folder=s3://private/run", "autoresume=true"],
        ["load_path=s3://private/run/ep0-ba1-rank0.pt"],
        ["load_path=s3://private/run/ep0-ba1"],
    ],
)
def test_a_run_that_may_not_read_is_not_told_that_nothing_is_there(overrides, refusing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    proxy = refusing(everything(403))
    with pytest.raises((ValueError, OneLineError), match=denied(proxy)) as caught:
        train(recipe("reference", *overrides))
    assert "not there" not in str(caught.value)
    assert "not found" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_folder_is_used_with_credentials_for_it_alone(refusing, tmp_path):
    refusing(lambda method, path: 403 if path in ("/private", "/private/") else None)
    (tmp_path / "file").write_bytes(b"?")
    remote = Remote("s3://private/only")
    remote.check_writable()
    remote.put(tmp_path, "file")
    assert remote.size("file") == 1
    with pytest.raises(StorageError, match=r"^s3://private/only cannot be read"):
        remote.check_readable()


def test_a_listing_that_is_denied_is_called_so(refusing, tmp_path):
    proxy = refusing(everything(403))
    with pytest.raises(StorageError, match=rf"^s3://private/out: cannot be listed \({denied(proxy)}"):
        Output("s3://private/out", tmp_path).names()


@pytest.mark.slow
def test_a_bucket_that_is_closed_while_a_run_saves_ends_it_with_one_line(refusing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    proxy = refusing(lambda method, path: 403 if method != "GET" and "ep0-ba" in path else None)
    with pytest.raises(StorageError, match=rf"^s3://private/closed: cannot be written to \({denied(proxy)}") as caught:
        train(recipe("reference", "save_folder=s3://private/closed", "max_duration=2ba", "save_interval=1ba"))
    assert "\n" not in str(caught.value)
