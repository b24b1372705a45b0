"""Recipes of transformers' vision-language models: from a folder as a hub has it to captions and a folder like it."""

import json
from pathlib import Path

import pytest
import torch
from common.families import FAMILIES, save_family
from common.models import small_lm
from common.recipes import LOADERS, ROOT, fork_ranks, losses
from common.tokenizers import plain_tokenizer
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    SmolVLMVideoProcessor,
)

from composer_prior import load
from composer_prior.data.hub import ModelFolderError
from composer_prior.data.processing import image_placeholder
from composer_prior.emoji_scenes.writing import make_emoji_scenes
from composer_prior.inference.evaluate import evaluate
from composer_prior.training.config import load_recipe, name_of_data
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
    """The configuration of a tower may name half precision, which the ranks without weights go by."""
    hub(RECIPES[name])
    settings = json.loads((file := Path("hub/vlm/config.json")).read_text())
    settings["vision_config"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(settings))
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


@pytest.mark.slow
def test_two_ranks_of_every_other_family(scenes, here):
    """With a trained tower, of which LLaVA's families leave weights without a gradient: DDP finds those unknown."""
    kinds = [kind for kind in FAMILIES if kind not in RECIPES.values()]
    for kind in kinds:
        save_family(kind, Path("hub", kind), CAPTIONS)
    small = ("model.freeze=null", "model.processor=null", "save_folder=null", "autoresume=false", "eval_loader=null")

    def words(kind, name):
        return overrides("smolvlm", scenes, *ALONE, *small, f"model.pretrained=hub/{kind}", f"run_name={name}-{kind}")

    for kind in kinds:
        train(load_recipe(ROOT / "yamls" / "smolvlm.yaml", words(kind, "one")))
    Path("jobs.json").write_text(json.dumps([words(kind, "two") for kind in kinds]))
    fork_ranks(here, ROOT / "tests/common/programs/train_all.py", ROOT / "yamls" / "smolvlm.yaml", "jobs.json")
    for kind in kinds:
        one, two = ([loss for _, loss in losses(f"runs/{name}-{kind}")] for name in ("one", "two"))
        assert len(one) == 2
        assert two == pytest.approx(one, abs=1e-4), kind
    Path("unknown.py").write_text("from composer_prior.models import hugging_face\n\nhugging_face._FEATURED = ()\n")
    unknown = (*words("llava", "unknown"), "code_paths=[unknown.py]")
    fork_ranks(here, ROOT / "train.py", ROOT / "yamls" / "smolvlm.yaml", *unknown)
    found = AutoModelForImageTextToText.from_pretrained("runs/unknown-llava/model").state_dict()
    for key, tensor in AutoModelForImageTextToText.from_pretrained("runs/one-llava/model").state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-4, msg=key)


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


@pytest.mark.slow
def test_the_weights_of_a_reference_are_those_of_the_language_model(scenes, here, capsys):
    """The reference has its head in it, and the families beside their language model."""
    hub("idefics3")
    settings = json.loads(Path("hub/vlm/config.json").read_text())["text_config"]
    tokenizer = AutoTokenizer.from_pretrained("hub/vlm")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained("hub/lm")
    tokenizer.save_pretrained("hub/lm")
    still = ("optimizer.lr=0", "optimizer.groups=null", "max_duration=1ba")
    train(smaller("smolvlm", scenes, *still, "sample_captions=0", "reference.max_duration=1ba", "run_name=first"))
    folder = "runs/reference-" + name_of_data(f"{scenes}/train") + "-vlm"
    for source, run in ((folder, "second"), (f"{folder}/model", "third")):
        train(smaller("smolvlm", scenes, *ALONE, *still, f"init_from={source}", f"run_name={run}"))
        assert f"Weights: language from {folder}" in (said := capsys.readouterr().out)
        assert "projector, vision stay as the recipe says" in said
        found = AutoModelForImageTextToText.from_pretrained(f"runs/{run}/model")
        reference = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        before = AutoModelForImageTextToText.from_pretrained("hub/vlm")
        pairs = [(found.model.text_model, reference.model), (found.lm_head, reference.lm_head)]
        pairs += [(found.model.vision_model, before.model.vision_model)]
        for ours, theirs in pairs:
            for name, weight in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[name], weight, rtol=0, atol=0, msg=name)
    small_lm(tokenizer, hidden_size=16).save_pretrained("other")
    tokenizer.save_pretrained("other")
    with pytest.raises(ValueError, match=r"^init_from=other: .*; init_from needs the same architecture and tokenizer"):
        train(smaller("smolvlm", scenes, *ALONE, *still, "init_from=other", "run_name=fourth"))


CODE = """
from transformers import Idefics3Config, Idefics3ForConditionalGeneration


class OwnConfig(Idefics3Config):
    model_type = "own_vlm"


class OwnModel(Idefics3ForConditionalGeneration):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_code_of_a_model_runs_only_where_it_is_allowed(scenes, here, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    hub("idefics3")
    Path("hub/vlm/own.py").write_text(CODE)
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    file = Path("hub/vlm/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own_vlm", "auto_map": places}))
    refusal = "comes with Python code of its own, which is not run unless you say trust_remote_code=true"
    with pytest.raises(ModelFolderError, match=refusal):
        train(smaller("smolvlm", scenes, *ALONE))
    once = ("model.trust_remote_code=true", "max_duration=1ba")
    train(smaller("smolvlm", scenes, *ALONE, *once))
    for source in ("runs/smolvlm", "runs/smolvlm/checkpoints/latest-rank0.pt"):
        with pytest.raises(ModelFolderError, match=refusal):
            load(source)
        assert type(load(source, trust_remote_code=True).model).__name__ == "OwnModel"
    train(smaller("smolvlm", scenes, *ALONE, *once, "run_name=again", "init_from=runs/smolvlm/model"))


def test_a_checkpoint_beside_a_language_model_is_named(here):
    tokenizer = plain_tokenizer("smollm2", CAPTIONS)
    small_lm(tokenizer).save_pretrained("run/architecture")
    tokenizer.save_pretrained("run/architecture")
    Path("run/checkpoints").mkdir()
    Path("run/checkpoints/ba1.pt").touch()
    with pytest.raises(ModelFolderError, match=r"architecture holds a llama, which captions no images\.$"):
        load("run/checkpoints/ba1.pt")


def test_a_package_that_a_processor_lacks_is_named_before_training(scenes, here, monkeypatch):
    hub("idefics3")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    for file in Path("hub/vlm").glob("*processor*.json"):
        file.write_text(file.read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
    SmolVLMVideoProcessor().save_pretrained("hub/vlm")
    with pytest.raises(ValueError, match="`num2words` is required") as error:
        train(smaller("smolvlm", scenes))
    assert "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_a_processor_of_another_tower_is_refused_before_the_reference_is_trained(scenes, here):
    hub("idefics3")
    with pytest.raises(
        ValueError, match=r"writes \d+ image tokens .* makes \d+ features; change .*model\.processor\.max_image_size\.$"
    ) as error:
        train(smaller("smolvlm", scenes, "model.processor={max_image_size: {longest_edge: 32}}"))
    assert "\n" not in str(error.value)
    assert not [*Path("runs").glob("*/metrics.jsonl")]


@pytest.mark.parametrize(("run", "viewer"), [("smolvlm", "stage1"), ("gain_vit", "smolvlm")])
def test_a_viewer_of_another_kind_than_the_run_is_refused_by_its_name(run, viewer):
    recipe = load_recipe(ROOT / "yamls" / f"{run}.yaml", [f"viewer={ROOT}/yamls/{viewer}.yaml", "train=data"])
    kinds = rf"viewer\.model\.name={recipe.viewer['model']['name']} reads no batches of model\.name="
    with pytest.raises(ValueError, match=rf"^{kinds}{recipe.model['name']}: name a recipe of"):
        train(recipe)


def test_references_of_other_tokenizers_have_folders_of_their_own():
    """And their scores, beside the same captions in a bucket."""
    names, own = ("stage1", "smolvlm", "qwen2_vl"), ("train=s3://bucket/captions", "validation=s3://bucket/other")
    recipes = [load_recipe(ROOT / "yamls" / f"{name}.yaml", words) for words in ((), own) for name in names]
    folders = [recipe.reference_recipe.run_folder for recipe in recipes]
    on_captions = "runs/reference-" + name_of_data("s3://bucket/captions")
    ends = ("", "-SmolVLM-256M-Base", "-Qwen2-VL-2B")
    shipped = [f"runs/reference_{name}" for name in ("smollm2", "smollm2-SmolVLM-256M-Base", "qwen2-Qwen2-VL-2B")]
    assert folders == [*shipped, *(f"{on_captions}{end}" for end in ends)]
    assert [recipe.algorithms["prior"]["reference"] for recipe in recipes] == [f"{one}/model" for one in folders]
    scores = [recipe.train_loader["dataset"]["scores"] for recipe in recipes]
    assert scores[3:] == [f"s3://bucket/captions-scores{end}" for end in ends]
    assert len({*scores}) == 6


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
        ("tokenizer.name=hub/tokenizer", "hub/tokenizer' holds no processor .* leave tokenizer.name out"),
        ("tokenizer.name=hub/lm", "hub/lm' holds no processor of images and text: .* leave tokenizer.name out"),
        ("model.pretrained=null", "model.pretrained is missing: give a folder or hub id, or model.config and"),
    ],
)
def test_a_model_that_is_not_there_is_named_by_its_key(override, message, scenes, here):
    hub("idefics3")
    AutoTokenizer.from_pretrained("hub/lm").save_pretrained("hub/tokenizer")
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(smaller("smolvlm", scenes, *ALONE, override))
    assert "\n" not in str(error.value)
