"""Killed, preempted and foreign runs: what is taken for a checkpoint, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import hostile
from common.recipes import ROOT, SHRUNKEN, VIT, losses, recipe
from common.s3_server import s3_server
from composer.utils import S3ObjectStore, dist
from composer.utils.checkpoint import safe_torch_load

from composer_prior.training.checkpoints.identity import check_checkpoint
from composer_prior.training.checkpoints.pickles import ASKED_BY_COMPOSER
from composer_prior.training.checkpoints.saver import Checkpoints
from composer_prior.training.checkpoints.storage import LATEST_NAME, mend_checkpoints
from composer_prior.training.keys import check_keys
from composer_prior.training.run import train

sys.path.insert(0, str(ROOT / "tools"))
from soak_resume import kill, soak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run with a checkpoint after every second batch."""
    folder = tmp_path_factory.mktemp("saved")
    here = Path.cwd()
    os.chdir(folder)
    try:
        train(recipe("reference", "save_interval=2ba"))
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def copied(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/reference/checkpoints")


def test_a_half_written_checkpoint_is_never_taken(copied):
    whole, half = copied / "ep0-ba2-rank0.pt", copied / "ep0-ba4-rank0.pt"
    half.write_bytes(half.read_bytes()[:-100])
    (copied / LATEST_NAME).unlink()  # killed between removing the link and setting it again
    assert mend_checkpoints(copied) == whole
    assert not half.exists()
    assert (copied / LATEST_NAME).resolve() == whole.resolve()


def test_a_sharded_checkpoint_without_its_metadata_is_never_taken(tmp_path):
    for name, complete in (("ep0-ba2", True), ("ep0-ba4", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"x")
        if complete:
            (tmp_path / name / ".metadata").write_bytes(b"x")
    assert mend_checkpoints(tmp_path) == tmp_path / "ep0-ba2"
    assert not (tmp_path / "ep0-ba4").exists()


def test_a_whole_checkpoint_that_was_not_linked_yet_is_taken(copied):
    (copied / LATEST_NAME).unlink()
    (copied / LATEST_NAME).symlink_to("ep0-ba2-rank0.pt")
    assert mend_checkpoints(copied).name == "ep0-ba4-rank0.pt"


def test_nothing_to_mend(tmp_path):
    assert mend_checkpoints(tmp_path) is None


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["model.language.config.hidden_size=64"], "model.language.config.hidden_size"),
        (["model.language.config.num_hidden_layers=2", "seed=3"], "model.language.config.num_hidden_layers, seed"),
        (["tokenizer.name=data/other_tokenizer", "tokenizer.train.vocab_size=300"], "tokenizer"),
        (["data.out=data/other", "data.seed=3", "tokenizer.name=data/emoji_scenes_tokenizer"], "data"),
    ],
)
@pytest.mark.parametrize("how", ["load_path=runs/reference/checkpoints/ep0-ba2-rank0.pt", "autoresume=true"])
def test_a_checkpoint_of_another_run_is_refused(copied, overrides, keys, how):
    name = "run_name=other" if how.startswith("load_path") else "run_name=reference"
    with pytest.raises(ValueError, match=rf"is of another run: {keys} differ") as caught:
        train(recipe("reference", *overrides, name, how))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_code_is_refused_before_it_runs(copied, monkeypatch):
    hostile.one_file(copied / "ep0-ba4-rank0.pt")
    message = r"ep0-ba4-rank0.pt holds Python objects \(posix.mkdir\) and is not loaded"
    with pytest.raises(ValueError, match=message):
        train(recipe("reference", "autoresume=true"))
    for name, function in ASKED_BY_COMPOSER.items():
        monkeypatch.setenv(name, function)
    with pytest.raises(ValueError, match=message):  # whatever else leads Composer to it
        safe_torch_load(copied / "ep0-ba4-rank0.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("key", ["save_folder", "load_path"])
def test_names_that_composer_would_fill_in_are_refused(key):
    with pytest.raises(ValueError, match=f"{key}=.*: Composer's placeholders are not filled in here"):
        check_keys(recipe("reference", f"{key}='runs/{{run_name}}/checkpoints'"))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        check_checkpoint(tmp_path / "x.pt", {})


def test_a_run_that_starts_anew_replaces_the_one_before(copied):
    (copied / "ep9-ba99-rank0.pt").write_bytes(b"of an earlier run")
    train(recipe("reference", "autoresume=false"))
    assert sorted(path.name for path in copied.iterdir()) == ["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt", LATEST_NAME]


def test_a_checkpoint_of_another_kind_is_refused(copied):
    """One file where the run would read shards; Composer says so of neither kind by its name."""
    with pytest.raises(ValueError, match=r"ep0-ba4-rank0.pt is one file, and with this parallelism_config .* sharded"):
        train(recipe("reference", "autoresume=true", "parallelism_config.fsdp2={}"))


def test_going_back_leaves_what_came_after_behind(copied):
    shutil.copy(copied / "ep0-ba4-rank0.pt", copied / "ep0-ba6-rank0.pt")
    train(recipe("reference", f"load_path={copied}/ep0-ba2-rank0.pt", "autoresume=false", "max_duration=3ba"))
    assert sorted(path.name for path in copied.iterdir()) == ["ep0-ba2-rank0.pt", "ep0-ba3-rank0.pt", LATEST_NAME]


def test_the_number_of_checkpoints_holds_over_resumptions(copied):
    train(recipe("reference", "autoresume=true", "save_interval=2ba", "max_duration=6ba"))
    assert sorted(path.name for path in copied.iterdir()) == ["ep0-ba4-rank0.pt", "ep0-ba6-rank0.pt", LATEST_NAME]


def test_a_finished_run_is_reported_again(copied, capsys):
    """Also one that was stopped after its last checkpoint, before Composer had logged how much it had trained on."""
    file = copied.parent / "metrics.jsonl"
    *metrics, last = file.read_text().splitlines(keepends=True)
    stopped = {name: value for name, value in json.loads(last).items() if not name.startswith("time/")}
    file.write_text("".join(metrics) + json.dumps(stopped) + "\n")
    train(recipe("reference", "autoresume=true"))
    *again, repeated = file.read_text().splitlines(keepends=True)
    assert again == metrics
    for name in ("metrics/eval/loss", "time/batch", "time/sample", "time/token"):
        assert json.loads(repeated)[name] == json.loads(last)[name]
    assert "reference has finished already" in capsys.readouterr().out


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """A short soak, with the reference's checkpoints on the disk and the run's in a bucket; the tool kills 20 times."""
    with s3_server("soak") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert soak(tmp_path, kills=2, seed=1, bucket="s3://soak") == 0
        assert S3ObjectStore("soak").list_objects("killed-0/ep1-ba12-rank0.pt")


def test_sigterm_saves_and_says_where_the_run_resumes(copied):
    """Through the launcher, and though saving takes longer than it would wait."""
    programs = ROOT / "tests/common/programs"
    command = [sys.executable, str(programs / "impatient.py"), "launch", "nproc=1", "train", "prior_vit.yaml"]
    command += [*SHRUNKEN, *VIT, "max_duration=100000ba", "save_interval=100000ba", "autoresume=true"]
    command += [f"code_paths=[{programs / 'preempt.py'}]", "callbacks.slow_save={seconds: 4}"]
    printed, metrics = Path("printed.txt"), Path("runs/prior_vit/metrics.jsonl")
    with printed.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, printed.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, printed.read_text()[-5000:]
    finally:
        if process.poll() is None:
            kill(process)
    output = printed.read_text()
    assert "goes on from there" in output
    assert "Traceback" not in output
    batch = int(output.split("was stopped by SIGTERM after batch ")[1].split()[0])
    train(recipe("prior_vit", f"max_duration={batch + 2}ba", "autoresume=true"))
    assert [number for number, _ in losses("runs/prior_vit")] == list(range(batch + 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_has_a_link_to_the_latest(rank, monkeypatch):
    """Composer lets every rank of a sharded run remove the link, also after the first one has made it."""
    monkeypatch.setattr(dist, "get_global_rank", lambda: rank)
    assert (Checkpoints(recipe("prior_vit")).latest_filename is None) == (rank != 0)
