"""A study's YAML: its cells, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from common.recipes import ROOT
from common.studies import study_content, write_study
from omegaconf import OmegaConf

from composer_prior.studies.shared import preparations, share
from composer_prior.studies.study import as_words, differences, read_study


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(overrides=None, out="out", **changes):
    return read_study(write_study("study.yaml", **changes), overrides, out)


def axes(**changes):
    return {**study_content()["axes"], **changes}


def test_cells_stand_in_the_order_of_the_grids_and_once():
    study = read()
    assert [cell.name for cell in study.cells] == [
        *("ntp-seed1", "ntp-seed2", "prior-seed1", "prior-seed2", "floor-seed1", "floor-seed2"),
        *("ntp-steps2-seed1", "prior-steps2-seed1"),
    ]
    assert study.cells[0].values == {"method": "ntp", "steps": "4", "seed": "1"}
    assert study.cells[-1].values == {"method": "prior", "steps": "2", "seed": "1"}
    recipes = study.recipes
    assert recipes["ntp-seed2"].algorithms["prior"] is None
    assert recipes["ntp-seed2"].train_loader["dataset"]["scores"] is None
    assert recipes["ntp-seed2"].seed == 2
    assert recipes["ntp-seed2"].reference["seed"] == 17
    assert recipes["floor-seed1"].algorithms["prior"]["floor"] == 0.1
    assert recipes["prior-steps2-seed1"].max_duration == "2ba"
    assert list(study.averaged) == ["validation/loss"]
    assert study.header["grids"] == {  # as the YAML has them, with text for values
        "methods": {"method": "all", "seed": "all"},
        "compute": {"method": ["ntp", "prior"], "steps": "all", "seed": "1", "scaling": "samples"},
    }


def test_a_baseline_may_be_a_number():
    grids = {"a": {"method": "all", "baseline": 0.1}}
    study = read(axes=axes(method={"ntp": {}, 0.1: {"algorithms.prior.floor": 0.1}}), grids=grids)
    assert [grid.baseline for grid in study.grids] == ["0.1"]


def test_a_missing_recipe_of_a_cell_is_a_missing_file():
    cell = replace(read().cells[0], recipe=Path("nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match=r"^Cell ntp-seed1: The recipe nowhere\.yaml does not exist"):
        cell.load()


def test_an_axis_may_name_another_recipe():
    patch = str(ROOT / "yamls/prior_patch.yaml")
    family = {"vit": {}, "patch": {"recipe": patch}}
    overrides = {"max_duration": "4ba"}
    study = read(
        axes=axes(family=family), grids={"families": {"family": "all"}}, recipe="prior_vit.yaml", overrides=overrides
    )
    assert [cell.name for cell in study.cells] == ["ntp-seed1", "ntp-patch-seed1"]
    towers = [study.recipes[cell.name].model["vision"]["name"] for cell in study.cells]
    assert towers[0] == "open_clip"
    assert towers[1] != "open_clip"
    assert list(study.header["recipes"]) == ["prior_vit.yaml", patch]
    assert study.header["recipes"]["prior_vit.yaml"]["max_duration"] == "600ba"


def test_a_recipe_is_found_beside_the_study_and_values_may_name_its_folder():
    Path("studies").mkdir()
    Path("mine.yaml").write_text((ROOT / "yamls/reference.yaml").read_text().replace("emoji_scenes.yaml", "data.yaml"))
    Path("data.yaml").write_text((ROOT / "yamls/emoji_scenes.yaml").read_text())
    changes = {"axes": {"method": {"ntp": {}}, "seed": [1]}, "grids": {"all": {"seed": "all"}}}
    file = write_study("studies/s.yaml", recipe="../mine.yaml", overrides={"init_from": "{out}/weights"}, **changes)
    study = read_study(file, {}, "there")
    assert study.cells[0].recipe == Path("mine.yaml")
    assert study.recipes["ntp-seed1"].init_from == "there/weights"
    assert study.header["overrides"] == {"init_from": "{out}/weights"}


@pytest.mark.parametrize(
    "value",
    [
        *("300ba", 3, 3.5, 1e-5, True, None, "true", "3", "a: b", "{a", "[1, 2", 'it\'s "x"', "", "ä 🖼", "a=b", "#"),
        *("a #b", "${data.out}/x", [1, "2", None], {}, "null", " x ", "line\nbreak", [{"a": "b"}], "1e-5", "~"),
    ],
)
def test_values_survive_the_command_line(value):
    (word,) = as_words({"some.key": value})
    read = OmegaConf.to_container(OmegaConf.from_dotlist([word]))["some"]["key"]
    assert read == value
    assert type(read) is type(value)


def test_overrides_of_the_command_line_are_of_every_cell():
    study = read({"global_train_batch_size": 4})
    assert {recipe.global_train_batch_size for recipe in study.recipes.values()} == {4}
    assert study.header["overrides"]["global_train_batch_size"] == 4
    with pytest.raises(ValueError, match=r"study\.yaml: seed is set by every value of the axis seed; change them"):
        read({"seed": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basline": "ntp"}, r"study\.yaml: basline is not a key of a study\. Did you mean 'baseline'"),
        ({"grids": {}}, r"lacks grids"),
        ({"axes": {"seed": [1]}}, r"axes lacks method"),
        ({"axes": {"method": {"ntp": {}}}}, r"axes lacks seed"),
        ({"axes": {"method": 3, "seed": [1]}}, r"axes\.method must hold values"),
        ({"baseline": "npt"}, r"baseline=npt is not a value of the axis method\. Did you mean 'ntp'"),
        (
            {"figures": {"averaged": {"validation/loss": "better"}}},
            r"averaged\.validation/loss=better: expected higher",
        ),
        ({"figures": {"average": {}}}, r"figures\.average is not a key\. Did you mean 'averaged'"),
        ({"figures": {"averaged": {"loss": "lower"}}}, r"loss is not BENCHMARK/FIGURE"),
        ({"fits": {"validation/loss": 3}}, r"fits\.validation/loss=3: expected higher or lower"),
        ({"grids": {"a": {"methd": "all"}}}, r"grids\.a\.methd is not an axis\. Did you mean 'method'"),
        ({"grids": {"a": {"method": "nptt"}}}, r"grids\.a\.method=nptt is not a value of that axis"),
        ({"grids": {"a": {"method": []}}}, r"grids\.a\.method is an empty list"),
        ({"grids": {"a": {}}}, r"grids\.a must hold axes"),
        ({"grids": {"a": {"method": "all", "scaling": "flop"}}}, r"grids\.a\.scaling=flop\. Did you mean 'flops'"),
        ({"baseline": ["ntp"]}, r"baseline=\['ntp'\] is not a value of the axis method"),
        ({"grids": {"a": {"method": "all", "baseline": ["ntp"]}}}, r"grids\.a\.baseline=\['ntp'\] is not a value"),
        (
            {"grids": {"a": {"method": "all", "baseline": "npt"}}},
            r"grids\.a\.baseline=npt is not .* Did you mean 'ntp'",
        ),
        ({"recipe": "nowhere.yaml"}, r"The recipe nowhere\.yaml does not exist"),
        ({"name": "a/b"}, r"name='a/b': a folder is named so"),
        (
            {"axes": axes(steps={4: {}, 2: {"max_durtion": "2ba"}})},
            r"Cell ntp-steps2-seed1: .*Did you mean 'max_duration'",
        ),
        (
            {"axes": axes(steps={4: {}, 2: {"reference.train_loader.dataset.packing_ratio": 2}})},
            r"the cell \S+-steps2-seed1 has packing_ratio, and a study counts samples, not rows; leave it out",
        ),
        (
            {"axes": axes(steps={4: {}, 2: {"seed": 3}})},
            r"ntp-steps2-seed1: the axes steps \(seed\) and seed \(seed\) set",
        ),
        (
            {"axes": axes(steps={4: {}, 2: {"algorithms.prior.floor": 0.3}})},
            r"the axes method \(algorithms\.prior\) and steps \(algorithms\.prior\.floor\) set the same key",
        ),
        (
            {"axes": axes(method={"ntp": {}, "a b": {}, "a/b": {"seed": 1}}), "grids": {"a": {"method": "all"}}},
            r"are both named a_b-seed1; rename a value",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        read(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("overrides", [["seed"], "seed=1"])
def test_overrides_without_keys_are_refused_in_one_line(overrides):
    with pytest.raises(ValueError, match=r"^study\.yaml: overrides must hold keys and values\.$"):
        read_study(write_study("study.yaml", overrides=overrides))


def test_files_that_hold_no_study():
    with pytest.raises(FileNotFoundError, match=r"The study nowhere\.yaml does not exist"):
        read_study("nowhere.yaml")
    Path("list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold keys and values"):
        read_study("list.yaml")
    Path("bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not a readable YAML file"):
        read_study("bad.yaml")


def test_what_decides_the_cells_may_not_change_and_the_rest_may():
    there = json.loads(json.dumps(read().header))
    assert differences(there, read().header) == []
    more = axes(seed=[1, 2, 3], lr={"low": {}, "high": {"optimizer.lr": 0.1}})
    assert differences(there, read(axes=more, grids={"new": {"seed": 3}}, baseline="prior", curve=None).header) == []
    method = {**axes()["method"], "floor": {"algorithms.prior.floor": 0.3}}
    found = differences(there, read(axes=axes(method=method)).header)
    assert found == ["axes.method.floor.algorithms.prior.floor: 0.1 there, 0.3 here"]
    found = differences(there, read({"max_duration": "9ba"}).header)
    assert found == ["overrides.max_duration: 4ba there, 9ba here"]
    found = differences(there, read(axes=axes(steps={4: {"max_duration": "4ba"}, 2: {"max_duration": "2ba"}})).header)
    assert found == ["axes.steps.4: {} there, nothing here", "axes.steps.4.max_duration: nothing there, 4ba here"]
    found = differences(there, read(axes=axes(seed=[1]), grids={"a": {"method": "ntp"}}).header)
    assert found == ["axes.seed.2.seed: 2 there, nothing here"]
    changed = json.loads(json.dumps(there))
    changed["recipes"][there["recipe"]]["optimizer"]["lr"] = 1.0
    assert differences(changed, there) == [f"recipes.{there['recipe']}.optimizer.lr: 1.0 there, 0.002 here"]
    older = json.loads(json.dumps(there))  # of a version that had no compile_config
    del older["recipes"][there["recipe"]]["compile_config"]
    del older["recipes"][there["recipe"]]["reference"]["compile_config"]
    assert differences(older, there) == []
    bare = {**there, "overrides": {}}
    found = differences(bare, {**bare, "overrides": {"max_duration": "9ba"}})
    assert found == ["overrides.max_duration: nothing there, 9ba here"]
    found = differences(there, read(axes=axes(steps={8: {}}), grids={"a": {"method": "all"}}).header)
    assert found == [
        "axes.steps.4: {} there, nothing here",
        "axes.steps.2.max_duration: 2ba there, nothing here",
    ]
    default = axes(lr={"high": {"optimizer.lr": 0.1}})
    assert differences(there, read(axes=default).header) == ["axes.lr.high.optimizer.lr: nothing there, 0.1 here"]


def test_cells_of_the_same_parts_share_them():
    more = {
        **axes()["method"],
        "live": {"train_loader.dataset.scores": None},
        "small": {"tokenizer.train.vocab_size": 300},
        "own": {"data.out": "mine", "reference.run_folder": "theirs"},
    }
    study = read(axes=axes(method=more), grids={"all": {"method": "all", "seed": "all"}})
    shared = {cell.name: share(study.recipes[cell.name], cell.overrides, Path("shared")) for cell in study.cells}
    keys = {"data.out", "tokenizer.name", "reference.run_folder"}
    assert set(shared["ntp-seed1"].overrides) == keys
    assert set(shared["prior-seed1"].overrides) == keys | {"train_loader.dataset.scores"}
    assert shared["prior-seed1"] == shared["prior-seed2"] == shared["floor-seed1"]
    assert shared["live-seed1"] == shared["ntp-seed2"]
    assert shared["ntp-seed1"].places < shared["prior-seed1"].places
    small, prior = shared["small-seed1"].overrides, shared["prior-seed1"].overrides
    assert small["data.out"] == prior["data.out"]
    assert small["tokenizer.name"] != prior["tokenizer.name"]
    assert small["reference.run_folder"] != prior["reference.run_folder"]
    assert set(shared["own-seed1"].overrides) == {"tokenizer.name", "train_loader.dataset.scores"}
    assert {"mine", "theirs"} < shared["own-seed1"].places
    recipe = study.cells[2].load(prior)
    assert recipe.model["language"]["pretrained"] == f"{prior['reference.run_folder']}/model"
    assert recipe.train_loader["dataset"]["local"] == f"{prior['data.out']}/train"
    assert recipe.reference["train_loader"]["dataset"]["local"] == f"{prior['data.out']}/train"
    assert recipe.reference["tokenizer"]["name"] == prior["tokenizer.name"]
    assert Path(recipe.train_loader["dataset"]["scores"]).parent == Path(prior["reference.run_folder"])


def test_a_preparation_makes_all_that_its_cells_need():
    a, b, c = frozenset("a"), frozenset("ab"), frozenset("c")
    assert preparations([a, b, frozenset(), c, a, b]) == [1, 1, None, 3, 1, 1]
