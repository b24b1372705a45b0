"""The Hugging Face format against the LVLM: logits, captions, pixels and ids, through every way of loading it."""

import inspect
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from common.models import FAMILIES, FRONT_ENDS, small_lvlm
from common.photographs import photographs
from common.recipes import run_program
from common.tokenizers import KINDS, plain_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

from composer_prior.data.hub import ModelFolderError
from composer_prior.data.tokenizer import add_image_tokens, bos_id, image_token_ids, prompt_ids
from composer_prior.models.build import make_lvlm
from composer_prior.models.head import TransformedHead
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.language import build_language_model, head_of, last_hidden_states
from composer_prior.models.vision import build_open_clip, build_patches

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
LANGUAGES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 12.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi": {},
}
TIMM = {"timm_pool": "map", "timm_proj": "none"}
TOWERS = {
    "clip": {"width": 64, "layers": 3, "head_width": 32, "patch_size": 8},
    "siglip": {"timm_model_name": "vit_base_patch16_siglip_224", **TIMM, "image_size": 32},
    "eva": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 28},
}


def pictures():
    random = np.random.default_rng(7)
    sizes = [(40, 30), (23, 61), (64, 64), (17, 90)]
    small = [random.integers(0, 255, (5, 7, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(s).resize(size, Image.Resampling.BICUBIC) for s, size in zip(small, sizes, strict=True)]


def small(family, tokenizer):
    return small_lvlm(family, tokenizer).eval().image_text_model


def odd_lvlm(language, tokenizer, tower=None):
    torch.manual_seed(3)
    lm = build_language_model(tokenizer, config={"model_type": language, **SIZES, **LANGUAGES[language]})
    projector = "linear" if tower is not None else None
    tower = tower if tower is not None else build_patches(32, patch_size=8, max_side=32)
    model, processor = make_lvlm(lm, tower, projector, tokenizer)
    return ImageTextModel(model.eval(), processor)


def compare(ours, form, processor, prompt=""):
    """Inputs equal, logits within 1e-4 of what the trained model makes of them; captions equal, also with beams."""
    images = pictures()
    with torch.no_grad():
        for image in images:
            inputs = processor(images=image, text="<image>" + prompt, return_tensors="pt")
            batch = ours.inputs([image], prompt)
            assert {*inputs} == {*batch}
            for key in batch:
                assert torch.equal(inputs[key], batch[key]), key
            hidden = last_hidden_states(ours.model, **batch)
            difference = (form(**inputs).logits - TransformedHead.of(head_of(ours.model))(hidden)).abs().max()
            assert difference <= 1e-4
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
        expected = ours.generate_captions(images, prompt, **options)
        inputs = processor(
            images=images, text=["<image>" + prompt] * 4, padding=True, padding_side="left", return_tensors="pt"
        )
        ids = form.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(ids, skip_special_tokens=True) == expected
        assert ours.generate_captions(images[:1], prompt, **options) == expected[:1]


@pytest.mark.parametrize("family", [*FAMILIES, *FRONT_ENDS])
def test_saved_and_loaded_it_is_the_same(family, tokenizer, tmp_path):
    model = small(family, tokenizer)
    model.processor.prompt = "a picture of"
    model.save_pretrained(tmp_path / "model")
    again = ImageTextModel.from_pretrained(tmp_path / "model")
    assert again.generate_captions(pictures()) == model.generate_captions(pictures())
    assert again.prompt == "a picture of"
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    form = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    compare(model, form, AutoProcessor.from_pretrained(tmp_path / "model"), "a picture of")
    again.save_pretrained(tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in {*files} - {"special_tokens_map.json"}:  # transformers writes tokens that it has read in another form
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("model", "again"))
        assert one == two or (name.endswith(".json") and settings(one) == settings(two)), name


def settings(text):
    """What a file of JSON says, but for where transformers 5 has read it from."""
    return {key: value for key, value in json.loads(text).items() if key not in ("is_local", "local_files_only")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_of_language_model(language, tokenizer, tmp_path):
    model = odd_lvlm(language, tokenizer)
    model.save_pretrained(tmp_path / "model")
    form = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    compare(model, form, AutoProcessor.from_pretrained(tmp_path / "model"))
    assert form.get_input_embeddings().weight.shape == model.model.get_input_embeddings().weight.shape


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_every_kind_of_tower(kind, mode, tokenizer, tmp_path, monkeypatch):
    description = {"embed_dim": 32, "vision_cfg": {"image_size": 32, **TOWERS[kind]}, "quick_gelu": kind == "clip"}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", {**description, "text_cfg": text})
    model = odd_lvlm(
        "llama",
        tokenizer,
        build_open_clip("small", image_size=description["vision_cfg"]["image_size"], resize_mode=mode),
    )
    model.save_pretrained(tmp_path / "model")
    monkeypatch.delitem(open_clip.factory._MODEL_CONFIGS, "small")
    form, processor = both(tmp_path / "model")
    compare(model, form, processor)
    for photograph in photographs():
        pixels = processor.image_processor(photograph)["pixel_values"][0]
        assert torch.equal(pixels, model.processor.image_processor.process(photograph)[0]["pixel_values"]), (
            photograph.size
        )


def both(folder):
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_of_a_sequence_stands_there_once(kind, tmp_path):
    tokenizer = plain_tokenizer(kind, [f"two red hammers, photo {i}" for i in range(40)])
    add_image_tokens(tokenizer)
    prompt = "a photo of "
    model = odd_lvlm("llama", tokenizer)
    model.processor.prompt = prompt
    model.save_pretrained(tmp_path / "model")
    form, processor = both(tmp_path / "model")
    picture = pictures()[0]
    layout = [image_token_ids(tokenizer)[ends] for ends in model.processor.image_processor.process(picture)[1]]
    expected = [bos_id(tokenizer), *layout, *prompt_ids(tokenizer, prompt)]
    assert processor(images=picture, text="<image>" + prompt)["input_ids"] == [expected]
    assert processor(images=picture)["input_ids"] == [expected]
    if tokenizer.bos_token:
        assert processor(images=picture, text=tokenizer.bos_token + "<image>" + prompt)["input_ids"] == [expected]
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert processor(images=picture, text=text)["input_ids"] == [expected]
    assert processor.tokenizer("a hammer", add_special_tokens=False)["input_ids"] == prompt_ids(tokenizer, "a hammer")
    seen = []
    form.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    captioner = pipeline("image-text-to-text", model=form, processor=processor)
    found = captioner(images=picture, text="<image>" + prompt, max_new_tokens=8, return_full_text=False)
    assert seen[0].tolist() == [expected]
    ours = model.generate_captions([picture], max_new_tokens=8)[0]
    assert found[0]["generated_text"].removeprefix("<image>" + prompt).strip() == ours.strip()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["encoder", "merged_tiles", "merged_naflex"])
def test_without_this_package_its_own_code_reads_it(family, tokenizer, tmp_path):
    model = small(family, tokenizer)
    model.save_pretrained(tmp_path / "model")
    (picture := pictures()[0]).save(tmp_path / "picture.png")
    code = """
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "composer_prior":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
trusted = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained("model", **trusted)
processor = AutoProcessor.from_pretrained("model", **trusted)
inputs = processor(images=Image.open("picture.png"), return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1]:]
print(repr(processor.batch_decode(ids, skip_special_tokens=True)))
assert "composer_prior" not in sys.modules
"""
    output, _ = run_program(sys.executable, "-c", code, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert output.splitlines()[-1] == repr(model.generate_captions([picture], max_new_tokens=8))


def test_loading_runs_no_code_of_the_folder(tokenizer, tmp_path):
    small("patches", tokenizer).save_pretrained(tmp_path / "model")
    code = tmp_path / "model" / "modeling_prior_lvlm.py"
    code.write_text("raise SystemExit('this has run')\n" + code.read_text())
    ImageTextModel.from_pretrained(tmp_path / "model")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(tmp_path / "model")
    AutoImageProcessor.from_pretrained(tmp_path / "model")


def test_the_loss_is_that_of_the_next_token(lvlm, make_batch):
    batch = make_batch(lvlm.eval())
    keys = ("input_ids", "attention_mask", "labels", "pixel_values", "pixel_patches", "patch_mask")
    with torch.no_grad():
        outputs = lvlm.model(**{key: batch[key] for key in keys if key in batch})
        nll = lvlm(batch)["nll"]
    mean = nll.sum() / (batch["labels"] != -100).sum()
    assert float(outputs.loss) == pytest.approx(float(mean), abs=1e-5)


def test_forward_names_its_arguments_as_a_language_model_does(lvlm):
    """transformers' Trainer keeps the columns of these names, and callers pass the first ones by position."""
    forward = lvlm.eval().model.forward
    names = [*inspect.signature(forward).parameters]
    assert names[:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
    assert {"use_cache", "cache_position", "output_hidden_states", "output_attentions"} <= {*names}
    positions = torch.arange(8)[None]
    ids = positions + 100
    with torch.no_grad():
        plain = forward(ids)
        same = forward(ids, None, positions)
        other = forward(ids, None, 0 * positions)
    assert torch.equal(same.logits, plain.logits)
    assert not torch.allclose(other.logits, plain.logits)


def test_what_is_no_model_is_named(tokenizer, tmp_path):
    whole = tmp_path / "whole"
    small("patches", tokenizer).save_pretrained(whole)
    with pytest.raises(FileExistsError, match="exists"):
        small("patches", tokenizer).save_pretrained(whole)
    (tmp_path / "empty").mkdir()
    cases = {"empty": "holds no model"}
    for name in ("half", "no_tokenizer", "other", "cut"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "half" / "model.safetensors").unlink()
    cases["half"] = "model.safetensors"
    for file in (tmp_path / "no_tokenizer").glob("*token*"):
        file.unlink()
    cases["no_tokenizer"] = "tokenizer"
    config = json.loads((whole / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "llama", "auto_map": {}}))
    cases["other"] = "a llama, which captions no images"
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cases["cut"] = "cannot|can't|holds no model"
    for name, words in cases.items():
        with pytest.raises(ModelFolderError, match=words) as found:
            ImageTextModel.from_pretrained(tmp_path / name)
        assert "\n" not in str(found.value)
        assert name in str(found.value)


def test_weights_that_are_missing_are_named(tokenizer, tmp_path):
    small("patches", tokenizer).save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("model.vision_tower.proj.bias")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"not whole: 1 weights differ, such as model.vision_tower.proj.bias"):
        ImageTextModel.from_pretrained(tmp_path / "model")


def test_large_models_are_cut_into_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("composer_prior.models.model_folder.SHARD_SIZE", "50KB")
    model = small("encoder", tokenizer)
    model.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert ImageTextModel.from_pretrained(tmp_path / "model").generate_captions(pictures()) == model.generate_captions(
        pictures()
    )


def test_models_without_the_form_are_refused(tokenizer, tmp_path):
    model = small("patches", tokenizer)
    model.model.model.vision_tower = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="with the tower Linear cannot be saved in Hugging Face format"):
        model.save_pretrained(tmp_path / "model")
    assert not Path(tmp_path / "model").exists()


def test_on_the_meta_device(tokenizer, tmp_path):
    small("encoder", tokenizer).save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        form = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert {parameter.device.type for parameter in form.parameters()} == {"meta"}
    assert AutoModelForCausalLM not in type(form).__mro__
