"""Checkpoints in a bucket: SIGTERM saves there, the newest whole one is gone on from, and foreign ones are refused."""

import runpy
from pathlib import Path

import pytest
from common.recipes import ROOT, SHRUNKEN, fork_ranks, losses, recipe
from common.s3_server import s3_server
from composer.utils import S3ObjectStore

from composer_prior.training.run import train

PREEMPT = str(ROOT / "tests/common/programs/preempt.py")
SHARDED = ["parallelism_config.fsdp2={}", "run_name=sharded"]


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
        program = [ROOT / "train.py", ROOT / "yamls/reference.yaml", *shrunken, *SHARDED, *arguments("sharded")]
        output = fork_ranks(None, *program, *preempt, expect=143)
        output += fork_ranks(None, *program, "max_duration=3ba")
        yield S3ObjectStore("runs"), output


def test_sigterm_saves_to_the_bucket_and_leaves_no_copies(bucket):
    store, output = bucket
    single, sharded = ([name.split("/", 1)[1] for name in store.list_objects(f"{n}/")] for n in ("single", "sharded"))
    assert single == ["ep0-ba2-rank0.pt", "ep0-ba3-rank0.pt"]
    shards = [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert sharded == [f"ep0-ba{batch}/{name}" for batch in (2, 3) for name in shards]
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
