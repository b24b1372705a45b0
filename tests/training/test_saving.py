"""The model that a run leaves: loaded from its folder or a checkpoint, alone, on one rank and from two."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from common.recipes import BENCHMARKS, ROOT, SHRUNKEN, TOWER, VIT, fork_ranks, recipe
from common.s3_server import s3_server
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from composer_prior import ComposerLVLM, StreamingCaptionDataset, load
from composer_prior.data.captions import caption_data_spec
from composer_prior.data.hub import ModelFolderError
from composer_prior.data.remote import Remote
from composer_prior.inference.caption import caption_images
from composer_prior.models.llava import export_llava
from composer_prior.models.vision import image_inputs
from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

RUNS = ("prior_vit", "prior_patch")
NAFLEX = "architecture: naflexvit_base_patch16_siglip, config: {depth: 2, embed_dim: 32, num_heads: 2}, patch_size: 8"
FRONT_ENDS = {
    "tiles": [*TOWER, "model.vision.tiles={max: 4}", "model.projector={name: mean_pool, factor: 2}"],
    "naflex": [
        f"model.vision={{name: naflex, {NAFLEX}, max_tokens: 40, pretrained: null, freeze: false}}",
        "model.projector={name: pixel_shuffle, factor: 2}",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each family, with models on the way."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in RUNS:
            train(recipe(name, "save_interval=2ba", "callbacks.hf_checkpointer={interval: 2ba}"))
    return folder


@pytest.fixture
def alone(runs, tmp_path, monkeypatch):
    """The runs without what they were made from, but for the validation data."""
    for name in RUNS:
        shutil.copytree(runs / "runs" / name, tmp_path / "runs" / name)
    shutil.copytree(runs / "data/emoji_scenes/validation", tmp_path / "validation")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validation_data(model):
    return StreamingCaptionDataset(
        local="validation",
        tokenizer=model.tokenizer,
        image_processor=partial(image_inputs, model.processor.image_processor),
        batch_size=8,
        max_caption_tokens=128,
    )


def validation_loss(model):
    data = validation_data(model)
    composer = ComposerLVLM(model.model, model.processor).eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in caption_data_spec(data, 8).dataloader:
            labelled = (batch["labels"] != -100).sum()
            total += float(composer.loss(composer(batch), batch) * labelled)
            count += int(labelled)
    return total / count


def logged_loss(name):
    lines = Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return next(line["metrics/eval/loss"] for line in map(json.loads, reversed(lines)) if "metrics/eval/loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder_alone_is_the_model(alone, name):
    model = load(f"runs/{name}")
    assert validation_loss(model) == pytest.approx(logged_loss(name), abs=1e-4)
    for path in (f"runs/{name}/model", f"runs/{name}/checkpoints", f"runs/{name}/checkpoints/ep0-ba4-rank0.pt"):
        if "checkpoints" in path:
            shutil.rmtree(f"runs/{name}/model", ignore_errors=True)
        again = load(path)
        for key, tensor in model.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[key], tensor), (path, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_run_with_another_front_end(runs, tmp_path, monkeypatch, name):
    """It trains, captions and is evaluated as any run, and its folder alone is the model."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    overrides = [*SHRUNKEN, *BENCHMARKS, f"run_name={name}", *FRONT_ENDS[name]]
    train(load_recipe(ROOT / "yamls/prior_vit.yaml", overrides))
    shutil.copytree("data/emoji_scenes/validation", "validation")
    model = load(f"runs/{name}/model")
    assert validation_loss(model) == pytest.approx(logged_loss(name), abs=1e-4)


def test_models_on_the_way(alone):
    assert {path.name for path in Path("runs/prior_vit/huggingface").iterdir()} == {"ba2", "ba4"}
    final = load_file("runs/prior_vit/model/model.safetensors")
    last = load_file("runs/prior_vit/huggingface/ba4/model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in final.items())
    earlier = load("runs/prior_vit/huggingface/ba2")
    ours = load("runs/prior_vit/checkpoints/ep0-ba2-rank0.pt").model.state_dict()
    assert all(torch.equal(earlier.model.state_dict()[name], tensor) for name, tensor in ours.items())


def test_the_card_says_what_the_model_was_made_from(runs):
    card = (runs / "runs/prior_vit/model/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text"
    for words in ("CC BY-SA 4.0", "alpha: 1.0", "fingerprint `", "| loss |"):
        assert words in card
    recipe_text = card.split("```yaml")[1].split("```")[0]
    assert yaml.safe_load(recipe_text)["run_name"] == "prior_vit"


def test_what_lacks_something_is_named(alone, tmp_path):
    shutil.copy("runs/prior_vit/checkpoints/ep0-ba4-rank0.pt", "lost.pt")
    with pytest.raises(ModelFolderError, match=r"lost.pt has no architecture/ in a folder above it"):
        load("lost.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match="expected a run folder"):
        load("empty")
    shutil.copytree("runs/prior_patch/architecture", "runs/prior_vit/architecture", dirs_exist_ok=True)
    with pytest.raises(ModelFolderError, match="is no checkpoint of the model in"):
        load("runs/prior_vit/checkpoints/ep0-ba4-rank0.pt")
    with pytest.raises(ModelFolderError, match="nowhere/at/all"):
        load("nowhere/at/all")


OTHER_CHECKPOINTS = {
    "another layout": (lambda weights: {"model": weights}, "lacks state.model"),
    "no model": (lambda weights: {"state": {}}, "lacks state.model"),
    "a list": (lambda weights: [1, 2], "lacks state.model"),
    "half": (
        lambda weights: {"state": {"model": dict([*weights.items()][:5])}},
        "weights differ, such as .*which is missing",
    ),
    "other names": (
        lambda weights: {"state": {"model": {f"{name}_v2": tensor for name, tensor in weights.items()}}},
        "weights differ, such as .*_v2, which it does not have",
    ),
    "other shapes": (
        lambda weights: {"state": {"model": {name: tensor[:-1] for name, tensor in weights.items()}}},
        r"weights are of another shape, such as .*: \[\d+\] instead of \[\d+\]",
    ),
}


@pytest.mark.parametrize("kind", OTHER_CHECKPOINTS)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(alone, kind):
    make, message = OTHER_CHECKPOINTS[kind]
    path = "runs/prior_vit/checkpoints/ep0-ba4-rank0.pt"
    weights = torch.load(path, weights_only=False)["state"]["model"]
    Path(path).unlink()
    torch.save(make(weights), path)
    with pytest.raises(ModelFolderError, match=message) as refused:
        load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_two_ranks_write_the_folder_of_one(runs, tmp_path, monkeypatch):
    """Sharded with FSDP2 and trained at a rate of 0, from the weights of the run on one rank; also into a bucket."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    still = [
        "run_name=two",
        "optimizer.lr=0.0",
        "optimizer.weight_decay=0.0",
        "max_duration=1ba",
        "parallelism_config.fsdp2={}",
    ]
    checkpoint = "callbacks.hf_checkpointer={interval: 1ba, save_folder: 's3://models/two'}"
    with s3_server("models") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        command = [ROOT / "train.py", ROOT / "yamls/prior_vit.yaml", *SHRUNKEN, *VIT, *still, checkpoint]
        fork_ranks(tmp_path, *command, "init_from=runs/prior_vit")
        for name in ("model.safetensors", "config.json"):
            Remote("s3://models/two/ba1").get(name, tmp_path / name)
    one, two = (load_file(f"runs/{name}/model/model.safetensors") for name in ("prior_vit", "two"))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    uploaded = load_file("model.safetensors")
    assert all(torch.equal(one[name], tensor) for name, tensor in uploaded.items())
    names = [sorted(os.listdir(f"runs/{run}/model")) for run in ("prior_vit", "two")]
    assert names[0] == names[1]


def test_the_export_has_the_loss_and_the_captions_of_the_run(alone):
    model = load("runs/prior_vit")
    export_llava(model, "llava")
    llava = AutoModelForImageTextToText.from_pretrained("llava")
    processor = AutoProcessor.from_pretrained("llava")
    data = validation_data(model)
    total = count = 0.0
    with torch.no_grad():
        for batch in caption_data_spec(data, 8).dataloader:
            labelled = int((batch["labels"] != -100).sum())
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "pixel_values")}
            total += float(llava(**inputs).loss) * labelled
            count += labelled
    assert total / count == pytest.approx(logged_loss("prior_vit"), abs=1e-4)
    images = [data.image_and_caption(number)[0] for number in range(data.num_samples)]
    inputs = processor(images=images, text=["<image>"] * len(images), padding=True, return_tensors="pt")
    ids = llava.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = model.generate_captions(images, max_new_tokens=24)
    assert processor.batch_decode(ids, skip_special_tokens=True) == expected
    captioner = pipeline("image-text-to-text", model=llava, processor=processor)
    (found,) = captioner(images=images[0], text="<image>", max_new_tokens=24, return_full_text=False)
    assert found["generated_text"].removeprefix("<image>").strip() == expected[0].strip()


def test_captions_from_the_command_are_those_of_the_model(alone):
    model = load("runs/prior_vit")
    assert AutoModelForImageTextToText.from_pretrained("runs/prior_vit/model").generation_config.eos_token_id == (
        model.tokenizer.eos_token_id
    )
    data = validation_data(model)
    images = [data.image_and_caption(number)[0] for number in range(5)]
    Path("images").mkdir()
    for number, image in enumerate(images):
        image.save(f"images/{number}.png")
    counts = caption_images("runs/prior_vit", ["images"], batch_size=2, max_new_tokens=8, num_workers=0, progress=False)
    assert counts == {"captioned": 5, "errors": 0, "before": 0}
    lines = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == model.generate_captions(images, max_new_tokens=8)
