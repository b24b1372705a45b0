"""A run and the Hub: what is refused before it starts, and its model there at the end."""

from pathlib import Path

import pytest
from common.commands import train as main
from common.data import write_tiles
from common.hub import TOKEN, serving
from common.recipes import ALONE, NO_REPORT, ROOT, SHRUNKEN, TOWER, VIT
from composer.core import Callback
from huggingface_hub import HfFileSystem

from composer_prior.data.hub import push
from composer_prior.registry import register
from composer_prior.training import trainer, validate
from composer_prior.training.config import load_recipe
from composer_prior.training.run import _check_data

RECIPE = str(ROOT / "yamls/ntp_vit.yaml")


@register("callback", "hub_fails")
class HubFails(Callback):
    hub = None

    def fit_end(self, state, logger):
        self.hub.fails = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path / "cache") as served:
        yield served


def test_the_model_of_a_run_is_pushed_and_a_run_ends_well_if_it_cannot_be(hub, tiles, monkeypatch, capsys):
    monkeypatch.setattr(HubFails, "hub", hub)
    command = [RECIPE, *SHRUNKEN, *VIT, *tiles, "max_duration=1ba", "save_folder=null", "push_to_hub=u/run"]
    main([*command, "callbacks.hub_fails={}"])
    assert "models/u/run" in hub.private, "made before the training"
    folder = Path("runs/ntp_vit/model")
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "u/run" in line)
    assert said.startswith(f"{folder} was not pushed to u/run: ")
    assert f"to push it: hf upload u/run {folder} --repo-type model " in said
    hub.fails = False
    push(folder, "u/run", "model")
    assert capsys.readouterr().out.endswith("/u/run\n")
    pushed = hub.repositories["models/u/run"][-1]
    files = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}
    assert pushed == files
    assert {"config.json", "model.safetensors", "README.md"} <= {*pushed}
    left = [file for file in Path("runs").rglob("*") if file.is_file()]
    assert b"push_to_hub: u/run" in Path("runs/ntp_vit/config.yaml").read_bytes()
    assert not [file for file in left if TOKEN.encode() in file.read_bytes()]


def test_helpers_are_pushed_when_no_rank_waits_for_the_first_one(monkeypatch):
    done = []
    monkeypatch.setattr(trainer, "complete", lambda recipe, _: done.append(recipe.run_name))
    monkeypatch.setattr(trainer, "push", lambda folder, name, kind: done.append((str(folder), name, kind)))
    names = ["run_name=run", "reference.run_name=reference", "push_to_hub=u/run", "reference.push_to_hub=u/reference"]
    trainer.finish(load_recipe("prior_vit.yaml", names), None)
    assert done == ["run", ("runs/reference/model", "u/reference", "model"), ("runs/run/model", "u/run", "model")]


def test_a_run_that_leaves_no_model_folder_is_refused_before_it_trains(hub, tiles, monkeypatch):
    def fails(_):
        raise ValueError("a model with the tower Mine cannot be saved in Hugging Face format")

    monkeypatch.setattr(validate, "empty_copy", fails)
    with pytest.raises(SystemExit, match="push_to_hub=u/run: the run would leave no model folder: a model with the to"):
        main([RECIPE, *SHRUNKEN, *VIT, *tiles, "max_duration=1ba", "save_folder=null", "push_to_hub=u/run"])
    assert not Path("runs/ntp_vit/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train=hf://datasets/u/shades"],
            r"hf://datasets/u/shades: no index\.json there\. Convert it: composer-prior convert hf://datasets/u/shades "
            r"data/captions; then train=data/captions\.",
        ),
        (["push_to_hub=u/run"], r"push_to_hub=u/run: the hub denies access; log in"),
        (["push_to_hub=no/such/name"], r"push_to_hub=no/such/name: Repo id must be in the form"),
        (["train=hf://datasets/u/secret"], r"hf://datasets/u/secret cannot be read: the hub denies access; log in"),
        (["train=hf://datasets/u/shades", "push_to_hub=u/run"], r"no index\.json there"),
    ],
)
def test_what_the_hub_will_not_do_is_refused_before_anything_is_made(hub, monkeypatch, words, message):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hub.commit("datasets/u/shades", {"train.parquet": b"PAR1"})
    hub.commit("datasets/u/secret", {"index.json": b"{}"})
    hub.private.add("datasets/u/secret")
    with pytest.raises(SystemExit, match=message) as error:
        main([RECIPE, *SHRUNKEN, *TOWER, *ALONE, *NO_REPORT, *words])
    assert "hf_other" not in str(error.value)
    assert not Path("data").exists()
    assert not Path("runs/ntp_vit/model").exists()


def test_a_converted_data_set_of_the_hub_is_trained_on(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(write_tiles(tmp_path / "tiles", 16))
    hub.commit("datasets/u/mds", {file.name: file.read_bytes() for file in folder.iterdir()})
    changes = [
        *ALONE,
        *NO_REPORT,
        "eval_loader=null",
        "train=hf://datasets/u/mds",
        "max_duration=2ba",
        "save_folder=null",
    ]
    main([RECIPE, *SHRUNKEN, *TOWER, *changes])
    assert len(Path("runs/ntp_vit/metrics.jsonl").read_text().splitlines()) == 3
    hub.fails, recipe = True, load_recipe(RECIPE, changes)
    HfFileSystem.clear_instance_cache()
    _check_data(recipe)  # a copy is there
    Path(recipe.train_loader["dataset"]["local"], "index.json").unlink()
    with pytest.raises(ValueError, match=r"^hf://datasets/u/mds cannot be read: .*413"):
        _check_data(recipe)
