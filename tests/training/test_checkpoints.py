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
import torch
from common.recipes import ROOT, SHRUNKEN, VIT, losses, recipe

from composer_prior.training.checkpoints import LATEST_NAME, check_checkpoint, mend_checkpoints
from composer_prior.training.run import train

sys.path.insert(0, str(ROOT / "tools"))
from soak_resume import kill, soak


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


def test_a_checkpoint_with_code_is_refused_before_it_runs(copied):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    path = copied / "ep0-ba4-rank0.pt"
    torch.save({"state": {"callbacks": {}, "x": Hostile()}}, path)
    with pytest.raises(ValueError, match=r"holds Python objects \(posix.mkdir\) and is not loaded"):
        train(recipe("reference", "autoresume=true"))
    assert not Path("executed").exists()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        check_checkpoint(tmp_path / "x.pt", {})


def test_a_run_that_starts_anew_replaces_the_one_before(copied):
    (copied / "ep9-ba99-rank0.pt").write_bytes(b"of an earlier run")
    train(recipe("reference", "autoresume=false"))
    assert sorted(path.name for path in copied.iterdir()) == ["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt", LATEST_NAME]


def test_a_finished_run_is_reported_again(copied, capsys):
    metrics = (copied.parent / "metrics.jsonl").read_text().splitlines()
    train(recipe("reference", "autoresume=true"))
    again = (copied.parent / "metrics.jsonl").read_text().splitlines()
    assert again[:-1] == metrics[:-1]
    assert json.loads(again[-1])["metrics/eval/loss"] == json.loads(metrics[-1])["metrics/eval/loss"]
    assert "reference has finished already" in capsys.readouterr().out


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    """A short soak; tools/soak_resume.py kills 20 times."""
    assert soak(tmp_path, kills=2, seed=1) == 0


def test_sigterm_saves_and_says_where_the_run_resumes(copied):
    composer = str(Path(sys.executable).with_name("composer"))
    command = [composer, str(ROOT / "train.py"), str(ROOT / "yamls/prior_vit.yaml"), *SHRUNKEN, *VIT]
    command += ["max_duration=100000ba", "save_interval=100000ba", "autoresume=true"]
    printed, metrics = Path("printed.txt"), Path("runs/prior_vit/metrics.jsonl")
    with printed.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, printed.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        if process.poll() is None:
            kill(process)
    output = printed.read_text()
    assert "was stopped by SIGTERM after batch" in output
    assert "goes on from there" in output
    assert "[rank0]: Traceback" not in output  # the launcher prints one of its own
    batch = int(output.split("was stopped by SIGTERM after batch ")[1].split()[0])
    train(recipe("prior_vit", f"max_duration={batch + 2}ba", "autoresume=true"))
    assert [number for number, _ in losses("runs/prior_vit")] == list(range(batch + 2))
