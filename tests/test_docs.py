"""The code of README, docs, cards and examples runs in the order of its page; reference pages name all there is.

Each page begins in the folder that README leaves, with what its reader has: ``BESIDE``, and names. Commands run in this
process, made small by ``common.documents``. A comment beside a block says what does not run; that is still parsed.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
from dataclasses import fields
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from common.chats import TEMPLATES, turns, write_chats
from common.data import tile, write_tiles
from common.documents import blocks, check_program, commands, commands_in_text, jobs, run
from common.models import small_lm, small_lvlm
from common.recipes import ROOT, TORCHRUN
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import composer_prior
from composer_prior import ComposerLVLM, StreamingCaptionDataset, registry
from composer_prior.commands.cli import JOBS
from composer_prior.data.captions import caption_data_spec
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.training.config import TrainConfig, load_recipe
from composer_prior.training.keys import check_keys

CARDS = sorted(ROOT.glob("composer_prior/algorithms/*/README.md"))
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *CARDS]
RECIPES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("yamls/**/*.yaml"))]  # their comments
ELSEWHERE = "docs/trainer.md"  # in tests/algorithms/test_prior_trainer.py, with what it logs
NAMES = [name for page in PAGES if (name := str(page.relative_to(ROOT))) != ELSEWHERE]
INSTEAD = {  # texts of a page, and what makes them small
    "docs/finetuning.md": {"max_steps=100": "max_steps=1"},
    "docs/models.md": {" s3://bucket/images": ""},
    "docs/runs.md": {'"ViT-B-16-SigLIP", pretrained="webli"': '"prior-vit-tiny", pretrained=None'},
}


def beside_a_card():
    """Write a recipe, and return the names of a method card: a model, its data, and tensors of a batch."""
    recipe = yaml.safe_load((ROOT / "yamls/prior_vit.yaml").read_text())
    recipe["algorithms"] = {"image_gain": {}}
    recipe["train_loader"]["dataset"]["viewer_scores"] = "runs/ntp_vit/scores"
    Path("RECIPE.yaml").write_text(yaml.safe_dump(recipe))
    trained = composer_prior.load("runs/prior_vit")
    model = ComposerLVLM(trained.model, trained.processor)
    options = {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "batch_size": 8}
    spec = caption_data_spec(StreamingCaptionDataset(local="data/emoji_scenes/validation", **options), 8)
    batch = next(iter(spec.dataloader))
    mask = batch["labels"] != -100
    values = ("ref_logprobs", "viewer_logprobs", "nll", "average_nll")
    differences = {"logits_with_image": 3.0, "logits_without_image": 1.0, "p_with_image": 0.5, "p_without_image": 0.1}
    tensors = {name: torch.rand(mask.shape) * (1 if "nll" in name else -1) for name in values}
    tensors |= {name: torch.full(mask.shape, value) for name, value in differences.items()}
    return {"model": model, "train_dataloader": spec, "batch": batch, "mask": mask, **tensors}


def beside_the_card_of_prior():
    """Return the names in PRIOR's card, whose model is one of transformers."""
    names = beside_a_card()
    inputs = {key: names["batch"][key] for key in ("input_ids", "pixel_values", "labels")}
    return {**names, "batch": inputs, "model": names["model"].model, "processor": names["model"].processor}


def beside_data():
    """Write conversations as LLaVA publishes them, and a template."""
    Path("FOLDER").mkdir()
    Path("FOLDER/a.png").write_bytes(tile(3))
    said = [{"from": "human", "value": "<image>\nWhich shade?"}, {"from": "gpt", "value": "A dark green."}]
    chats = [{"id": str(number), "image": "a.png", "conversations": said} for number in range(12)]
    Path("llava_v1_5_mix665k.json").write_text(json.dumps(chats))
    Path("chat.jinja").write_text(TEMPLATES["vicuna"])
    shutil.rmtree("my/validation")
    write_chats(Path("my/validation"), [(turns("<image>Which shade?", "Dark."), [tile(number)]) for number in range(8)])
    write_tiles(Path("OUT2"), 12)
    return {}


def beside_models():
    """Take over the results of studies."""
    for results in ROOT.glob("docs/evidence/**/results.jsonl"):
        (copy := Path(results.relative_to(ROOT))).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(results, copy)
    return {}


def beside_runs():
    """Write a tower as OpenCLIP has it, and return the parts of a model."""
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": open_clip.get_model_config("prior-vit-tiny"), "preprocess_cfg": preprocess}
    clip = open_clip.create_model("prior-vit-tiny")
    Path("clips/mine").mkdir(parents=True)
    Path("clips/mine/open_clip_config.json").write_text(json.dumps(config))
    torch.save(clip.state_dict(), "clips/mine/open_clip_pytorch_model.bin")
    tokenizer = AutoTokenizer.from_pretrained("runs/reference/model")
    lm = AutoModelForCausalLM.from_pretrained("runs/reference/model")
    return {"tokenizer": tokenizer, "lm": lm, "image": Image.open("photo.jpg")}


def beside_scores():
    """Write a recipe without a reference of its own, whose algorithm names one."""
    recipe = yaml.safe_load((ROOT / "yamls/chat_vit.yaml").read_text())
    del recipe["benchmarks"], recipe["data"], recipe["init_from"]
    recipe |= {"run_name": "mine", "algorithms": {"prior": {"reference": "runs/reference/model"}}}
    recipe["tokenizer"] = {"name": "data/emoji_scenes_tokenizer"}
    for loader, split in (("train_loader", "train"), ("eval_loader", "validation")):
        recipe[loader]["dataset"] = {"local": f"data/emoji_scenes/{split}", "max_caption_tokens": 128}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    return {}


def beside_studies():
    """Write a study, and a run that was measured."""
    measured = Path("runs/prior_vit_l_14_336/metrics.jsonl")
    measured.parent.mkdir()
    measured.write_text(json.dumps({"batch": 1, "throughput/device/samples_per_sec": 20.0}) + "\n")
    (study,) = (block.text for block in blocks(ROOT / "docs/studies.md") if block.language == "yaml")
    Path("mine.yaml").write_text(study)
    return {}


BESIDE = {
    "docs/data.md": beside_data,
    "docs/evidence.md": beside_models,
    "docs/models.md": beside_models,
    "docs/runs.md": beside_runs,
    "docs/scores.md": beside_scores,
    "docs/studies.md": beside_studies,
    **{str(card.relative_to(ROOT)): beside_a_card for card in CARDS},
    "composer_prior/algorithms/prior/README.md": beside_the_card_of_prior,
}

NOTEBOOKS = {
    "examples/hugging_face.ipynb": {
        "range(640)": "range(8)",
        "max_steps=40": "max_steps=2",
        "logging_steps=4": "logging_steps=1",
        "batch_size=16": "batch_size=4",
    },
    "examples/weights.ipynb": {"limit=200": "limit=4"},
}


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, tokenizer, scenes):
    """Run README in an empty folder, and return the folder."""
    folder = tmp_path_factory.mktemp("pages") / "README"
    (folder / "folder").mkdir(parents=True)
    (folder / "yamls").symlink_to(ROOT / "yamls")
    for number, name in enumerate(("photo.jpg", "picture.png", "folder/a.png")):
        Image.open(io.BytesIO(make_sample("validation", number, canvas=48)["image"])).convert("RGB").save(folder / name)
    (folder / "SOURCE").mkdir()
    with (folder / "SOURCE/captions.jsonl").open("w") as captions:
        for number in range(64):
            (folder / f"SOURCE/{number}.png").write_bytes(tile(number))
            captions.write(json.dumps({"image": f"{number}.png", "caption": f"a tile of shade {number}"}) + "\n")
    write_tiles(folder / "my/validation", 12)
    for part in (small_lm(tokenizer), tokenizer):
        part.save_pretrained(folder / "path/of/a/causal/lm")
    model = small_lvlm("encoder", tokenizer)
    data = StreamingCaptionDataset(
        local=str(scenes / "validation"), tokenizer=tokenizer, image_processor=model.image_processor, batch_size=8
    )
    with contextlib.chdir(folder):
        run_page("README.md", {"model": model, "train_dataloader": caption_data_spec(data, 8)})
    return folder


@pytest.fixture
def folder(after_readme, tmp_path, monkeypatch):
    """A copy of the folder that README leaves, and a process in which no run has been."""
    monkeypatch.setattr(registry, "_COMPONENTS", {kind: {**named} for kind, named in registry._COMPONENTS.items()})
    leave_runs()
    copy = shutil.copytree(after_readme, tmp_path / "page", symlinks=True)
    with contextlib.chdir(copy):
        yield copy
    shutil.rmtree(copy)
    leave_runs()


def leave_runs():
    """End the group of one rank that a Trainer has left, and forget its variables."""
    for name in TORCHRUN:
        os.environ.pop(name, None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_page(name, names):
    """Run the blocks of a page, as one program with some names."""
    for block in blocks(ROOT / name, INSTEAD.get(name)):
        try:
            if block.language == "bash":
                for words in commands(block):
                    check_program(words)
                    of_package = jobs(words)
                    assert of_package or not block.runs(words), f"{words[0]}: say why this does not run"
                    for job in of_package or ():
                        run(job, only_parse=not block.runs(words))
            elif block.language == "python":
                code = compile(block.text, block.place, "exec")
                if file := re.match(r"# (\w+\.py)\n", block.text):  # which a command names
                    Path(file[1]).write_text(block.text)
                elif block.runs():
                    exec(code, names)
            elif block.language == "yaml" and block.runs():
                check_recipe(yaml.safe_load(block.text))
        except BaseException as error:
            error.add_note(f"at {block.place}")
            raise


def check_recipe(content):
    """Check the keys of a part of a recipe, in a shipped one with the parts before it on the page."""
    part = Path("part.yaml")
    assert content.keys() <= {field.name for field in fields(TrainConfig)}
    shipped = "smolvlm" if content.get("model", {}).get("name") == "hugging_face" else "gain_vit"
    whole = yaml.safe_load((part if part.exists() else ROOT / f"yamls/{shipped}.yaml").read_text())
    for key, value in content.items():
        merged = isinstance(whole.get(key), dict) and "name" not in value
        whole[key] = OmegaConf.merge(whole[key], value) if merged else value
    OmegaConf.save(OmegaConf.create(whole), part)
    check_keys(load_recipe(part))


def test_readme_runs(after_readme):
    assert {"prior_vit", "ntp_vit", "mine"} <= {path.name for path in (after_readme / "runs").iterdir()}
    assert [*after_readme.glob("advice/viewer-*-2/model/training.json")], "advice on no models trains them"
    assert (after_readme / "advice/advice.html").read_text().count("<figure") == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_page_runs(name, folder):
    names = BESIDE.get(name, dict)()
    run_page(name, names)
    if "trainer" in names and "Trainer" in names:
        names["trainer"].fit()
        assert names["trainer"].state.timestamp.batch == 2


@pytest.mark.parametrize(
    "words", ["train prior_vit.yaml max_durtion=2ba", "launch nproc=2 trian x.yaml", "convert SOURCE"]
)
def test_a_wrong_command_is_an_error(words):
    with pytest.raises(AssertionError, match=words):
        run(words.split(), only_parse=True)


@pytest.mark.parametrize("name", ["README.md", *NAMES, ELSEWHERE, *RECIPES])
def test_commands_in_sentences_are_accepted(name):
    for words in commands_in_text(ROOT / name):
        check_program(words)
        if words[0] == "composer-prior" and len(words) > 2 and not words[1].isupper():
            run(words[1:], only_parse=True)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, folder):
    """It prints and plots in the same cells as when its outputs were stored."""
    notebook = json.loads((ROOT / name).read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    stored = [[output["output_type"] for output in cell["outputs"]] for cell in cells]
    assert {"stream", "display_data"} <= {kind for kinds in stored for kind in kinds}
    run_notebook = runpy.run_path(str(ROOT / "tools/run_notebooks.py"))["run_notebook"]
    run_notebook(notebook, NOTEBOOKS[name])
    assert [[output["output_type"] for output in cell["outputs"]] for cell in cells] == stored


def test_every_command_shows_its_help():
    page = (ROOT / "docs/commands.md").read_text()
    assert re.findall(r"command-output} composer-prior (\w+) --help", page) == [*JOBS]
    assert re.findall(r"^## (\w+)$", page, flags=re.M) == [*JOBS]


def test_every_public_name_has_its_place():
    named = re.findall(r"`composer_prior\.(\w+) <([\w.]+)>`", (ROOT / "docs/python.rst").read_text())
    assert dict(named) == {name: f"{module}.{name}" for name, module in composer_prior._MODULES.items()}
    assert sorted(name for name, _ in named) == sorted(composer_prior.__all__)


def test_the_plain_loop_trains_on_captions(tokenizer, tmp_path):
    model = small_lvlm("patches", tokenizer).eval().image_text_model
    model.save_pretrained(tmp_path / "model")
    small_lm(tokenizer).save_pretrained(tmp_path / "reference")
    main = runpy.run_path(str(ROOT / "examples/plain_pytorch.py"))["main"]
    losses = main(str(tmp_path / "model"), str(tmp_path / "reference"), steps=2, batch_size=3)
    samples = [make_sample("train", number) for number in range(3)]
    images = [Image.open(io.BytesIO(sample["image"])) for sample in samples]
    known = model.logprobs(images, [[sample["caption"]] for sample in samples], end=True)
    values = [value for of_image in known for text in of_image for value in text.values]
    assert losses[0] == pytest.approx(-sum(values) / len(values), rel=1e-4)
    assert len(losses) == 2
