"""A user's own data, given once: what is made from them follows."""

import shutil
from pathlib import Path

import pytest
from common.data import write_tiles
from common.recipes import SHRUNKEN, TOWER, losses

from composer_prior.training.builders import build_loaders
from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

SMALL = [word for word in SHRUNKEN if not word.startswith("data.")]


def test_run_reference_tokenizer_and_scores_follow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiles(Path("my/train"), 16)
    write_tiles(Path("my/validation"), 8)
    own = ["train=my/train", "validation=my/validation"]
    train(load_recipe("prior_vit.yaml", [*own, "run_name=mine", *SMALL, *TOWER]))
    assert not Path("data").exists()
    assert "eval/" not in Path("runs/mine/metrics.jsonl").read_text().replace("metrics/eval/", "")  # no emoji scenes
    assert len(losses("runs/mine")) == 4
    (reference,) = Path("runs").glob("reference-my-train-*")
    assert {"model", "tokenizer", "scores"} <= {path.name for path in reference.iterdir()}
    capsys.readouterr()
    train(load_recipe("ntp_vit.yaml", [*own, "run_name=plain", *SMALL, *TOWER]))
    output = capsys.readouterr().out
    assert f"Reference: reusing {reference}/model" in output
    assert f"Tokenizer: reusing {reference}/tokenizer" in output
    shutil.rmtree("my/train")
    write_tiles(Path("my/train"), 24)
    with pytest.raises(ValueError, match="was made from other data than the run's"):
        train(load_recipe("ntp_vit.yaml", [*own, "run_name=plain", *SMALL, *TOWER]))


def test_the_tower_of_the_embedded_data_is_not_that_of_other_data():
    own = load_recipe("prior_vit.yaml", ["train=my/train"])
    assert own.model["vision"] | {"pretrained": None, "freeze": False} == own.model["vision"]
    asked = load_recipe("prior_vit.yaml", ["train=my/train", "model.vision.pretrained=emoji_scenes"])
    assert asked.model["vision"]["pretrained"] == "emoji_scenes"
    embedded = load_recipe("prior_vit.yaml")
    assert embedded.model["vision"] | {"pretrained": "emoji_scenes", "freeze": True} == embedded.model["vision"]
    large = load_recipe("prior_vit_l_14_336.yaml", ["train=my/train"])
    assert large.model["vision"]["pretrained"] == load_recipe("prior_vit_l_14_336.yaml").model["vision"]["pretrained"]


def test_overrides_win(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    recipe = load_recipe(
        "prior_vit_l_14_336.yaml",
        ["train=s3://here/train", "train_loader.dataset.scores=null", "train_loader.dataset.cache_limit=1gb"],
    )
    dataset = recipe.train_loader["dataset"]
    assert dataset["remote"] == "s3://here/train"
    assert dataset["local"].startswith("/cache/composer-prior/captions/here-train-")
    assert (dataset["scores"], dataset["cache_limit"], dataset["on_bad_sample"]) == (None, "1gb", "skip")
    assert recipe.eval_loader is None
    assert recipe.reference["eval_loader"] is None
    assert recipe.reference["train_loader"]["dataset"]["local"] == dataset["local"]
    assert recipe.tokenizer == {"name": "HuggingFaceTB/SmolLM2-360M"}


def test_scores_of_a_remote_lie_beside_it():
    recipe = load_recipe("prior_vit_l_14_336.yaml", ["train=s3://here/train/", "validation=s3://here/validation"])
    assert recipe.train_loader["dataset"]["scores"] == "s3://here/train-scores"
    assert recipe.eval_loader["dataset"]["remote"] == "s3://here/validation"


def test_two_places_of_one_name_are_two(tmp_path):
    names = {
        load_recipe("ntp_vit.yaml", [f"train={tmp_path / user}/my/train"]).reference["run_name"] for user in ("a", "b")
    }
    assert len(names) == 2


def test_validation_alone_is_refused():
    with pytest.raises(ValueError, match="validation= is given without train="):
        load_recipe("prior_vit.yaml", ["validation=my/validation"])
    recipe = load_recipe("ntp_vit.yaml", ["train=my/train", "eval_loader.num_workers=0"])
    vars(recipe)["train_loader"] = None  # it has its data
    with pytest.raises(ValueError, match=r"^eval_loader\.dataset is missing: give it, or validation= beside train="):
        build_loaders(recipe, None)


@pytest.mark.parametrize("place", ["pics", "nosuch"])
def test_data_that_are_none_are_named_before_anything_is_made(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pics").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{place}: no index.json here; name a data set made by") as caught:
        train(load_recipe("prior_vit.yaml", [f"train={place}", "run_name=mine", *SMALL, *TOWER]))
    assert len(str(caught.value).splitlines()) == 1
    assert "Tokenizer" not in capsys.readouterr().out
    assert not list(Path().glob("runs/*/tokenizer"))
