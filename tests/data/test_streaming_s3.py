"""Reading from a bucket that fails: a real S3 API on loopback, and a proxy before it that injects faults."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from common.fault_proxy import Fault, FaultProxy
from common.models import small_lm
from common.recipes import ROOT, fork_ranks, losses
from common.s3_server import s3_server
from omegaconf import OmegaConf
from streaming import MDSWriter

from composer_prior import StreamingCaptionDataset
from composer_prior.conversion.convert import convert_captions
from composer_prior.data.captions import caption_data_spec, read_captions
from composer_prior.data.download import ATTEMPTS, FIRST_PAUSE, STRONGEST_FIRST
from composer_prior.data.messages import DataError, OneLineError
from composer_prior.data.streams import CheckedDataset
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.scoring.score import ScoreJob, score_captions
from composer_prior.training.config import load_recipe
from composer_prior.training.keys import check_keys

pytestmark = pytest.mark.slow

pytest.importorskip("moto")

SAMPLES = 96
CACHE_LIMIT = 90_000
GONE = 3.0 / 4  # seconds, over which two attempts fail: see train_each.py
REMOTE = "s3://captions/data"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY",
    "AWS_SECRET_ACCESS_KEY": "canary/secret",
    "AWS_SESSION_TOKEN": "canary+token",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server with a bucket ``captions``; the environment says how to reach it."""
    with s3_server("captions") as values, pytest.MonkeyPatch.context() as patch:
        for name, value in {**values, **SECRETS}.items():
            patch.setenv(name, value)
        yield values["S3_ENDPOINT_URL"]


@pytest.fixture(scope="module")
def bucket(server: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, converted to the bucket and scored to the bucket; the same in folders, with a tokenizer."""
    folder = tmp_path_factory.mktemp("bucket")
    source = folder / "source"
    source.mkdir()
    with open(source / "captions.jsonl", "w") as lines:
        for index in range(SAMPLES):
            sample = make_sample("train", index)
            (source / f"{index}.png").write_bytes(sample["image"])
            line = {key: sample[key] for key in ("caption", "image_related_spans")}
            lines.write(json.dumps({"image": f"{index}.png", **line}) + "\n")
    tokenizer.save_pretrained(folder / "tokenizer")
    small_lm(tokenizer, seed=1).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    options = {"size_limit": "16kb", "unit_samples": 48, "processes": 1, "progress": False}
    convert_captions(source, folder / "data", **options)
    convert_captions(source, REMOTE, work=str(folder / "work"), **options)
    score_captions(
        ScoreJob(
            out="s3://captions/scores",
            reference=str(folder / "reference"),
            tokenizer={"name": str(folder / "tokenizer")},
            dataset={"remote": REMOTE, "local": str(folder / "scoring"), "max_caption_tokens": 64},
            unit_samples=24,
            progress_bar=False,
        )
    )
    return folder


@pytest.fixture
def proxied(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FaultProxy]]:
    """A function that puts a proxy with a plan between this process and the server."""
    proxies: list[FaultProxy] = []

    def start(plan: Any) -> FaultProxy:
        proxies.append(FaultProxy(server, plan))
        monkeypatch.setenv("S3_ENDPOINT_URL", proxies[-1].address)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # only our own attempts
        monkeypatch.setattr("composer_prior.data.download.FIRST_PAUSE", 0.02)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


def number(path: str) -> int:
    """That of a shard, in its two units of work."""
    unit, index = map(int, re.findall(r"\d+", path)[-2:])
    return 100 * unit + index


def of_shards(*faults: Fault | None, first: int = 1) -> Callable[[str, int], Fault | None]:
    """A plan in which the first answers about each shard fail, in turn in each of these ways."""

    def plan(path: str, n: int) -> Fault | None:
        return faults[(number(path) + n) % len(faults)] if path.endswith(".mds") and n < first else None

    return plan


def only(name: str, fault: Fault, first: int = 1_000_000) -> Callable[[str, int], Fault | None]:
    return lambda path, n: fault if path.endswith(name) and n < first else None


def shard_names(bucket: Path) -> list[str]:
    return sorted(path.name for path in (bucket / "data").glob("*.mds"))


def captions_of(data: Any) -> list[str]:
    return [data[index]["caption"] for index in range(data.num_samples)]


EXPECTED = [make_sample("train", index)["caption"] for index in range(SAMPLES)]


# one process ----------------------------------------------------------------------------------------------------------


def test_each_fault_is_outlived(bucket, proxied, tmp_path):
    faults = [Fault(status=500), Fault(status=503), Fault(cut=True), Fault(corrupt=True), Fault(delay=0.2), None]
    faults.append(Fault(gone=0.1))  # the first answer is none at all
    proxy = proxied(of_shards(*faults, first=2))
    data = CheckedDataset(remote=REMOTE, local=str(tmp_path), batch_size=1, download_timeout=20)
    assert captions_of(data) == EXPECTED
    assert set(proxy.injected) == set(faults) - {None}
    for name in shard_names(bucket):
        assert (tmp_path / name).read_bytes() == (bucket / "data" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_a_corrupt_shard_never_reaches_the_cache(bucket, proxied, tmp_path):
    name = shard_names(bucket)[1]
    proxied(only(name, Fault(corrupt=True)))
    data = CheckedDataset(remote=REMOTE, local=str(tmp_path), batch_size=1, download_retry=2)
    message = (
        f"{REMOTE}/{name} cannot be read: 2 attempts, the last: what arrived has another xxh64 than the index says"
    )
    with pytest.raises(DataError) as first:
        captions_of(data)
    assert str(first.value) == message
    assert not (tmp_path / name).exists()
    with pytest.raises(DataError, match=f"{name} cannot be read: 2 attempts, the last: what arrived has another"):
        captions_of(data)


def test_a_server_that_does_not_answer_costs_no_more_than_the_timeout(bucket, proxied, tmp_path):
    name = shard_names(bucket)[0]
    proxied(only(name, Fault(delay=60)))
    data = CheckedDataset(remote=REMOTE, local=str(tmp_path), batch_size=1, download_retry=2, download_timeout=1)
    with pytest.raises(DataError, match=rf"{name} cannot be read: 2 attempts, .* within 1 s$"):
        data[0]


def test_a_missing_shard_is_not_asked_for_again(bucket, proxied, tmp_path):
    name = shard_names(bucket)[0]
    index = json.loads((bucket / "data/index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "shard.none.mds"
    (tmp_path / "index.json").write_text(json.dumps(index))
    proxied(lambda path, n: None)
    data = CheckedDataset(remote=REMOTE, local=str(tmp_path), batch_size=1)
    with pytest.raises(DataError, match=r"^s3://captions/data/shard.none.mds cannot be read: Object s3://.* not found"):
        data[0]
    del data
    shutil.copytree(bucket / "data", tmp_path / "local")
    (tmp_path / "local" / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be read: .*{name} is missing, and there is no remote"):
        CheckedDataset(local=str(tmp_path / "local"), batch_size=1)[0]


def test_half_an_index_is_none(bucket, proxied, tmp_path):
    proxied(only("index.json", Fault(cut=True), first=2))
    assert len(CheckedDataset(remote=REMOTE, local=str(tmp_path / "a"), batch_size=1)) == SAMPLES
    proxied(only("index.json", Fault(status=503)))
    with pytest.raises(DataError, match=rf"^{REMOTE}/index.json cannot be read: 2 attempts, the last: .*503"):
        CheckedDataset(remote=REMOTE, local=str(tmp_path / "b"), batch_size=1, download_retry=2)


def test_what_a_killed_run_left_in_the_cache_is_replaced(bucket, proxied, tmp_path):
    first, second = shard_names(bucket)[:2]
    whole = (bucket / "data" / first).read_bytes()
    (tmp_path / first).write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"{second}.12-34-0.partial").write_bytes(b"?")
    (tmp_path / f"{second}.12-34-0.partial.0A1b2C3d").write_bytes(b"?")
    proxied(lambda path, n: None)
    data = CheckedDataset(remote=REMOTE, local=str(tmp_path), batch_size=1)
    assert captions_of(data) == EXPECTED
    assert (tmp_path / first).read_bytes() == whole
    assert not list(tmp_path.glob("*.partial*"))


def loader_of(folder, tokenizer, workers, **arguments):
    data = StreamingCaptionDataset(
        remote=REMOTE,
        local=str(folder),
        tokenizer=tokenizer,
        batch_size=4,
        shuffle=True,
        max_caption_tokens=64,
        **arguments,
    )
    return caption_data_spec(data, 4, num_workers=workers).dataloader


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_shard_ends_the_epoch_with_its_name(bucket, proxied, tokenizer, tmp_path, capfd, workers):
    name = shard_names(bucket)[4]
    proxied(only(name, Fault(corrupt=True)))
    loader = loader_of(tmp_path, tokenizer, workers, download_retry=2)
    with pytest.raises(DataError) as error:
        list(loader)
    assert re.fullmatch(rf"{REMOTE}/{name} cannot be read: .*", str(error.value))
    assert capfd.readouterr().err == ""


def test_a_small_cache_is_kept_within_its_limit(bucket, proxied, tokenizer, tmp_path):
    proxy = proxied(lambda path, n: None)
    assert sum((bucket / "data" / name).stat().st_size for name in shard_names(bucket)) > 3 * CACHE_LIMIT
    loader = loader_of(tmp_path, tokenizer, 2, cache_limit=CACHE_LIMIT)
    for _ in range(2):
        samples = [sample for batch in loader for sample in batch["sample_id"].tolist()]
        assert sorted(samples) == list(range(SAMPLES))
    del loader
    shards = [path.stat().st_size for path in tmp_path.glob("*.mds")]
    assert sum(shards) <= CACHE_LIMIT
    assert sum(proxy.gets.values()) > 1.5 * len(shard_names(bucket)), "evicted shards are downloaded again"


# what is refused, and what is chosen ----------------------------------------------------------------------------------


def write(out, columns=None, hashes=(), count=4):
    columns = columns or {"image": "bytes", "caption": "str"}
    with MDSWriter(out=str(out), columns=columns, hashes=list(hashes)) as writer:
        for index in range(count):
            values = {"image": b"", "caption": f"caption {index}", "extra": index}
            writer.write({name: values[name] for name in columns})
    return str(out)


def test_pickled_columns_are_refused(tmp_path):
    remote = write(tmp_path / "data", {"image": "bytes", "caption": "str", "extra": "pkl"})
    with pytest.raises(DataError, match=r"the column 'extra' is pickled, and reading it could run code"):
        CheckedDataset(local=remote, batch_size=1)
    with pytest.raises(ValueError, match="allow_unsafe_types: pickled columns are never read"):
        CheckedDataset(local=remote, batch_size=1, allow_unsafe_types=True)


@pytest.mark.parametrize("name", ["../outside.mds", "/tmp/outside.mds"])
def test_an_index_cannot_name_files_outside(tmp_path, name):
    write(tmp_path / "data")
    index = json.loads((tmp_path / "data/index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (tmp_path / "data/index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=f"the index names a shard outside of its folder, '{name}'"):
        CheckedDataset(local=str(tmp_path / "data"), batch_size=1)


@pytest.mark.parametrize("algorithm", [None, "sha1"])
def test_the_strongest_hash_is_checked_without_asking(tmp_path, algorithm):
    remote = Path(write(tmp_path / "data", hashes=("sha1", "xxh64")))
    (shard,) = remote.glob("*.mds")
    shard.write_bytes(shard.read_bytes().replace(b"caption 3", b"caption 4"))
    data = CheckedDataset(
        remote=str(remote), local=str(tmp_path / "local"), batch_size=1, download_retry=1, validate_hash=algorithm
    )
    with pytest.raises(DataError, match="another sha1 than the index says"):
        data[0]
    del data
    with pytest.raises(
        DataError, match=r"validate_hash=md5 is not among the hashes of shard.00000.mds \(sha1, xxh64\)"
    ):
        CheckedDataset(remote=str(remote), local=str(tmp_path / "local"), batch_size=1, validate_hash="md5")
    with pytest.raises(ValueError, match="validate_hash='crc' is not a known hash"):
        CheckedDataset(remote=str(remote), local=str(tmp_path / "local"), batch_size=1, validate_hash="crc")


def test_every_hash_has_a_rank():
    from streaming.base.hashing import get_hashes

    assert set(STRONGEST_FIRST) >= {name for name in get_hashes() if "shake" not in name} - {"ripemd160", "sm3"}


def test_streams_are_mixed(tmp_path):
    streams = {
        name: {"remote": write(tmp_path / name, count=count), "local": str(tmp_path / f"cache_{name}"), **share}
        for name, count, share in (("web", 40, {"proportion": 0.75}), ("books", 10, {"proportion": 0.25}))
    }
    data = CheckedDataset(streams=streams, batch_size=1, epoch_size=40)
    samples = list(data)
    assert len(samples) == 40
    assert data.samples_per_stream.tolist() == [40, 10]
    assert [stream.choose for stream in data.streams] == [30, 10]
    assert len(list(read_captions({"streams": streams, "shuffle": True}))) == 50
    with pytest.raises(ValueError, match="needs either local, with or without remote, or streams"):
        CheckedDataset(streams=streams, local=str(tmp_path), batch_size=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "streams.web.proporton=2",
            "train_loader.dataset.streams.web.proporton is not a key of train_loader.dataset.streams.web. "
            "Did you mean 'prop",
        ),
        ("streams.web.repeat=many", "train_loader.dataset.streams.web.repeat='many': expected"),
        ("streams.web=s3://captions", "train_loader.dataset.streams.web='s3://captions': expected keys such as remote"),
        ("allow_unsafe_types=true", "train_loader.dataset.allow_unsafe_types is not a key of train_loader.dataset."),
        ("download_timeout=soon", "train_loader.dataset.download_timeout='soon': expected"),
    ],
)
def test_recipes_are_refused(override, message):
    recipe = load_recipe(ROOT / "yamls/reference.yaml", ["data.seed=17", f"train_loader.dataset.{override}"])
    with pytest.raises(ValueError, match=re.escape(message)):
        check_keys(recipe)


def test_errors_of_workers_are_one_line():
    traced = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback ...\n  File ...\n"
    error = DataError(f"{traced}{DataError.__module__}.DataError: it is gone\n")
    assert str(error) == "it is gone"
    assert isinstance(error, OneLineError)


# two ranks ------------------------------------------------------------------------------------------------------------


def recipe_file(bucket: Path, name: str, **dataset: Any) -> Path:
    """PRIOR with scores from the bucket, on images without an encoder."""
    recipe = {
        "run_name": name,
        "run_folder": f"{bucket}/runs/{name}",
        "max_duration": "15ba",
        "global_train_batch_size": 8,
        "tokenizer": {"name": str(bucket / "tokenizer")},
        "model": {
            "name": "lvlm",
            "vision": {"name": "patches", "patch_size": 24, "max_side": 96},
            "language": {
                "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
                | {"num_attention_heads": 2, "max_position_embeddings": 256}
            },
        },
        "train_loader": {
            "dataset": {"shuffle": True, "max_caption_tokens": 64, "scores": "s3://captions/scores", **dataset},
            "num_workers": 2,
        },
        "optimizer": {"name": "decoupled_adamw", "lr": 1e-3},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "2ba"},
        "algorithms": {"prior": {}},
        "save_interval": "4ba",
        "progress_bar": False,
        "autoresume": True,
        "sample_captions": 0,
    }
    path = bucket / f"{name}.yaml"
    OmegaConf.save(recipe, path)
    return path


def assert_no_secrets(bucket: Path, name: str, output: str, endpoint: str) -> None:
    written = [path.read_bytes() for path in (bucket / "runs" / name).rglob("*") if path.is_file()]
    assert written
    for secret in (*SECRETS.values(), endpoint):
        assert secret not in output
        assert not any(secret.encode() in data for data in written)


@pytest.fixture(scope="module")
def stopped(bucket: Path, server: str) -> Path:
    """The recipe of a run in which a shard stays unreadable, after it has ended."""
    name = shard_names(bucket)[3]
    recipe = recipe_file(
        bucket, "stopped", remote=REMOTE, local=str(bucket / "cache_2"), download_retry=2, predownload=4
    )
    with FaultProxy(server, only(name, Fault(corrupt=True))) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", proxy.address)
        output = fork_ranks(bucket, ROOT / "train.py", recipe, timeout=500, expect=1, patience=300)
        assert_no_secrets(bucket, "stopped", output, proxy.address)
    assert "Traceback" not in output, output[-3000:]
    errors = {line for line in output.splitlines() if line.startswith("error: ")}
    reason = "2 attempts, the last: what arrived has another xxh64 than the index says"
    line = f"error: {REMOTE}/{name} cannot be read: {reason}"
    assert {line} <= errors <= {line, "error: another rank has ended; its own message says why."}
    return recipe


@pytest.fixture(scope="module")
def runs(bucket: Path, server: str, stopped: Path) -> Path:
    """Folder of three runs: from a folder, from a bucket that fails, and gone on from where the stopped one was."""
    faults = [Fault(delay=0.5), Fault(status=500), Fault(cut=True), Fault(status=503), Fault(corrupt=True)]
    faults.append(Fault(delay=5))  # longer than the timeout
    shards, gone = of_shards(*faults, None, first=2), shard_names(bucket)[-1]

    def plan(path: str, n: int) -> Fault | None:
        if path.endswith(gone) and n == 0:
            return Fault(gone=GONE)
        if "/scores/" in path or path.endswith("index.json"):
            return (Fault(status=503), Fault(corrupt=True) if path.endswith(".mds") else Fault(cut=True), None)[
                min(n, 2)
            ]
        return shards(path, n)

    remote = {"remote": REMOTE, "local": str(bucket / "cache"), "cache_limit": CACHE_LIMIT, "download_timeout": 3}
    recipes = recipe_file(bucket, "local", local=str(bucket / "data")), recipe_file(bucket, "faults", **remote), stopped
    with FaultProxy(server, plan) as proxy:
        steps = [f"{recipe}={at}" for recipe, at in zip(recipes, (server, proxy.address, server), strict=True)]
        output = fork_ranks(bucket, ROOT / "tests/common/programs/train_each.py", *steps, timeout=500)
        assert_no_secrets(bucket, "faults", output, proxy.address)
    assert set(proxy.injected) == {*faults, Fault(gone=GONE)}
    return bucket / "runs"


def test_attempts_go_on_for_a_minute():
    assert sum(FIRST_PAUSE * 2**attempt for attempt in range(ATTEMPTS - 1)) >= 60


def test_losses_are_bitwise_those_without_faults(runs):
    assert losses(runs / "faults") == losses(runs / "local")
    assert len(losses(runs / "local")) == 15


def test_a_run_that_an_unreadable_shard_has_stopped_goes_on_bitwise(runs):
    assert losses(runs / "stopped") == losses(runs / "local")
