"""Stored scores: exact enough, refused where they do not belong, and never read wrong."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from composer_prior import StreamingCaptionDataset
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator
from composer_prior.data.captions import BadSampleError
from composer_prior.data.scores import (
    Scores,
    ScoresError,
    ScoresMetadata,
    decode_logprobs,
    encode_logprobs,
    open_scores,
)
from composer_prior.data.tokenizer import train_tokenizer
from composer_prior.scoring.writer import ScoresWriter

# A process never gives back what a StreamingDataset takes of it, so that the tests share one where they can.
REFERENCE = {"path": "there", "config": "c0", "weights": "w0", "tokenizer": "t0"}
Stored = tuple[Path, list[np.ndarray]]


@pytest.fixture(scope="module")
def data(scenes: Path, tokenizer: Any) -> StreamingCaptionDataset:
    """The scenes' captions, without images."""
    return StreamingCaptionDataset(
        local=str(scenes / "train"), tokenizer=tokenizer, max_caption_tokens=64, batch_size=8
    )


@pytest.fixture
def scored(data: StreamingCaptionDataset, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StreamingCaptionDataset]:
    """A function that gives the captions their scores, ``scored(folder, on_bad_sample="raise")``."""

    def give(folder: Path | str, on_bad_sample: str = "raise") -> StreamingCaptionDataset:
        opened = open_scores(str(folder), data, Path(data.streams[0].local, ".scores"))
        monkeypatch.setattr(data, "scores", {"ref_logprobs": opened})
        monkeypatch.setattr(data, "on_bad_sample", on_bad_sample)
        return data

    return give


def like(data: StreamingCaptionDataset, **changes: Any) -> Any:
    """What scores know of a data set, with changes."""
    names = ("tokenizer", "prompt", "max_caption_tokens", "num_samples", "fingerprint", "chat_digest")
    return SimpleNamespace(**{**{name: getattr(data, name) for name in names}, **changes})


def random_scores(data: StreamingCaptionDataset) -> list[np.ndarray]:
    """Log-probabilities for every caption token of a data set."""
    generator = np.random.default_rng(0)
    counts = [int((data[i]["labels"] != IGNORE_INDEX).sum()) for i in range(data.num_samples)]
    return [-generator.exponential(2, count).astype(np.float32) for count in counts]


def write(
    out: str | Path, data: StreamingCaptionDataset, values: list[np.ndarray], unit_samples: int = 40
) -> ScoresMetadata:
    metadata = ScoresMetadata.of(data, REFERENCE)
    writer = ScoresWriter(str(out), metadata, unit_samples)
    entries = writer.begin()
    assert entries is not None
    for unit, samples in enumerate(writer.units):
        if unit not in entries:
            entries[unit] = writer.write(unit, [values[i] for i in samples])
    writer.finish(entries)
    return metadata


@pytest.fixture
def stored(data: StreamingCaptionDataset, tmp_path: Path) -> Stored:
    """Scores of the scenes, and their exact values."""
    values = random_scores(data)
    write(tmp_path / "scores", data, values)
    return tmp_path / "scores", values


# the stored values ----------------------------------------------------------------------------------------------------


def assert_close_weights(logprobs: np.ndarray) -> None:
    exact = -np.expm1(logprobs.astype(np.float64))
    weights = -np.expm1(decode_logprobs(encode_logprobs(logprobs)).astype(np.float64))
    error = np.abs(weights - exact)
    assert ((error <= 1e-3 * exact) | (error <= 1e-6)).all()
    assert (error <= np.maximum(2.0**-11 * exact, 2.0**-25)).all()  # the bound that is documented


@given(st.lists(st.floats(-100, 0, width=32), min_size=1))
@settings(max_examples=500, deadline=None)
def test_weights_of_stored_values_are_exact_enough(logprobs: list[float]) -> None:
    assert_close_weights(np.array(logprobs, dtype=np.float32))


def test_weights_are_exact_enough_over_the_whole_range() -> None:
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16)  # all that float16 has, and all between two of them
    halves = halves[halves <= 100].astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    dense = np.concatenate([np.geomspace(1e-12, 100, 1_000_000, dtype=np.float32), halves, between])
    assert_close_weights(-np.concatenate([dense, np.nextafter(between, 0), np.nextafter(between, 200).clip(max=100)]))


@given(st.floats(max_value=0, width=32, allow_nan=False))
@settings(deadline=None)
def test_no_value_becomes_impossible(logprob: float) -> None:
    stored = decode_logprobs(encode_logprobs(np.array([logprob], dtype=np.float32)))
    assert np.isfinite(stored).all()
    assert (stored <= 0).all()


@pytest.mark.parametrize("bad", [np.nan, 1e-3, np.inf])
def test_impossible_values_are_refused(bad: float) -> None:
    values = np.array([-1, bad], dtype=np.float32)
    with pytest.raises(ScoresError, match="1 of 2 log-probabilities are NaN or positive"):
        encode_logprobs(values)
    with pytest.raises(ScoresError, match="NaN or positive"):
        decode_logprobs(values.astype("<f2").tobytes())


def test_storage_is_two_bytes_a_token_and_eight_a_sample(stored: Stored) -> None:
    folder, values = stored
    shards = list(folder.glob("*.mds"))
    size = sum(shard.stat().st_size for shard in shards)
    header = size - 2 * sum(map(len, values)) - 8 * len(values)
    assert 0 < header <= 400 * len(shards)


# reading --------------------------------------------------------------------------------------------------------------


def test_sample_i_has_the_scores_of_sample_i(stored: Stored, scored: Callable[..., StreamingCaptionDataset]) -> None:
    folder, values = stored
    data = scored(folder)
    for i in reversed(range(data.num_samples)):
        item = data[i]
        labelled = item["labels"] != IGNORE_INDEX
        assert item["ref_logprobs"].shape == item["labels"].shape
        np.testing.assert_array_equal(item["ref_logprobs"][labelled].numpy(), values[i].astype(np.float16))
        assert not item["ref_logprobs"][~labelled].any()
    batch = CaptionCollator(0)([data[0], data[1]])
    assert batch["ref_logprobs"].shape == batch["labels"].shape
    assert not batch["ref_logprobs"][batch["labels"] == IGNORE_INDEX].any()


def test_workers_and_pickling_read_the_same(stored: Stored, make_spec: Callable[..., Any]) -> None:
    folder, values = stored
    data = make_spec(None, scores=str(folder), shuffle=True).dataloader.dataset
    loader = DataLoader(
        data, batch_size=8, num_workers=2, collate_fn=CaptionCollator(0), multiprocessing_context="fork"
    )
    seen = 0
    for batch in loader:
        for row in range(len(batch["sample_id"])):
            expected = values[int(batch["sample_id"][row])].astype(np.float16)
            labelled = batch["labels"][row] != IGNORE_INDEX
            np.testing.assert_array_equal(batch["ref_logprobs"][row][labelled].numpy(), expected)
            seen += 1
    assert seen == data.num_samples


def test_streaming_reads_them_as_a_data_set(stored: Stored) -> None:
    folder, values = stored
    data = StreamingDataset(local=str(folder), batch_size=1)
    assert data.num_samples == len(values)
    np.testing.assert_array_equal(decode_logprobs(data[50]["ref_logprobs"]), values[50].astype(np.float16))


def test_data_without_scores_has_none(data: StreamingCaptionDataset) -> None:
    assert "ref_logprobs" not in data[0]


# what does not belong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"prompt": "Say: "}, ["prompt ('' there, 'Say: ' here)"]),
        ({"max_caption_tokens": 63}, ["max_caption_tokens (64 there, 63 here)"]),
        ({"fingerprint": "grown", "num_samples": 97}, ["data (", "samples (96 there, 97 here)"]),
        ({"tokenizer": train_tokenizer(["a snail"], 300)}, ["tokenizer ("]),
        ({"prompt": "Say: ", "max_caption_tokens": 63}, ["prompt (", "max_caption_tokens ("]),
    ],
)
def test_scores_of_something_else_are_refused_by_name(
    stored: Stored, data: StreamingCaptionDataset, changes: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ScoresError, match="do not belong to this run; what differs: ") as error:
        open_scores(str(stored[0]), like(data, **changes), stored[0])
    message = str(error.value)
    assert all(name in message for name in [str(stored[0]), *names])
    assert message.count(" here)") == len(names)
    assert "\n" not in message


def test_the_data_set_itself_refuses(stored: Stored, scenes: Path, tokenizer: Any) -> None:
    with pytest.raises(ScoresError, match=r"data \(.*samples \(96 there, 24 here\), max_caption_tokens"):
        StreamingCaptionDataset(
            local=str(scenes / "validation"), tokenizer=tokenizer, batch_size=1, scores=str(stored[0])
        )


def test_where_the_reference_lies_makes_no_difference() -> None:
    metadata = ScoresMetadata("d", 1, "t", "", 64, REFERENCE)
    metadata.check(replace(metadata, reference={**REFERENCE, "path": "elsewhere"}), "here")
    with pytest.raises(ScoresError, match=r"the reference's weights \('w0' there, 'w1' here\)"):
        metadata.check(replace(metadata, reference={**REFERENCE, "weights": "w1"}), "here")


@pytest.mark.parametrize("name", ["index.json", "scores.json"])
def test_unfinished_scores_are_refused(
    stored: Stored, scored: Callable[..., StreamingCaptionDataset], name: str
) -> None:
    (stored[0] / name).unlink()
    with pytest.raises(ScoresError, match=rf"holds no whole scores: {name}.*Run composer-prior score"):
        scored(stored[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.json", "{", "does not describe scores"),
        ("scores.json", "[]", "does not describe scores"),
        ("scores.json", '{"version": 99}', "scores of version 99, 1 is read"),
        ("index.json", "{}", "is not an index of scores"),
        ("index.json", '{"shards": []}', "has 0 samples, 96 were scored"),
    ],
)
def test_broken_metadata_are_refused(
    stored: Stored, scored: Callable[..., StreamingCaptionDataset], name: str, content: str, message: str
) -> None:
    (stored[0] / name).write_text(content)
    with pytest.raises(ScoresError, match=message):
        scored(stored[0])


def test_shards_outside_of_the_folder_are_refused(
    stored: Stored, scored: Callable[..., StreamingCaptionDataset]
) -> None:
    index = json.loads((stored[0] / "index.json").read_text())
    index["shards"][1]["raw_data"]["basename"] = "../shard.00001.000.mds"
    (stored[0] / "index.json").write_text(json.dumps(index))
    with pytest.raises(ScoresError, match=r"a shard outside of its folder"):
        scored(stored[0])


# damage ---------------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
def test_a_damaged_shard_is_refused_or_its_samples_skipped(
    stored: Stored, scored: Callable[..., StreamingCaptionDataset], damage: Callable[[Path], None], caplog: Any
) -> None:
    damage(stored[0] / "shard.00001.000.mds")
    data = scored(stored[0])
    assert data[39]["ref_logprobs"].any()
    with pytest.raises(BadSampleError, match=r"sample 40 .*shard\.00001\.000\.mds is (damaged|missing)"):
        data[40]
    scored(stored[0], on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        items = [data[i] for i in (39, 40, 79, 80)]
    assert [bool((item["labels"] != IGNORE_INDEX).any()) for item in items] == [True, False, False, True]
    assert [len(item["ref_logprobs"]) == len(item["labels"]) for item in items] == [True] * 4
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[:-1], "scores of sample 5 for"),
        (lambda values: values[:0], "has 0 scores of sample 5 for"),
        (lambda values: np.append(values, values), "scores of sample 5 for"),
    ],
)
def test_scores_that_do_not_fit_a_caption_are_refused_or_skipped(
    data: StreamingCaptionDataset,
    scored: Callable[..., StreamingCaptionDataset],
    tmp_path: Path,
    change: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    values = random_scores(data)
    values[5] = change(values[5])
    write(tmp_path / "scores", data, values)
    with pytest.raises(BadSampleError, match=message):
        scored(tmp_path / "scores")[5]
    skipped = scored(tmp_path / "scores", on_bad_sample="skip")[5]
    assert not (skipped["labels"] != IGNORE_INDEX).any()


# writing --------------------------------------------------------------------------------------------------------------


def test_units_that_are_there_are_kept_and_others_wanted(data: StreamingCaptionDataset, tmp_path: Path) -> None:
    values, metadata = random_scores(data), ScoresMetadata.of(data, REFERENCE)
    writer = ScoresWriter(str(tmp_path), metadata, 40)
    assert writer.begin() == {}
    entries = {unit: writer.write(unit, [values[i] for i in writer.units[unit]]) for unit in (0, 2)}
    assert ScoresWriter(str(tmp_path), metadata, 40).begin() == entries
    truncate(tmp_path / "shard.00000.000.mds")
    assert ScoresWriter(str(tmp_path), metadata, 40).begin() == {2: entries[2]}
    assert ScoresWriter(str(tmp_path), metadata, 30).begin() == {}  # cut otherwise: nothing of it fits
    write(tmp_path, data, values)
    assert ScoresWriter(str(tmp_path), metadata, 40).begin() is None
    np.testing.assert_array_equal(Scores(str(tmp_path), tmp_path)[95], values[95].astype(np.float16))


def test_a_place_that_holds_something_else_is_refused(data: StreamingCaptionDataset, tmp_path: Path) -> None:
    metadata = ScoresMetadata.of(data, REFERENCE)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ScoresError, match="holds other files than scores; name an empty folder"):
        ScoresWriter(str(tmp_path), metadata, 40).begin()
    ScoresWriter(str(tmp_path / "scores"), metadata, 40).begin()
    with pytest.raises(ScoresError, match="the reference's weights"):
        ScoresWriter(str(tmp_path / "scores"), replace(metadata, reference={**REFERENCE, "weights": "w1"}), 40).begin()


# remotes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a local S3 server."""
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="captions")
    yield "s3://captions"
    server.stop()


@pytest.mark.slow
def test_a_remote_is_written_resumed_and_read_on_demand(
    data: StreamingCaptionDataset, scored: Callable[..., StreamingCaptionDataset], bucket: str, tmp_path: Path
) -> None:
    remote = f"{bucket}/scores"
    values, metadata = random_scores(data), ScoresMetadata.of(data, REFERENCE)
    writer = ScoresWriter(remote, metadata, 40)
    assert writer.begin() == {}
    entry = writer.write(1, [values[i] for i in writer.units[1]])
    with pytest.raises(ScoresError, match=r"holds no whole scores: index\.json cannot be read"):
        Scores(remote, tmp_path)
    assert ScoresWriter(remote, metadata, 40).begin() == {1: entry}
    write(remote, data, values)

    scores = Scores(remote, tmp_path)
    assert not list(tmp_path.rglob("*.mds"))
    for i in (95, 41, 40):
        np.testing.assert_array_equal(scores[i], values[i].astype(np.float16))
    assert sorted(file.name for file in tmp_path.rglob("*.mds")) == ["shard.00001.000.mds", "shard.00002.000.mds"]

    doubled = [value * 2 for value in values]
    import boto3

    boto3.resource("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"]).Bucket("captions").objects.all().delete()
    write(remote, data, doubled)
    np.testing.assert_array_equal(Scores(remote, tmp_path)[41], doubled[41].astype(np.float16))  # not from the cache
    assert scored(remote)[41]["ref_logprobs"].sum() == pytest.approx(doubled[41].sum(), rel=1e-3)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 2, "shards": []}', '{"shards": [{"format": "mds"}]}'])
def test_an_index_that_is_not_whole_is_made_anew(damage, data, tmp_path):
    values = random_scores(data)
    write(tmp_path, data, values)
    whole = (tmp_path / "index.json").read_bytes()
    (tmp_path / "index.json").write_text(damage)
    write(tmp_path, data, values)
    assert (tmp_path / "index.json").read_bytes() == whole
    assert ScoresWriter(str(tmp_path), ScoresMetadata.of(data, REFERENCE), 40).begin() is None
