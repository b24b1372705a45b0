"""Recipes of transformers' vision-language models: from a folder as a hub has it to captions and a folder like it."""

from pathlib import Path

import pytest
from common.families import save_family
from common.models import small_lm
from common.recipes import LOADERS, ROOT, losses
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from composer_prior import load
from composer_prior.data.processing import image_placeholder
from composer_prior.emoji_scenes.writing import make_emoji_scenes
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


def smaller(name, scenes, *overrides):
    """Return a shipped recipe made small by overrides alone."""
    return load_recipe(
        ROOT / "yamls" / f"{name}.yaml",
        [
            f"train={scenes}/train",
            f"validation={scenes}/validation",
            "model.pretrained=hub/vlm",
            "reference.model.language.pretrained=hub/lm",
            *(f"{prefix}global_train_batch_size=16" for prefix in ("", "reference.")),
            *(f"{prefix}device_train_microbatch_size=4" for prefix in ("", "reference.")),
            *(f"{prefix}{key}" for prefix in ("", "reference.") for key in ON_A_CPU),
            *(f"{loader}.{key}" for loader in LOADERS for key in ("num_workers=0", "persistent_workers=false")),
            *overrides,
        ],
    )


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


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_from_nothing_to_captions(name, scenes, here, capsys):
    hub(RECIPES[name])
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB").save("picture.png")
    train(smaller(name, scenes, *SMALL_IMAGES[name]))
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
    text = [image_placeholder(processor)]
    inputs = processor(images=[[image]], text=text, return_tensors="pt")
    found = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.batch_decode(found, skip_special_tokens=True)
    assert said == load(f"runs/{name}").generate_captions([image], max_new_tokens=8)
    assert said == load(f"runs/{name}/checkpoints/latest-rank0.pt").generate_captions([image], max_new_tokens=8)
