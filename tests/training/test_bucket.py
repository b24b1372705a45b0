"""Checkpoints in a bucket: SIGTERM saves there, the newest whole one is gone on from, and foreign ones are refused."""

import runpy
from pathlib import Path

import pytest
from common import hostile
from common.recipes import ROOT, SHRUNKEN, fork_ranks, losses, recipe
from common.s3_server import s3_server
from composer.utils import S3ObjectStore

from composer_prior.training.checkpoints.identity import read_identity
from composer_prior.training.checkpoints.start import find_start
from composer_prior.training.run import train

pytestmark = pytest.mark.slow

PREEMPT = str(ROOT / "tests/common/programs/preempt.py")
ONE_FILE, SHARDED, SHARDS = "ep0-ba3-rank0.pt", "ep0-ba3", (".metadata", "__0_0.distcp", "__1_0.distcp")


def arguments(name):
    return [f"save_folder=s3://runs/{name}", "autoresume=true", "save_interval=2ba"]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket after SIGTERM in the third batch of a run in one process and of one on two ranks with FSDP2."""
    folder = tmp_path_factory.mktemp("here")
    with s3_server("runs") as environment, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        runpy.run_path(PREEMPT)
        preempt = [f"code_paths=[{PREEMPT}]", "callbacks.preempt={batch: 3}"]
        with pytest.raises(SystemExit) as caught:
            train(recipe("reference", *arguments("single"), *preempt))
        assert caught.value.code == 143
        shrunken = [override.removeprefix("reference.") for override in SHRUNKEN]
        program = [ROOT / "train.py", ROOT / "yamls/reference.yaml", *shrunken, *arguments("sharded")]
        program += ["parallelism_config.fsdp2={}", "run_name=sharded"]
        output = fork_ranks(None, *program, *preempt, expect=143)
        output += fork_ranks(None, *program, "max_duration=3ba")
        yield S3ObjectStore("runs"), output


def test_sigterm_saves_to_the_bucket_and_leaves_no_copies(bucket):
    store, output = bucket
    single, sharded = ([name.split("/", 1)[1] for name in store.list_objects(f"{n}/")] for n in ("single", "sharded"))
    assert single == ["ep0-ba2-rank0.pt", "ep0-ba3-rank0.pt"]
    assert sharded == [f"ep0-ba{batch}/{shard}" for batch in (2, 3) for shard in SHARDS]
    assert "s3://runs/sharded/ep0-ba3 is saved; the same command with autoresume=true goes on from there" in output
    assert {path.name for path in Path.cwd().iterdir()} == {"data", "runs"}
    assert not Path("runs/reference/checkpoints").exists()


def test_autoresume_goes_on_from_the_newest_in_the_bucket(bucket, capsys):
    _, output = bucket
    assert "sharded has finished already" in output
    train(recipe("reference", *arguments("single"), "max_duration=3ba"))
    assert "reference has finished already" in capsys.readouterr().out
    for run in ("reference", "sharded"):
        assert [batch for batch, _ in losses(f"runs/{run}")] == [0, 1, 2]


@pytest.fixture
def again(bucket, tmp_path):
    """Put changed copies of the last two checkpoints into the bucket, and find where a run goes on there."""
    store, _ = bucket
    for name in (f"single/{ONE_FILE}", *(f"sharded/{SHARDED}/{shard}" for shard in SHARDS)):
        store.download_object(name, tmp_path / name.split("/", 1)[1])
    identity = read_identity(tmp_path / ONE_FILE)

    def find(*names, **changes):
        folder = f"{tmp_path.name}-{len(names)}"
        for name in names:
            store.upload_object(f"{folder}/{name}", tmp_path / name)
        kind = ["parallelism_config.fsdp2={}"] if names and "/" in names[0] else []
        resumed = recipe("reference", f"save_folder=s3://runs/{folder}", "autoresume=true", *kind)
        found, _ = find_start(resumed, {**identity, **changes})
        return found and found.removeprefix(f"s3://runs/{folder}/")

    return tmp_path, find


def test_a_checkpoint_that_lacks_a_shard_or_has_one_of_another_attempt_is_passed_over(again):
    folder, find = again
    older = folder / "ep0-ba1-rank0.pt"
    older.write_bytes((folder / ONE_FILE).read_bytes())
    assert find() is None
    assert find(older.name, f"{SHARDED}/.metadata", f"{SHARDED}/__0_0.distcp") == older.name
    with (folder / f"{SHARDED}/__1_0.distcp").open("ab") as shard:
        shard.write(b"?")
    assert find(older.name, *(f"{SHARDED}/{shard}" for shard in SHARDS)) == older.name


@pytest.mark.parametrize("names", [[ONE_FILE], [f"{SHARDED}/{shard}" for shard in SHARDS]], ids=["one file", "sharded"])
def test_a_checkpoint_of_another_run_in_a_bucket_is_refused(again, names):
    _, find = again
    assert find(*names) == names[0].split("/")[0]
    with pytest.raises(
        ValueError, match=r"^s3://runs/\S+/ep0-ba3\S* is of another run: seed differ \(seed: 17 there, 3"
    ):
        find(*names, seed=3)


@pytest.mark.parametrize("plant", [hostile.one_file, hostile.metadata, hostile.value, hostile.file_elsewhere])
def test_code_in_a_bucket_is_not_run(again, plant):
    folder, find = again
    names = [ONE_FILE] if plant == hostile.one_file else [f"{SHARDED}/{shard}" for shard in SHARDS]
    plant(folder / names[0].split("/")[0])
    with pytest.raises(ValueError, match=r"^s3://runs/\S+ (holds Python objects|names files that do not belong)"):
        find(*names)
    assert not Path("executed").exists()


def test_a_new_run_does_not_mix_with_another_in_a_bucket(bucket):
    """It is told before anything is made, and so is one that cannot read its bucket."""
    for overrides, message in (
        (["save_folder=s3://runs/single"], "s3://runs/single/ep0-ba3-rank0.pt is of an earlier run"),
        (["save_folder=s3://nowhere/single", "autoresume=true"], "s3://nowhere/single: cannot be listed"),
        (["load_path=s3://runs/single/ep0-ba9-rank0.pt"], "s3://runs/single/ep0-ba9-rank0.pt is not there"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            train(recipe("reference", "autoresume=false", "run_name=new", *overrides))
        assert "\n" not in str(caught.value)
        assert not Path("runs/new").exists()
