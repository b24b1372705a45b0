"""What a run wrote is replaced, what it did not stays; a damaged checkpoint is passed over for an older one."""

import json
import shutil
from pathlib import Path

import pytest
from common.recipes import losses, recipe

from composer_prior.training.checkpoints.pickles import DamagedError
from composer_prior.training.checkpoints.storage import LATEST_NAME, check_sums, newest_checkpoint
from composer_prior.training.keys import check_keys
from composer_prior.training.run import train

pytestmark = pytest.mark.slow

EVERY_SECOND = "save_interval=2ba"
KINDS = {"reference": [], "sharded": ["run_name=sharded", "parallelism_config.fsdp2={}"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two finished runs with checkpoints after batches 2 and 4, in one file and sharded."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in KINDS.values():
            train(recipe("reference", EVERY_SECOND, *kind))
    return folder


@pytest.fixture
def copied(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeroed(file, place, size=2000):
    data = bytearray(file.read_bytes())
    begin = int(len(data) * place)
    data[begin : begin + size] = bytes(size)
    file.write_bytes(data)


def shard(folder):
    return next(folder.glob("*.distcp"))


DAMAGES = {
    "cut": ("reference", cut),
    "without a head": ("reference", lambda file: zeroed(file, 0)),
    "without a middle": ("reference", lambda file: zeroed(file, 0.5)),
    "empty metadata": ("sharded", lambda folder: (folder / ".metadata").write_bytes(b"")),
    "cut metadata": ("sharded", lambda folder: cut(folder / ".metadata")),
    "no shard": ("sharded", lambda folder: shard(folder).unlink()),
    "cut shard": ("sharded", lambda folder: cut(shard(folder))),
    "shard without a middle": ("sharded", lambda folder: zeroed(shard(folder), 0.5)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copied, capsys, damage):
    name, harm = DAMAGES[damage]
    newest = newest_checkpoint(copied / name / "checkpoints")
    whole = losses(copied / name)
    harm(newest)
    train(recipe("reference", EVERY_SECOND, "autoresume=true", *KINDS[name]))
    said = capsys.readouterr().out
    assert damage == "cut" or f"{newest}" in said.split("The one before it is taken")[0]
    assert "finished already" not in said
    check_sums(newest)
    assert losses(copied / name) == whole


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_copied_without_links_goes_on(copied, name):
    shutil.copytree(copied / name, copied / "copy")
    shutil.rmtree(copied / name)
    (copied / "copy").rename(copied / name)
    metrics, latest = copied / name / "metrics.jsonl", copied / name / "checkpoints" / LATEST_NAME
    assert not latest.is_symlink()
    before = losses(copied / name)
    metrics.write_bytes(metrics.read_bytes()[:-40])
    train(recipe("reference", EVERY_SECOND, "autoresume=true", "max_duration=6ba", *KINDS[name]))
    assert latest.is_symlink()
    assert [batch for batch, _ in losses(copied / name)] == [*range(6)]
    assert losses(copied / name)[: len(before)] == before


def test_a_damaged_checkpoint_gives_no_weights(copied):
    for name, place in (("reference", lambda path: path), ("sharded", shard)):
        newest = newest_checkpoint(copied / name / "checkpoints")
        zeroed(place(newest), 0.1, int(0.8 * place(newest).stat().st_size))
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            train(recipe("reference", "run_name=other", f"init_from={newest}"))
        with pytest.raises(DamagedError, match="is not a whole checkpoint"):
            train(recipe("reference", f"load_path={newest}", "autoresume=false", *KINDS[name]))


def test_a_run_leaves_what_is_not_its_own(copied):
    folder = copied / "reference"
    foreign = [folder / "notes.txt", folder / "checkpoints/ep0-ba2-notes.txt", folder / "model/mine/deep.txt"]
    foreign += [copied / "sharded/checkpoints/ep0-ba2/notes.txt", folder / "model/adapter.safetensors"]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    stale = folder / "model/model-00001-of-00002.safetensors"
    marked = folder / "model/.composer-prior.json"
    stale.write_text("of the run before")
    marked.write_text(json.dumps([*json.loads(marked.read_text()), stale.name]))
    for kind in KINDS.values():
        train(recipe("reference", EVERY_SECOND, "max_duration=3ba", "autoresume=false", *kind))
    assert all(file.read_text() == "mine" for file in foreign)
    assert not stale.exists()
    assert sorted(path.name for path in (folder / "checkpoints").glob("*.pt")) == [
        "ep0-ba2-rank0.pt",
        "ep0-ba3-rank0.pt",
        LATEST_NAME,
    ]
    assert not [*folder.glob(".*")]


def test_folders_that_no_run_has_written_are_refused(copied):
    theirs = Path("theirs")
    (theirs / "model").mkdir(parents=True)
    (theirs / "model/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"^run_folder: theirs/model was not written by a run"):
        train(recipe("reference", "run_folder=theirs"))
    with pytest.raises(ValueError, match=r"^reference.run_folder: theirs/model was not written by a run"):
        train(recipe("prior_vit", "reference.run_folder=theirs"))
    (theirs / "config.yaml").write_text("name: mine")
    with pytest.raises(ValueError, match=r"^run_folder: theirs/config.yaml was not written by a run"):
        train(recipe("reference", "run_folder=theirs", "autoresume=true"))
    assert (theirs / "config.yaml").read_text() == "name: mine"


@pytest.mark.parametrize("name", ["a/../../b", "..", "."])
def test_a_run_stays_within_its_folder(name):
    with pytest.raises(ValueError, match=f"^run_name={name}: it names a folder in runs/"):
        check_keys(recipe("reference", f"run_name={name}"))
    with pytest.raises(ValueError, match=f"^reference.run_name={name}: it names"):
        check_keys(recipe("prior_vit", f"reference.run_name={name}"))
    check_keys(recipe("reference", "run_name=group/v1..2"))


def test_what_is_no_checkpoint_says_what_it_is(copied):
    newest = {name: newest_checkpoint(copied / name / "checkpoints") for name in KINDS}
    for place, said in {
        "runs/reference/model": "this is a model, .*; init_from starts a run from its weights",
        "runs/reference": f"this is a folder; name a checkpoint in it, such as {newest['reference']}",
        "runs/sharded/checkpoints": f"this is a folder; name a checkpoint in it, such as {newest['sharded']}",
        "data": "this is a folder; name a checkpoint",
    }.items():
        with pytest.raises(ValueError, match=f"^load_path={place}: {said}$"):
            train(recipe("reference", f"load_path={place}", "autoresume=false", "run_name=other"))
