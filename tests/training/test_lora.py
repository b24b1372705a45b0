"""LoRA on the language model by a key of the recipe: trained, resumed, sharded, and merged in the model folder."""

from pathlib import Path

import pytest
import torch
from common.families import save_family
from common.models import small_lm
from common.recipes import ROOT, SHRUNKEN, VIT, fork_ranks, losses, recipe
from PIL import Image
from torch import nn

from composer_prior import load
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.models.hugging_face import build_hugging_face
from composer_prior.models.language import build_language_model
from composer_prior.models.lora import add_lora, merged, scaling_of
from composer_prior.training.checkpoints.loading import read_weights
from composer_prior.training.checkpoints.storage import find_weights
from composer_prior.training.config import load_recipe
from composer_prior.training.keys import check_keys
from composer_prior.training.run import train

LORA = [
    "model.language.lora={r: 2, target_modules: [q_proj, v_proj, down_proj]}",
    "model.language.lora.lora_alpha=${oc.decode:${oc.env:ALPHA}}",
    "optimizer.lr=0.01",
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runs(tiles, tmp_path_factory):
    """A first stage, and a second with LoRA from its weights: in one go, resumed, and on two ranks with FSDP2."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALPHA", "8")
        train(recipe("ntp_vit", *tiles, "run_name=stage1", "max_duration=1ba"))
        second = [*tiles, *LORA, "seed=5"]
        trainer = train(recipe("ntp_vit", *second, "run_name=whole", "init_from=runs/stage1"))
        train(recipe("ntp_vit", *second, "run_name=resumed", "load_path=runs/whole/checkpoints/ep0-ba2-rank0.pt"))
        command = [str(ROOT / "train.py"), str(ROOT / "yamls/ntp_vit.yaml"), *SHRUNKEN, *VIT, *second]
        fork_ranks(folder, *command, "run_name=sharded", "init_from=runs/stage1", "parallelism_config.fsdp2={}")
        yield trainer, {name: folder / "runs" / name for name in ("stage1", "whole", "resumed", "sharded")}


def likelihoods(model):
    images = [Image.new("RGB", (32, 32), (40, shade, 60)) for shade in (0, 200)]
    return [
        value for ((values,),) in (model.text_logprobs([one], [[[20, 30, 40]]]) for one in images) for value in values
    ]


@pytest.mark.slow
def test_adapters_and_projector_are_trained_and_nothing_else(runs):
    before, after = (read_weights(find_weights(str(runs[1][name])))[0] for name in ("stage1", "whole"))
    moved = {name for name in before if not torch.equal(before[name], after.get(name, after.get(beside(name))))}
    assert moved == {name for name in before if "projector" in name}
    adapters = {name: weight for name, weight in after.items() if "lora_" in name}
    assert len(adapters) == 6
    assert all(weight.any() for weight in adapters.values())


def beside(name):
    """The name of a weight of a layer with an adapter."""
    return name.removesuffix("weight") + "base_layer.weight"


@pytest.mark.slow
def test_the_model_folder_has_the_adapters_merged(runs):
    trainer, folders = runs
    ours = likelihoods(trainer.state.model.image_text_model)
    assert ours != pytest.approx(likelihoods(load(folders["stage1"])), abs=1e-2)
    assert likelihoods(load(folders["whole"])) == pytest.approx(ours, abs=TOLERANCE)
    for name in ("whole", "sharded"):
        assert likelihoods(load(find_weights(str(folders[name] / "checkpoints")))) == pytest.approx(ours, abs=TOLERANCE)
    assert not any("lora" in file.name or "adapter" in file.name for file in Path(folders["whole"], "model").iterdir())


@pytest.mark.slow
def test_a_resumed_run_and_two_ranks_with_fsdp2_have_the_losses_of_one(runs):
    whole = losses(runs[1]["whole"])
    assert len(whole) == 4
    assert losses(runs[1]["resumed"]) == whole[2:]
    assert [loss for _, loss in losses(runs[1]["sharded"])] == pytest.approx([loss for _, loss in whole], abs=TOLERANCE)
    ours, theirs = (likelihoods(load(runs[1][name])) for name in ("whole", "sharded"))
    assert theirs == pytest.approx(ours, abs=TOLERANCE)


@pytest.mark.slow
def test_a_model_folder_is_tuned_by_adapters(runs, tiles, monkeypatch, tmp_path):
    """By sft.yaml; the tower and the rest of the language model stay as they are."""
    monkeypatch.chdir(tmp_path)
    small = ["precision=fp32", "parallelism_config=null", "optimizer.fused=false", "callbacks.memory_monitor=null"]
    small += ["global_train_batch_size=8", "max_duration=4ba", "progress_bar=false", "scheduler.t_warmup=1ba"]
    small += ["train_loader.num_workers=0", "train_loader.persistent_workers=false", "eval_loader=null"]
    small += ["train_loader.dataset.remote=null", *(word for word in tiles if word.startswith("train_loader."))]
    words = [*small, f"model.pretrained={runs[1]['stage1']}/model", "model.lora={r: 2}", "optimizer.lr=0.01"]
    trainer = train(load_recipe(ROOT / "yamls/sft.yaml", words))
    trained = {name for name, weight in trainer.state.model.named_parameters() if weight.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert adapters
    assert trained - adapters == {name for name in trained if "projector" in name}
    before, after = load(runs[1]["stage1"]), load("runs/sft")
    for model in (after, load("runs/sft/checkpoints")):
        assert likelihoods(model) == pytest.approx(likelihoods(trainer.state.model.image_text_model), abs=TOLERANCE)
    assert likelihoods(after) != pytest.approx(likelihoods(before), abs=1e-2)
    assert after.model.state_dict().keys() == before.model.state_dict().keys()


def test_adapters_in_a_model_of_transformers(tmp_path):
    """Its head is beside the language model, and is frozen with it."""
    save_family("llava", tmp_path / "vlm", [f"two red hammers, photo {number}" for number in range(20)])
    tokenizer = build_tokenizer({"name": str(tmp_path / "vlm"), "image_tokens": False})
    model = build_hugging_face(tokenizer, pretrained=str(tmp_path / "vlm"), freeze=["vision"], lora={"r": 2})
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert len(adapters) == 2 * 7 * 2  # A and B of seven layers in each of two blocks
    assert all("language_model" in name for name in adapters)
    assert {name.rpartition(".multi_modal_projector.")[1] for name in trained - adapters} == {".multi_modal_projector."}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weights_are_those_of_peft(tokenizer, use_rslora):
    model = small_lm(tokenizer)
    add_lora(model, r=4, lora_alpha=2.0, use_rslora=use_rslora)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 7 * model.config.num_hidden_layers
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    found = merged(model.state_dict(), scaling_of(model))
    assert found.keys() == small_lm(tokenizer).state_dict().keys()
    with pytest.raises(ValueError, match="it has adapters and does not hold their scaling"):
        merged(model.state_dict(), None)
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(found[f"{name}.weight"], layer.base_layer.weight.detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"target_modules": ["none_such"]}}, "^lora: Target modules .*none_such.* not found"),
        ({"lora": {"target_modules": ["embed_tokens"]}}, "^lora.target_modules: model.embed_tokens is no linear layer"),
        ({"lora": {"r": 2}, "freeze": True}, "model.language.freeze=true: adapters are trained; set it to false"),
    ],
)
def test_what_cannot_have_adapters_is_refused_in_one_line(tokenizer, settings, message):
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=message) as error:
        build_language_model(tokenizer, config={**config, "intermediate_size": 16}, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rank: 2", "model.language.lora.rank is not a key of model.language.lora"),
        ("r: 0", "r=0: expected int of at l"),
    ],
)
def test_keys_of_lora_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        check_keys(recipe("ntp_vit", f"model.language.lora={{{given}}}"))
    with pytest.raises(ValueError, match=message.replace("language.", "")):
        check_keys(load_recipe("sft.yaml", [f"model.lora={{{given}}}"]))
