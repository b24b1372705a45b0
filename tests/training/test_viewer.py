"""Recipes with a viewer: it is trained first, scores the captions, and is reused or refused."""

import json
import shutil
from pathlib import Path

import pytest
from common.commands import score
from common.recipes import NO_REPORT, ROOT, SHRUNKEN, losses, recipe

from composer_prior.data.scores import Scores
from composer_prior.training.run import train

pytestmark = pytest.mark.slow

_OF_REFERENCE = (word for word in SHRUNKEN if word.startswith("reference.") and "model" not in word)
VIEWER = [
    *(word.replace("reference.", "viewer.") for word in _OF_REFERENCE),
    "viewer.benchmarks.scene_foils.samples=12",
    "viewer.model.vision.image_size=24",
]


def gain(name="gain_vit", *overrides):
    return recipe(name, *VIEWER, *overrides)


def viewer_nll(folder):
    lines = (json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines())
    return [line["image_gain/viewer_nll"] for line in lines if "image_gain/viewer_nll" in line]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run of gain_vit.yaml from nothing, and its captured output."""
    folder = tmp_path_factory.mktemp("gain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(gain())
    return folder


def test_everything_is_made(first):
    card = json.loads((first / "runs/viewer/model/training.json").read_text())
    assert card["recipe"]["max_duration"] == "4ba"
    for name, column in (("reference", "ref_logprobs"), ("viewer", "viewer_logprobs")):
        scores = Scores(str(first / f"runs/{name}/scores"), first)
        assert scores.metadata.column == column
        assert scores.metadata.reference["path"] == f"runs/{name}/model"
        assert len(scores) == 64
    lines = (first / "runs/gain_vit/metrics.jsonl").read_text()
    assert "image_gain/viewer_nll" in lines
    page = (first / "runs/gain_vit/report.html").read_text()
    assert "viewer (with images)" in page
    assert "reference (text only)" in page


def test_what_is_there_is_reused_and_another_family_is_served_too(first, monkeypatch, capfd):
    monkeypatch.chdir(first)
    train(gain("gain_patch", "max_duration=5ba"))
    output = capfd.readouterr().out
    short = "Warning: the viewer runs/viewer/model is trained on 32 samples, fewer than the 40 of this run"
    for what in ("Reference: reusing runs/reference/model", "Viewer: reusing runs/viewer/model", short):
        assert what in output
    assert output.count("Scores: reusing") == 2


def test_a_live_viewer_gives_the_losses_of_its_stored_scores(first, monkeypatch):
    monkeypatch.chdir(first)
    train(gain("gain_vit", "run_name=live", "train_loader.dataset.viewer_scores=null", *NO_REPORT))
    for (_, live), (_, stored) in zip(losses("runs/live"), losses("runs/gain_vit"), strict=True):
        assert live == pytest.approx(stored, abs=1e-3)
    live, stored = (viewer_nll(f"runs/{name}") for name in ("live", "gain_vit"))
    assert live == pytest.approx(stored, abs=1e-3)


def test_a_model_that_exists_is_a_viewer(first, monkeypatch):
    monkeypatch.chdir(first)
    words = ["run_name=other", "viewer=null", "train_loader.dataset.viewer_scores=runs/other_scores", *NO_REPORT]
    train(recipe("gain_vit", *words, "algorithms.image_gain.viewer=runs/gain_vit/model"))
    metadata = Scores(str(first / "runs/other_scores"), first).metadata
    assert metadata.reference["path"] == "runs/gain_vit/model"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("viewer.max_duration=5ba", "The viewer in runs/viewer/model was made with other values of max_duration"),
        ("viewer.algorithms.focal={}", "The viewer in runs/viewer/model was made with other values of algorithms"),
        ("viewer.reference.seed=3", r"^viewer\.reference is that of the run: give reference itself\."),
        ("algorithms.image_gain.over=model", r"^algorithms\.image_gain\.over=model compares with the trained model"),
        (
            "train_loader.dataset.scores=null algorithms.image_gain.reference=null",
            "needs the log-probabilities of a ref",
        ),
        ("train_loader.dataset.viewer_scores=null algorithms.image_gain.viewer=null", "log-probabilities of a viewer"),
        ("algorithms.image_gain.viewer=runs/other/model", "is not the model of the recipe's viewer, runs/viewer/model"),
    ],
)
def test_another_viewer_is_refused(first, monkeypatch, override, message):
    monkeypatch.chdir(first)
    with pytest.raises(ValueError, match=message) as error:
        train(gain("gain_vit", "run_name=refused", *override.split()))
    assert "\n" not in str(error.value)


def test_a_live_viewer_that_reads_other_images_is_refused(first, monkeypatch):
    monkeypatch.chdir(first)
    live = ["train_loader.dataset.viewer_scores=null", "algorithms.image_gain.viewer=runs/viewer/model"]
    with pytest.raises(ValueError, match=r"^algorithms\.image_gain\.viewer=.*: The viewer has another image_processor"):
        train(gain("gain_patch", "run_name=refused", *live))
    assert not Path("runs/refused/metrics.jsonl").exists()


def test_a_viewer_that_knows_no_more_than_the_reference_is_told(first, monkeypatch, capfd):
    monkeypatch.chdir(first)
    shutil.copytree("runs/reference/scores", "runs/blind")
    for file in (Path("runs/blind/index.json"), Path("runs/blind/scores.json")):
        file.write_text(file.read_text().replace("ref_logprobs", "viewer_logprobs"))
    words = ["run_name=blind", "viewer=null", "train_loader.dataset.viewer_scores=runs/blind", *NO_REPORT]
    train(recipe("gain_vit", *words, "algorithms.image_gain.viewer=null"))
    output = capfd.readouterr().out
    assert "Warning: the viewer predicts captions no better than the text-only reference (" in output
    assert "64 captions): 100% of the tokens gain nothing by the image." in output


def test_scores_of_another_viewer_are_refused(first, monkeypatch):
    monkeypatch.chdir(first)
    words = ["run_name=mixed", "viewer=null", *NO_REPORT, "train_loader.dataset.viewer_scores=runs/viewer/scores"]
    with pytest.raises(ValueError, match="what differs: the viewer's"):
        train(recipe("gain_vit", *words, "algorithms.image_gain.viewer=runs/gain_vit/model"))


def test_scoring_needs_no_recipe_of_a_viewer(first, tmp_path, monkeypatch, capfd):
    """The command makes data and tokenizer, and not the models that the recipe would train."""
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / "yamls/gain_vit.yaml"), *SHRUNKEN, *VIEWER]
    viewer = f"viewer={first / 'runs/gain_vit/model'}"
    with pytest.raises(SystemExit, match="nowhere"):
        score([*words, "viewer=nowhere", "out=scores"])
    assert not (tmp_path / "data").exists()
    score([*words, viewer, "out=scores", "batch_tokens=200"])
    assert Scores("scores", tmp_path).metadata.column == "viewer_logprobs"
    assert not (tmp_path / "runs").exists()
    assert "Warning" not in capfd.readouterr().out
    scores = f"train_loader.dataset.scores={tmp_path / 'scores'}"  # in the place of the reference's
    score([*words, viewer, "out=again", "batch_tokens=200", "max_duration=5ba", scores])
    output = capfd.readouterr().out
    assert f"Warning: the {viewer.replace('=', ' ')} is trained on 32 samples, fewer than the 40 of this run" in output
    assert output.index("Warning: the viewer") < output.index("Scores: ")
    assert "Warning: the viewer predicts captions no better than the text-only reference (" in output


def test_a_viewer_of_another_reference_is_refused(first, tmp_path, monkeypatch):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    file = Path("runs/reference/model/reference.json")
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({**metadata, "validation": {"loss": 1.0}}))
    with pytest.raises(ValueError, match="The viewer in runs/viewer/model was made with another reference"):
        train(gain("gain_vit", "run_name=refused"))


def test_metadata_of_an_older_version_is_read(first, tmp_path, monkeypatch):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for file in (Path("runs/reference/model/reference.json"), Path("runs/viewer/model/training.json")):
        metadata = json.loads(file.read_text())
        del metadata["recipe"]["algorithms"], metadata["reference"]
        file.write_text(json.dumps(metadata))
    for name in ("reference", "viewer"):
        file = Path(f"runs/{name}/scores/scores.json")
        written = json.loads(file.read_text())
        if name == "reference":
            del written["column"]
        file.write_text(json.dumps(written))
    train(gain("gain_vit", "run_name=again", *NO_REPORT))
    assert losses("runs/again")
