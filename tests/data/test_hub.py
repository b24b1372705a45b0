"""Models and tokenizers by path or hub id: what is not there, and what comes with code, is one line at once."""

import builtins
import json
import shutil

import pytest
import torch
from common.commands import run_job
from transformers import AutoTokenizer

from composer_prior import load
from composer_prior.data import hub
from composer_prior.data.hub import ModelFolderError, find_model
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.inference.export import export_model
from composer_prior.models.language import build_language_model
from composer_prior.models.model_folder import load_processor
from composer_prior.models.reference import ReferenceLM
from composer_prior.scoring.score import model_identity
from composer_prior.training.checkpoints.loading import read_weights
from tests.common.models import small_lm, small_lvlm

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({!r}).touch()
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def shapes(tokenizer, pretrained):
    with torch.device("meta"):
        return build_language_model(tokenizer, pretrained=pretrained)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder without models, where nobody is asked anything, neither a hub nor at the terminal."""

    def nobody(*_, **__):
        raise AssertionError("somebody was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "model_info", nobody)
    monkeypatch.setattr(builtins, "input", nobody)
    (tmp_path / "data").mkdir()


@pytest.mark.parametrize("cache", ["HF_HUB_CACHE", "TRANSFORMERS_CACHE"])
def test_a_model_of_a_cache_is_found_beside_a_folder_of_its_organisation(cache, tmp_path, monkeypatch):
    (tmp_path / "cache/models--org--name").mkdir(parents=True)
    (tmp_path / "org").mkdir()
    if cache == "HF_HUB_CACHE":
        monkeypatch.setattr(hub.constants, cache, str(tmp_path / "cache"))
    else:
        monkeypatch.setenv(cache, str(tmp_path / "cache"))
    assert find_model("org/name") == "org/name"


def test_the_prompt_of_a_hubs_model_is_read_as_a_folders(tokenizer, tmp_path, monkeypatch):
    repository = tmp_path / "cache/models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0abc")
    snapshot = repository / "snapshots/0abc"
    tokenizer.save_pretrained(snapshot)
    small_lm(tokenizer).config.save_pretrained(snapshot)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    assert not hasattr(load_processor(AutoTokenizer, "org/name"), "prompt")
    (snapshot / "prompt.txt").write_text("a photo of")
    for path in ("org/name", snapshot):
        assert load_processor(AutoTokenizer, path).prompt == "a photo of"


@pytest.mark.parametrize("path", ["runs/nosuch", "./x", "../x", "/a/b", "~/nosuch", "a/b/c", "data/x", "s3://bucket/x"])
def test_what_looks_like_a_path_and_is_not_there_is_said_without_asking_a_hub(path):
    with pytest.raises(ModelFolderError, match="does not exist: expected a folder, or a hub id"):
        load(path)
    with pytest.raises(ModelFolderError, match="does not exist"):
        ReferenceLM.from_pretrained(path)


@pytest.mark.parametrize("name", ["gpt2", "organisation/model", "organisation/model-1.5_b"])
def test_a_hub_is_asked_once_and_its_silence_is_one_line(name, monkeypatch):
    asked = []

    def offline(name, **_):
        asked.append(name)
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(hub, "model_info", offline)
    with pytest.raises(ModelFolderError, match="nor a model of a hub that can be reached") as error:
        load(name)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match=rf"tokenizer\.name='{name}' is neither a folder"):
        build_tokenizer({"name": name})
    with pytest.raises(OSError, match=rf"model\.language\.pretrained='{name}' is neither a folder"):
        shapes(None, name)
    assert set(asked) == {name}
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: None)
    hub._ask_hub.cache_clear()
    assert find_model(name) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("caption runs/nosuch photo.jpg", "'runs/nosuch' does not exist"),
        ("caption photo.jpg runs/nosuch", "photo.jpg is an image, where a model is expected: the model comes first"),
        ("caption runs/nosuch photo.jpg device=cdua", "device=cdua cannot be used here"),
        ("caption runs/nosuch photo.jpg device=meta", "device=meta cannot be used here"),
        ("evaluate runs/nosuch benchmark=scene_foils", "'runs/nosuch' does not exist"),
        ("evaluate runs/nosuch benchmark=scene_foils device=cuda:99", "device=cuda:99 cannot be used here"),
    ],
)
def test_commands_say_it_in_one_line(words, message, tmp_path, capsys):
    (tmp_path / "photo.jpg").touch()
    job, *rest = words.split()
    assert run_job(job, rest) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


@pytest.fixture
def trap(tmp_path, tokenizer, monkeypatch):
    """Folders whose tokenizer or model is a class in a file beside it, which leaves a mark when it is imported."""
    model = small_lvlm("patches", tokenizer).image_text_model
    model.save_pretrained(tmp_path / "lvlm")
    small_lm(tokenizer).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(kind, part):
        folder = tmp_path / f"{kind}-{part}"
        shutil.copytree(tmp_path / kind, folder)
        (folder / "code.py").write_text(CODE.format(str(tmp_path / "mark")))
        file = folder / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
        config = json.loads(file.read_text())
        if part == "tokenizer":
            config |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
        else:
            config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Tokenizer"}}
        file.write_text(json.dumps(config))
        return str(folder)

    return make


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(trap, tokenizer, tmp_path):
    lvlm, lm, lm_model = trap("lvlm", "tokenizer"), trap("lm", "tokenizer"), trap("lm", "model")
    run = tmp_path / "run"
    shutil.copytree(lvlm, run / "architecture")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "ba1.pt").touch()
    calls = {
        "load": lambda: load(lvlm),
        "load a checkpoint": lambda: load(run / "checkpoints" / "ba1.pt"),
        "export": lambda: export_model(lvlm, tmp_path / "out"),
        "init_from": lambda: read_weights(tmp_path / "lm-tokenizer"),
        "init_from another": lambda: read_weights(tmp_path / "lm-model"),
        "tokenizer.name": lambda: build_tokenizer({"name": lm}),
        "reference": lambda: ReferenceLM.from_pretrained(lm),
        "score": lambda: model_identity(lm),
        "pretrained": lambda: build_language_model(tokenizer, pretrained=lm_model),
        "its shapes": lambda: shapes(tokenizer, lm_model),
    }
    for name, call in calls.items():
        with pytest.raises(ModelFolderError, match=r"comes with Python code of its own, which is not run unless") as e:
            call()
        assert "\n" not in str(e.value), name
    assert not (tmp_path / "mark").exists()
    build_tokenizer({"name": lm, "kwargs": {"trust_remote_code": True}})
    assert (tmp_path / "mark").exists()
