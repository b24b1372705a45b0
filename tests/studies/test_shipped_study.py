"""The study that comes with the package, as it ships."""

import re
import runpy
from pathlib import Path

import pytest
from common.recipes import ROOT
from PIL import Image

from composer_prior import registry
from composer_prior.models.build import lvlm_skeleton
from composer_prior.models.composer_lvlm import caption_metrics
from composer_prior.studies.runner import Plan, plan_tasks
from composer_prior.studies.shared import share
from composer_prior.studies.study import METHOD, SEED, Study, read_study
from composer_prior.training.keys import check_keys


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(ROOT / "yamls/studies/prior_vs_ntp.yaml", out="out")


@pytest.fixture(scope="module")
def plan(study) -> Plan:
    return plan_tasks(study, Path("out"))


def test_its_cells(study):
    assert len(study.cells) == 172
    assert {cell.values[METHOD] for cell in study.cells} == set(study.header["axes"][METHOD])
    for axis, values in study.header["axes"].items():
        assert {cell.values[axis] for cell in study.cells} == set(values), axis


def test_every_recipe_passes_the_checks_of_a_run(study, plan):
    checked = set()
    for cell in study.cells:
        kind = tuple(value for axis, value in cell.values.items() if axis != SEED)
        if kind not in checked:
            checked.add(kind)
            check_keys(cell.load(plan.further[cell.name]))
    assert len(checked) == 48


def test_its_figures_are_those_of_its_benchmarks(study):
    header = study.header
    named = [*header["figures"]["averaged"], *header["figures"]["beside"], header["curve"], *header["fits"]]
    for recipe in study.recipes.values():
        known = {f"validation/{name}" for name in caption_metrics(image_related=True)}
        for name, arguments in recipe.benchmarks.items():
            kind = registry.load("benchmark", arguments.get("benchmark", name), name)
            known |= {f"{name}/{figure}" for figure in kind.headline.values()}
        assert set(named) <= known


def test_cells_that_differ_in_seed_share_all_that_is_made_before_them(study, plan):
    by_rest: dict[tuple[str, ...], list[str]] = {}
    for cell in study.cells:
        by_rest.setdefault(tuple(v for axis, v in cell.values.items() if axis != SEED), []).append(cell.name)
    assert len(by_rest) == 48
    shared = {c.name: share(study.recipes[c.name], c.overrides, Path("out/shared")) for c in study.cells}
    for names in by_rest.values():
        assert len(names) in (3, 5)
        assert len({shared[name].places for name in names}) == 1
        assert len({plan.preparations[name].name for name in names}) == 1
        for key in ("data.out", "tokenizer.name", "reference.run_folder", "train_loader.dataset.scores"):
            assert len({str(shared[name].overrides.get(key)) for name in names}) == 1
    # Data, tokenizer, reference and scores.
    assert len(shared[next(cell.name for cell in study.cells if cell.values[METHOD] == "prior")].places) == 4


def test_the_study_of_image_gain(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(ROOT / "yamls/studies/image_gain.yaml", out="out")
    plan = plan_tasks(study, Path("out"))
    folders = {}
    for cell in study.cells:
        if cell.values[SEED] == "6":
            recipe = cell.load(plan.further[cell.name])
            if recipe.code_paths:
                runpy.run_path(recipe.code_paths[0])
            check_keys(recipe)
            if recipe.viewer is not None:
                folders[cell.name] = recipe.viewer["run_folder"]
                assert recipe.viewer["reference"] == recipe.reference
                stored = recipe.train_loader["dataset"]["viewer_scores"]
                assert stored is None or stored.startswith(f"{recipe.viewer['run_folder']}/scores-")
    assert folders["gain-seed6"] == folders["gain_over_model-seed6"] == folders["distillation-seed6"]
    assert folders["gain-patches-seed6"] == folders["gain-seed6"]
    assert "ntp-seed6" not in folders
    assert folders["gain-scratch-seed6"] == folders["gain-other_text-seed6"] == folders["gain-seed6"]
    assert folders["gain-none-seed6"] != folders["gain-seed6"]
    viewers = ["gain", *(f"gain_viewer_{steps}" for steps in (75, 150, 300, 1200))]
    assert len({folders[f"{method}-seed6"] for method in viewers}) == 5
    gain = [cell for cell in study.cells if cell.name in {f"gain-seed{seed}" for seed in range(6, 11)}]
    of_seeds = [cell.load(plan.further[cell.name]) for cell in gain]
    assert len({recipe.reference["run_folder"] for recipe in of_seeds}) == 5
    assert len({recipe.viewer["run_folder"] for recipe in of_seeds}) == 5


def test_the_study_of_real_pictures(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(ROOT / "yamls/studies/real_pictures.yaml", out="out")
    plan = plan_tasks(study, Path("out"))
    for cell in [cell for cell in study.cells if cell.values[SEED] == "1"]:
        recipe = cell.load(plan.further[cell.name])
        check_keys(recipe)
        assert (recipe.viewer is not None) == (cell.values[METHOD] == "gain")
        for part in filter(None, (recipe, recipe.helpers.get("viewer"))):
            assert part.train_loader["dataset"]["local"] == "data/pictures/train"
            assert part.benchmarks["foils"]["data"] == "data/pictures/validation/../foils.jsonl"
            assert part.model["vision"]["pretrained"] == "emoji_scenes"
            assert not part.model["vision"]["freeze"]


def test_the_study_of_front_ends(monkeypatch, tokenizer):
    monkeypatch.chdir(ROOT)
    study = read_study(ROOT / "yamls/studies/front_ends.yaml", out="out")
    plan = plan_tasks(study, Path("out"))
    assert len(study.cells) == 3 * len(study.header["axes"][METHOD]) == 18
    assert len({plan.preparations[cell.name].name for cell in study.cells}) == 1
    tokens = {}
    for cell in [cell for cell in study.cells if cell.values[SEED] == "1"]:
        recipe = cell.load(plan.further[cell.name])
        check_keys(recipe)
        assert recipe.benchmarks["scene_foils"]["canvas"] == recipe.data["canvas"] == 224
        config = recipe.reference["model"]["language"]["config"]
        parts = {key: recipe.model[key] for key in ("vision", "projector")}
        model = lvlm_skeleton(tokenizer, {"config": dict(config)}, **parts)
        tokens[cell.values[METHOD]] = len(model.image_processor(Image.new("RGB", (224, 224))).layout)
        longest = recipe.train_loader["dataset"]["max_caption_tokens"]
        assert max(tokens.values()) + longest + 2 <= config["max_position_embeddings"]
    expected = {"mlp": 144, "mlp_random": 144, "pixel_shuffle": 36, "mean_pool": 36, "tiles": 326, "naflex": 156}
    assert tokens == expected
    said = (ROOT / "yamls/studies/front_ends.yaml").read_text().partition("Per step")[2].replace("\n# ", " ")
    per_step = {name: float(number) for number, name in re.findall(r"([\d.]+e9) of (\w+)", said)}
    per_step["mlp_random"] = per_step["mlp"]
    for cell in study.cells:
        steps = int(study.recipes[cell.name].max_duration.removesuffix("ba"))
        assert steps * per_step[cell.values[METHOD]] == pytest.approx(11.8e12, rel=0.01)
