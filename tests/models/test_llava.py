"""The LLaVA format of a model, loaded by stock transformers, against the model; and what has no such form."""

import json
import re
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from functools import cache

import numpy as np
import open_clip
import pytest
import timm
import torch
from common.models import small_naflex
from common.photographs import photographs
from common.tokenizers import KINDS, plain_tokenizer
from open_clip.timm_model import TimmModel
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration

from composer_prior import ImageTextModel
from composer_prior.commands.cli import main
from composer_prior.data.tokenizer import add_image_tokens, bos_id, prompt_ids
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.models import stock_vision as stock
from composer_prior.models.build import make_lvlm
from composer_prior.models.language import build_language_model
from composer_prior.models.llava import architecture_name, export_llava
from composer_prior.models.llava_check import LlavaError, cut_differs
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import (
    OpenCLIPTower,
    build_encoder,
    decoder_of,
    prune_encoder,
)
from composer_prior.models.vision import build_open_clip, build_patches

SIZE, PATCH, WIDTH = 24, 8, 32
PREPROCESS = {
    "size": SIZE,
    "mode": "RGB",
    "mean": (0.48, 0.46, 0.41),
    "std": (0.27, 0.26, 0.28),
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "fill_color": 0,
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 128}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
LANGUAGE_MODELS = {
    "llama": LLAMA,
    "smollm": {**LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 16},
    "mistral": {**LLAMA, "sliding_window": 6},
    "gemma": {**LLAMA, "head_dim": 16},
    "phi3": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "stablelm": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": {**SMALL, "intermediate_size": 64, "max_position_embeddings": 128},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.2},
    "falcon": SMALL,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def shaken(module):
    """The module with weights among which none is what another initialisation would give."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module.eval()


def clip_tower(quick_gelu=False, preprocess=None, **changes):
    """A tower of OpenCLIP's own ViT with three blocks, of which two are left."""
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": 3, "head_width": 8, "mlp_ratio": 2.0}
    config = {
        "type": "open_clip",
        "embed_dim": 16,
        "vision_cfg": {**vision, **changes},
        "quick_gelu": quick_gelu,
        "layer": 1,
        "preprocess": {**PREPROCESS, **(preprocess or {})},
    }
    return shaken(
        OpenCLIPTower({**config, "width": WIDTH, "image_tokens": (SIZE // PATCH) ** 2}, build_encoder(config))
    )


def siglip_tower(act_layer="gelu", **changes):
    """A tower of timm's SigLIP with three blocks, of which two are left."""
    arguments = {"class_token": False, "global_pool": "map", "num_classes": 0, "act_layer": act_layer, **changes}
    encoder = TimmModel.__new__(TimmModel)  # its constructor knows none that is small
    nn.Module.__init__(encoder)
    encoder.trunk = VisionTransformer(SIZE, PATCH, embed_dim=WIDTH, depth=3, num_heads=4, mlp_ratio=2.5, **arguments)
    encoder.head = nn.Sequential()
    encoder.image_size = (SIZE, SIZE)
    prune_encoder(encoder, 1)
    config = {
        "type": "open_clip",
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "timm_model_name": "a_small_siglip"},
        "quick_gelu": False,
        "layer": 1,
        "preprocess": {**PREPROCESS, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    }
    return shaken(OpenCLIPTower({**config, "width": WIDTH, "image_tokens": (SIZE // PATCH) ** 2}, encoder))


def lvlm(tokenizer, tower=None, projector="mlp", prompt="", factor=1, **language):
    """A small model; a Llama unless told otherwise."""
    tower = tower or clip_tower()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # some have others, beyond this vocabulary
    config = {"model_type": "llama", **(language or LLAMA), **special}
    lm = shaken(build_language_model(tokenizer, config=config))
    model, processor = make_lvlm(lm, tower, projector, tokenizer, prompt, factor)
    shaken(model.model.multi_modal_projector)
    return ImageTextModel(model.eval(), processor)


@cache
def captions():
    return [make_sample("train", i)["caption"] for i in range(60)]


def image_tokenizer(kind):
    tokenizer = plain_tokenizer(kind, captions())
    add_image_tokens(tokenizer)
    return tokenizer


def pictures(sizes=((50, 31), (24, 24), (33, 97))):
    generator = np.random.default_rng(3)
    small = [Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes, strict=True)]


def loaded(folder):
    """What stock transformers makes of a folder, without a word about code."""
    assert not list(folder.rglob("*.py"))
    assert not any("auto_map" in file.read_text() for file in folder.glob("*.json"))
    llava, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(found.values())
    assert type(llava) is LlavaForConditionalGeneration
    return llava.eval(), AutoProcessor.from_pretrained(folder, backend="pil")


@torch.no_grad()
def assert_same(model, folder, **vision):
    """Logits, captions, and the values of the vision model's configuration."""
    llava, processor = loaded(folder)
    images = pictures()
    inputs = processor(images=images, text=["<image>" + model.prompt] * len(images), return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    prefix = [
        bos_id(model.tokenizer),
        *[model.processor.image_token_id] * model.processor.image_processor.max_image_tokens,
    ]
    prefix += prompt_ids(model.tokenizer, model.prompt)
    assert inputs["input_ids"].tolist() == [prefix] * len(images)
    own = [model.processor.image_processor.process(image)[0]["pixel_values"] for image in images]
    torch.testing.assert_close(inputs["pixel_values"], torch.stack(own), rtol=0, atol=1e-5)
    expected = model.model(input_ids=inputs["input_ids"], pixel_values=torch.stack(own)).logits
    torch.testing.assert_close(llava(**inputs).logits, expected, rtol=0, atol=1e-4)
    ids = llava.generate(**inputs, max_new_tokens=12)[:, len(prefix) :]
    expected = model.generate_captions(images, max_new_tokens=12)
    assert processor.batch_decode(ids, skip_special_tokens=True) == expected
    assert len(set(expected)) > 1, "the pictures make no difference"
    rows = model.model.causal_lm.get_input_embeddings().weight.shape[0]
    assert llava.get_input_embeddings().weight.shape[0] == llava.lm_head.weight.shape[0] == rows
    assert {name: getattr(llava.config.vision_config, name) for name in vision} == vision
    return llava, processor


def takes_rows_for_channels():
    """Whether transformers reads a red picture that is 3 pixels high as one of stripes, as transformers 4 does."""
    pixels = CLIPImageProcessor()(Image.new("RGB", (32, 3), "red"), return_tensors="pt")["pixel_values"]
    return bool(pixels[0].flatten(1).std(1).max() > 0.1)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models(tmp_path, tokenizer, kind):
    model = lvlm(tokenizer, prompt="a picture of", **{"model_type": kind, **LANGUAGE_MODELS[kind]})
    report = export_llava(model, tmp_path / "llava")
    assert report.logits < 1e-4
    flat = [line for line in report.warnings if "torchvision" not in line]
    assert [line[:36] for line in flat] == ["pictures that are 1 or 3 pixels high"] * takes_rows_for_channels()
    llava, _ = assert_same(model, tmp_path / "llava")
    tied = model.model.causal_lm.get_output_embeddings().weight is model.model.causal_lm.get_input_embeddings().weight
    known = hasattr(decoder_of(model.model.causal_lm), "embed_tokens")  # the only name under which LLaVA ties them
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) == (tied and known)


@pytest.mark.parametrize(
    ("tower", "expected"),
    [
        (clip_tower, {"model_type": "clip_vision_model", "hidden_act": "gelu", "num_hidden_layers": 2}),
        (
            lambda: clip_tower(quick_gelu=True, norm_kwargs={"eps": 1e-3}),
            {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
        ),
        (lambda: clip_tower(act_kwargs={"approximate": "tanh"}), {"hidden_act": "gelu_pytorch_tanh"}),
        (siglip_tower, {"model_type": "siglip_vision_model", "hidden_act": "gelu", "intermediate_size": 80}),
        (lambda: siglip_tower("gelu_tanh"), {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
    ],
    ids=["clip", "quick_gelu", "tanh", "siglip", "siglip_tanh"],
)
@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_towers_and_projectors(tmp_path, tokenizer, tower, expected, projector):
    model = lvlm(tokenizer, tower(), projector)
    export_llava(model, tmp_path / "llava")
    llava, processor = assert_same(model, tmp_path / "llava", **expected)
    class_tokens = int(llava.config.vision_config.model_type == "clip_vision_model")
    strategy = "default" if class_tokens else "full"
    for part in (llava.config, processor):
        assert part.vision_feature_select_strategy == strategy
    assert processor.num_additional_image_tokens == class_tokens
    assert llava.config.projector_hidden_act == ("gelu" if projector == "mlp" else "linear")


@pytest.mark.parametrize(("tower", "class_tokens"), [(clip_tower, 1), (siglip_tower, 0)])
def test_what_vllm_reads(tmp_path, tokenizer, tower, class_tokens):
    """Its loader's rules: the classes it builds, one feature a patch and one of the class token, names of weights."""
    model = lvlm(tokenizer, tower())
    model.model.causal_lm.config.architectures = None
    export_llava(model, tmp_path / "llava")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    vision = config["vision_config"]
    assert vision["model_type"] == ("clip_vision_model" if class_tokens else "siglip_vision_model")
    features = (vision["image_size"] // vision["patch_size"]) ** 2 + class_tokens
    used = features - (config["vision_feature_select_strategy"] == "default")
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    side = vision["image_size"]
    inputs = processor(images=Image.new("RGB", (side, side)), text=processor.image_token, return_tensors="pt")
    assert int((inputs["input_ids"] == config["image_token_index"]).sum()) == used == config["image_seq_length"]
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    with safe_open(tmp_path / "llava/model.safetensors", "pt") as weights:
        first = {re.sub(r"^model\.", "", name).split(".")[0] for name in weights.keys()}  # noqa: SIM118 - no mapping
    assert first <= {"language_model", "vision_tower", "multi_modal_projector", "lm_head"}


def test_no_projector(tmp_path, tokenizer):
    model = lvlm(tokenizer, projector=None)
    export_llava(model, tmp_path / "llava")
    assert_same(model, tmp_path / "llava")


def test_another_gelu_would_be_found_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(stock, "_activation", lambda modules: "gelu_pytorch_tanh")
    with pytest.raises(LlavaError, match=r"^Logits differ by up to .*; nothing is written\.$"):
        export_llava(lvlm(tokenizer, siglip_tower("gelu")), tmp_path / "llava")
    assert not list(tmp_path.iterdir())


def test_other_pixels_would_be_found_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("composer_prior.models.llava_check.cut_differs", lambda *sizes: not cut_differs(*sizes))
    model = lvlm(tokenizer, clip_tower(preprocess={"resize_mode": "shortest", "size": SIZE}))
    with pytest.raises(LlavaError, match="image processor's pixels differ"):
        export_llava(model, tmp_path / "llava")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_pixels(tmp_path, tokenizer, mode, interpolation):
    """Pixels of every size are the same, but where the middle is cut otherwise, and the report says so."""
    model = lvlm(tokenizer, clip_tower(preprocess={"resize_mode": mode, "interpolation": interpolation}))
    report = export_llava(model, tmp_path / "llava")
    _, stock = loaded(tmp_path / "llava")
    processor = stock.image_processor
    default = AutoProcessor.from_pretrained(tmp_path / "llava").image_processor
    levels = 2.02 / 255 / min(processor.image_std)  # two of 255
    generator = np.random.default_rng(1)
    differing = 0
    made = pictures([tuple(map(int, size)) for size in generator.integers(4, 130, (150, 2))])
    for image in [*made, *photographs()]:
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        same = torch.allclose(
            theirs, model.processor.image_processor.process(image)[0]["pixel_values"], rtol=0, atol=1e-5
        )
        assert same != (mode == "shortest" and cut_differs(*image.size, SIZE)), image.size
        assert (default(image, return_tensors="pt")["pixel_values"][0] - theirs).abs().max() <= levels
        differing += not same
    assert (differing > 20) == (mode == "shortest")
    shown = str(report).splitlines()[1:]
    assert any("warning: resize_mode=shortest" in line for line in shown) == (mode == "shortest")
    assert any("fits pictures with torchvision" in line for line in shown) == (type(default) is not type(processor))


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_every_client_begins_with_one_bos(tmp_path, kind):
    tokenizer = image_tokenizer("llama2" if kind == "mistral" else kind)
    if kind == "mistral":  # SentencePiece's newer form: a space before the first text alone
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    before = tokenizer.backend_tokenizer.to_str()
    prompt = "a picture of"
    model = lvlm(tokenizer, prompt=prompt)
    export_llava(model, tmp_path / "llava")
    _, processor = assert_same(model, tmp_path / "llava")
    start = [bos_id(tokenizer), *[model.processor.image_token_id] * 9, *prompt_ids(tokenizer, prompt)]
    (image,) = pictures([(40, 30)])
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}
    whole = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    written = processor(images=image, text=processor.apply_chat_template([message]))
    assert whole["input_ids"] == written["input_ids"] == [start]
    assert processor.tokenizer("a cat")["input_ids"] == [bos_id(tokenizer), *prompt_ids(tokenizer, "a cat")]
    padded = processor.tokenizer(["a cat", "a cat and a dog"], padding=True)
    assert set(padded) == {"input_ids", "attention_mask"}
    assert padded["attention_mask"][0][0] == 0
    assert padded["attention_mask"][0][-1] == 1
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_class_that_writes_over_its_file(tmp_path):
    from transformers import GPTNeoXTokenizerFast

    plain = plain_tokenizer("gpt2", captions())
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = GPTNeoXTokenizerFast(tokenizer_object=plain.backend_tokenizer, **special)
    add_image_tokens(tokenizer)
    model = lvlm(tokenizer, prompt="see")
    export_llava(model, tmp_path / "llava")
    assert_same(model, tmp_path / "llava")


SCALED = {"granite": {**LLAMA, "logits_scaling": 2.0}, "cohere": LLAMA, "gemma2": {**LLAMA, "head_dim": 16}}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model_type": "phi", **LLAMA}, "PhiForCausalLM has no LLaVA equivalent: its LM head has a bias"),
        ({"model_type": "granite", **SCALED["granite"]}, "GraniteForCausalLM has no LLaVA equivalent: it scales its"),
        ({"model_type": "cohere", **SCALED["cohere"]}, "CohereForCausalLM has no LLaVA equivalent: it scales its"),
        ({"model_type": "gemma2", **SCALED["gemma2"]}, "Gemma2ForCausalLM has no LLaVA equivalent: it caps its logits"),
        (
            {"model_type": "opt", **LANGUAGE_MODELS["opt"], "word_embed_proj_dim": 16},
            "OPTForCausalLM has no LLaVA equivalent: its embeddings, hidden states and LM head differ in width",
        ),
        (
            {"tower": lambda: clip_tower(no_ln_pre=True)},
            "the vision tower of OpenCLIP has no LLaVA equivalent: it lacks ln_pre.bias",
        ),
        ({"tower": lambda: clip_tower(ls_init_value=0.1)}, "it has transformer.resblocks.0.ls_1.gamma"),
        ({"tower": lambda: clip_tower(qk_norm=True)}, "its blocks are CustomResidualAttentionBlock"),
        (
            {"tower": lambda: clip_tower(attentional_pool=True, attn_pooler_heads=2)},
            "it has attn_pool.attn.in_proj_bias",
        ),
        (
            {"tower": lambda: siglip_tower(class_token=True)},
            "tower a_small_siglip has no LLaVA equivalent: it has trunk.cls_token",
        ),
        ({"tower": lambda: siglip_tower(qk_norm=True)}, "it has trunk.blocks.0.attn.k_norm.bias"),
        ({"tower": lambda: siglip_tower("relu")}, "its activation is ReLU"),
        ({"tower": lambda: clip_tower(preprocess={"resize_mode": "longest"})}, "resize_mode=longest has no LLaVA"),
        (
            {"tower": lambda: build_patches(32, 16, 48), "projector": None},
            "the vision tower PatchEmbedding has no LLaVA",
        ),
        (
            {"projector": "mean_pool", "factor": 3},
            "the projector mean_pool has no LLaVA equivalent: it makes one image token of 9",
        ),
        ({"tower": small_naflex}, "the vision tower NaFlexTower has no LLaVA equivalent: it is no encoder of OpenCLIP"),
        (
            {"tower": lambda: build_open_clip("prior-vit-tiny", tiles={"max": 4})},
            "model.vision.tiles has no LLaVA equivalent",
        ),
    ],
)
def test_what_has_no_llava_form_is_refused_by_name(tmp_path, tokenizer, parts, message):
    made = parts.pop("tower")() if "tower" in parts else None
    model = lvlm(tokenizer, made, **parts)
    with pytest.raises(LlavaError) as error:
        export_llava(model, tmp_path / "llava")
    assert message in str(error.value)
    assert str(error.value).endswith(
        "; use the model folder of the run, which transformers reads with trust_remote_code=True."
    )
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_language_model_that_fails_inside_of_llava(tmp_path, tokenizer):
    model = lvlm(tokenizer, model_type="mamba", hidden_size=32, num_hidden_layers=2, state_size=8)
    with pytest.raises(
        LlavaError, match=r"^LLaVA with the language model MambaForCausalLM fails \(.+\); nothing is written\."
    ):
        export_llava(model, tmp_path / "llava")
    assert not list(tmp_path.iterdir())


def test_a_model_of_lower_precision_keeps_it(tmp_path, tokenizer):
    model = lvlm(tokenizer, siglip_tower(), "linear")
    model.model.bfloat16().train()
    report = export_llava(model, tmp_path / "llava")
    assert report.dtype == "bfloat16"
    assert model.model.training
    llava, _ = loaded(tmp_path / "llava")
    assert {parameter.dtype for parameter in llava.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_stock_transformers_needs_nothing_of_ours(tmp_path, tokenizer):
    model = lvlm(tokenizer, prompt="a picture of")
    export_llava(model, tmp_path / "llava")
    (image,) = pictures([(40, 30)])
    image.save(tmp_path / "image.png")
    code = """if True:
        import sys
        sys.modules.update(composer_prior=None, open_clip=None, timm=None)  # importing them raises
        from PIL import Image
        from transformers import AutoProcessor, LlavaForConditionalGeneration
        model = LlavaForConditionalGeneration.from_pretrained("llava")
        processor = AutoProcessor.from_pretrained("llava", backend="pil")
        inputs = processor(images=Image.open("image.png"), text="<image>a picture of", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:]
        print(repr(processor.decode(ids, skip_special_tokens=True)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert literal_eval(done.stdout.splitlines()[-1]) == model.generate_captions([image], max_new_tokens=12)[0]


@pytest.mark.slow
def test_open_clip_architectures():
    """How many have a LLaVA equivalent, in which GELU, and what is in the way of the others."""
    forms, ways, built = Counter(), {}, {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {**config["vision_cfg"], "image_size": 224}
        timm_name = vision.get("timm_model_name")
        if isinstance(vision.get("layers"), list) or (timm_name and not timm_module(timm_name).endswith("transformer")):
            ways[name] = "its class"  # the only one of timm that is not refused stands in that module
            continue
        if not timm_name:
            vision["layers"] = 1
        tower = {"type": "open_clip", "embed_dim": 8, "vision_cfg": vision, "layer": 0}
        tower["quick_gelu"] = config.get("quick_gelu", False)
        key = json.dumps(tower, sort_keys=True)
        if key not in built:
            with torch.device("meta"):
                encoder = build_encoder(tower)
            try:
                form = stock.stock_vision(encoder, 224).config
                built[key] = (form.model_type, form.hidden_act)
            except stock.NoStockModelError as error:
                built[key] = str(error)
        if isinstance(built[key], str):
            ways[name] = built[key]
        else:
            forms[built[key]] += 1
    assert forms >= Counter(
        {
            ("clip_vision_model", "gelu"): 38,
            ("clip_vision_model", "quick_gelu"): 10,
            ("siglip_vision_model", "gelu"): 20,
            ("siglip_vision_model", "gelu_pytorch_tanh"): 8,
        }
    )
    assert sum(forms.values()) + len(ways) == len(open_clip.list_models())
    found = {
        way: {name for name in ways if way in ways[name]} for way in ("ln_pre.bias", "attn_pool", "ls_1", "trunk.")
    }
    assert found["ln_pre.bias"] == {name for name in open_clip.list_models() if "CLIPA" in name}
    assert found["attn_pool"] == {"coca_ViT-B-32", "coca_ViT-L-14"}
    assert (found["ls_1"], found["trunk."]) == ({"ViT-M-16-alt"}, {"MobileCLIP2-L-14"})
    classes = {name for name, way in ways.items() if way == "its class"}
    families = ("RN", "EVA", "PE-Core", "ViTamin", "MobileCLIP", "convnext", "vit_relpos")
    assert {name for name in open_clip.list_models() if name.startswith(families)} == classes | found["trunk."]


def timm_module(name):
    return timm.models.model_entrypoint(name).__module__


def assert_flat_pictures_are_read_as_the_warning_says(model, folder):
    _, processor = loaded(folder)
    for height in (1, 2, 3):
        picture = pictures()[0].resize((40, height))
        ours = model.processor.image_processor.process(picture)[0]["pixel_values"]
        given = {"images": picture, "text": "<image>", "return_tensors": "pt"}
        assert torch.equal(processor(**given, input_data_format="channels_last")["pixel_values"][0], ours)
        if height == 2:
            assert torch.equal(processor(**given)["pixel_values"][0], ours)


def test_the_command(tmp_path, tokenizer, capsys):
    tower = build_open_clip("prior-vit-tiny", image_size=24, layer=-2)
    model = lvlm(tokenizer, tower, prompt="see: ")
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "llava"

    def export(*words):
        with pytest.raises(SystemExit) as end:
            main(["export", str(tmp_path / "model"), str(out), *words])
        return end.value.code

    assert export("format=onnx").startswith("error: format=onnx is not known: llava.")
    assert export("dtype=int8") == "error: dtype=int8: expected float32, bfloat16, float16."
    assert export("format=llava") == 0
    shown, further = capsys.readouterr()
    assert not any(unsaid in further for unsaid in ("use_fast", "Python identifier", "ambiguous", "fast tokenizer"))
    assert "LLaVA in float32; on 3 pictures the captions are the same, logits differ by at most" in shown
    assert "warning: resize_mode=shortest" in shown
    assert_same(model, out)
    assert_flat_pictures_are_read_as_the_warning_says(model, out)
    assert export() == f"error: {out} exists; choose another folder, or overwrite=true."
    assert export("dtype=bfloat16", "overwrite=true") == 0
    llava, processor = loaded(out)
    assert {parameter.dtype for parameter in llava.parameters()} == {torch.bfloat16}
    inputs = processor(images=pictures(), text=["<image>see: "] * 3, return_tensors="pt").to(torch.bfloat16)
    assert torch.isfinite(llava(**inputs).logits).all()
    out = tmp_path / "model"
    assert export("overwrite=true").startswith(f"error: {out} holds no earlier export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "model"]


def test_architectures_are_named():
    tower = {"embed_dim": 768, "quick_gelu": False}
    for name in ("ViT-L-14-CLIPA-336", "coca_ViT-L-14", "EVA02-B-16", "prior-vit-tiny"):
        config = open_clip.get_model_config(name)
        assert architecture_name({**tower, **config}) == name
