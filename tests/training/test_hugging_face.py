"""Recipes of transformers' vision-language models: from a folder as a hub has it to captions and a folder like it."""

import json
from pathlib import Path

import pytest
import torch
from common.families import save_family
from common.models import small_lm
from common.recipes import LOADERS, ROOT, fork_ranks, losses
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from composer_prior import load
from composer_prior.data.processing import image_placeholder
from composer_prior.emoji_scenes.writing import make_emoji_scenes
from composer_prior.inference.evaluate import evaluate
from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

RECIPES = {"smolvlm": "idefics3", "qwen2_vl": "qwen2_vl"}
CAPTIONS = [f"two red hammers on grey paper, photo {number} by Ana Lindqvist" for number in range(20)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "out"
    make_emoji_scenes(folder, train_samples=32, validation_samples=8, canvas=48, num_workers=0, progress=False)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hub(kind):
    """Write a family's model, and a language model for the reference that knows its text alone."""
    save_family(kind, Path("hub/vlm"), CAPTIONS)
    tokenizer = AutoTokenizer.from_pretrained("hub/vlm")
    small_lm(tokenizer, max_position_embeddings=512).save_pretrained("hub/lm")
    tokenizer.save_pretrained("hub/lm")


ON_A_CPU = (
    "precision=fp32",
    "parallelism_config=null",
    "progress_bar=false",
    "optimizer.fused=false",
    "callbacks.memory_monitor=null",
)
SMALL_IMAGES = {
    "smolvlm": (),
    "qwen2_vl": ("model.processor.min_pixels=64", "model.processor.max_pixels=1024"),
}


def overrides(name, scenes, *more):
    """Return overrides that make a shipped recipe small, on data of the suite."""
    return [
        f"train={scenes}/train",
        f"validation={scenes}/validation",
        "model.pretrained=hub/vlm",
        "reference.model.language.pretrained=hub/lm",
        *(f"{prefix}global_train_batch_size=16" for prefix in ("", "reference.")),
        *(f"{prefix}device_train_microbatch_size=4" for prefix in ("", "reference.")),
        *(f"{prefix}{key}" for prefix in ("", "reference.") for key in ON_A_CPU),
        *(f"{loader}.{key}" for loader in LOADERS for key in ("num_workers=0", "persistent_workers=false")),
        *SMALL_IMAGES[name],
        *more,
    ]


def smaller(name, scenes, *more):
    return load_recipe(ROOT / "yamls" / f"{name}.yaml", overrides(name, scenes, *more))


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_from_nothing_to_captions(name, scenes, here, capsys):
    hub(RECIPES[name])
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB").save("picture.png")
    prompt = [f"{loader}_loader.dataset.prompt=a photo of" for loader in ("train", "eval")]
    captioning = {"data": f"{scenes}/validation"}
    train(smaller(name, scenes, *prompt, f"benchmarks={{captioning: {{data: {captioning['data']}, limit: 4}}}}"))
    steps = losses(f"runs/{name}")
    assert [batch for batch, _ in steps] == [0, 1]
    assert all(0 < loss < 20 for _, loss in steps)
    assert "generated:" in capsys.readouterr().out
    folder = f"runs/{name}/model"
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert stock.config.architectures == AutoModelForImageTextToText.from_pretrained("hub/vlm").config.architectures
    assert not [*Path(folder).glob("*.py")]
    image = Image.open("picture.png")
    text = [image_placeholder(processor) + "a photo of"]
    inputs = processor(images=[[image]], text=text, return_tensors="pt")
    found = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.batch_decode(found, skip_special_tokens=True)
    assert said == load(f"runs/{name}").generate_captions([image], max_new_tokens=8)
    assert said == load(f"runs/{name}/checkpoints/latest-rank0.pt").generate_captions([image], max_new_tokens=8)
    last = json.loads(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()[-1])
    figures = evaluate(f"runs/{name}", captioning, benchmark="captioning", limit=4, out="evaluation")["figures"]
    during = {key.rpartition("/")[2]: value for key, value in last.items() if key.startswith("eval/captioning/")}
    assert during == {key: pytest.approx(one["value"]) for key, one in figures.items() if one["value"] is not None}


ALONE = ("reference=null", "algorithms.prior=null", "train_loader.dataset.scores=null", "sample_captions=0")
CHECKPOINTING = "parallelism_config={fsdp2: {activation_checkpointing: true}}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_reach_the_losses_of_one(name, scenes, here):
    hub(RECIPES[name])
    command = [ROOT / "train.py", ROOT / "yamls" / f"{name}.yaml", *overrides(name, scenes, *ALONE)]
    train(smaller(name, scenes, *ALONE, "run_name=one"))
    fork_ranks(here, *command, "run_name=two")
    fork_ranks(here, *command, "run_name=fsdp2", CHECKPOINTING)
    one = losses("runs/one")
    assert len(one) == 2
    for run in ("two", "fsdp2"):
        assert [loss for _, loss in losses(f"runs/{run}")] == pytest.approx([loss for _, loss in one], abs=1e-4)
        first, other = (
            AutoModelForImageTextToText.from_pretrained(f"runs/{which}/model").state_dict() for which in ("one", run)
        )
        for key, tensor in first.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-4, msg=key)


def test_two_stages(scenes, here, capsys):
    """The projector alone, then language model and projector, from the weights of the first."""
    hub("qwen2_vl")
    one = ("max_duration=1ba", "scheduler.t_warmup=0ba", *ALONE)
    train(smaller("qwen2_vl", scenes, *one, "run_name=stage1", "model.freeze=[vision, language]"))
    still = ("optimizer.lr=0", "optimizer.groups=null", "seed=5")
    trained = train(smaller("qwen2_vl", scenes, *one, "run_name=stage2", "init_from=runs/stage1", *still))
    assert "Weights: language, projector, vision from runs/stage1" in capsys.readouterr().out
    names = {name for name, weight in trained.state.model.named_parameters() if weight.requires_grad}
    assert names == {name for name in names if "visual" not in name or "merger" in name}
    before, first, second = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for folder in ("hub/vlm", "runs/stage1/model", "runs/stage2/model")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], before[name])} == {
        name for name in first if "merger" in name
    }


def test_a_sequence_that_no_position_is_left_for_is_refused_before_training(scenes, here):
    hub("idefics3")
    with pytest.raises(
        ValueError, match=r"The language model has 512 positions, and .* or the size of images in model\.processor"
    ) as error:
        train(smaller("smolvlm", scenes, *ALONE, "train_loader.dataset.max_caption_tokens=510"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pretrained=nowhere/model", r"tokenizer\.name \(by default model\.pretrained .*\)='nowhere/model'"),
        ("model.pretrained=null", "model.pretrained is missing: give a folder or hub id, or model.config and"),
    ],
)
def test_a_model_that_is_not_there_is_named_by_its_key(override, message, scenes, here):
    hub("idefics3")
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(smaller("smolvlm", scenes, *ALONE, override))
    assert "\n" not in str(error.value)
