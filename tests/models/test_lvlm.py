"""The models against transformers' own forward on the same weights, and what they must be able to do."""

import logging

import open_clip
import pytest
import torch
from common.models import FAMILIES, FRONT_ENDS, patch_inputs, small_lm, small_lvlm
from common.vlms import make_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from composer_prior import ComposerLVLM, registry
from composer_prior.data.batch import IGNORE_INDEX, IMAGE, ROW_SEPARATOR
from composer_prior.data.captions import decode_image
from composer_prior.emoji_scenes.scenes import draw_scene, sample_rng, sample_scene
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.models import build
from composer_prior.models.build import build_lvlm, lvlm_skeleton, make_lvlm
from composer_prior.models.prior_lvlm import PriorLVLMImageProcessor
from composer_prior.models.prior_lvlm.image_processing_prior_lvlm import patch_grid
from composer_prior.models.vision import build_open_clip, build_patches, image_inputs, image_processor_of


def full_nll(logits, labels):
    """Per-token negative log-likelihood from full logits in float64, one position at a time."""
    nll = torch.zeros(labels.shape, dtype=torch.float64)
    for row, position in (labels != IGNORE_INDEX).nonzero().tolist():
        nll[row, position] = -logits[row, position - 1].double().log_softmax(-1)[labels[row, position]]
    return nll


def hugging_face_clip(encoder, depth):
    """transformers' CLIP vision model with the weights of an OpenCLIP ViT, whose blocks after the used one are new."""
    width, patch = encoder.conv1.out_channels, encoder.conv1.kernel_size[0]
    attention = encoder.transformer.resblocks[0].attn
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=encoder.transformer.resblocks[0].mlp.c_fc.out_features,
        num_hidden_layers=depth,
        num_attention_heads=attention.num_heads,
        image_size=encoder.image_size[0],
        patch_size=patch,
        hidden_act="gelu",
    )
    model = CLIPVisionModel(config)
    ours, theirs = encoder.state_dict(), {}
    theirs["embeddings.class_embedding"] = ours["class_embedding"]
    theirs["embeddings.patch_embedding.weight"] = ours["conv1.weight"]
    theirs["embeddings.position_embedding.weight"] = ours["positional_embedding"]
    for kind in ("weight", "bias"):
        theirs[f"pre_layrnorm.{kind}"] = ours[f"ln_pre.{kind}"]
        for i in range(len(encoder.transformer.resblocks)):
            a, b = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            parts = ours[f"{a}.attn.in_proj_{kind}"].chunk(3)
            theirs |= {f"{b}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            theirs[f"{b}.self_attn.out_proj.{kind}"] = ours[f"{a}.attn.out_proj.{kind}"]
            theirs[f"{b}.layer_norm1.{kind}"] = ours[f"{a}.ln_1.{kind}"]
            theirs[f"{b}.layer_norm2.{kind}"] = ours[f"{a}.ln_2.{kind}"]
            theirs[f"{b}.mlp.fc1.{kind}"] = ours[f"{a}.mlp.c_fc.{kind}"]
            theirs[f"{b}.mlp.fc2.{kind}"] = ours[f"{a}.mlp.c_proj.{kind}"]
    inner = getattr(model, "vision_model", model)  # transformers 5 has it without this layer
    missing, unexpected = inner.load_state_dict(theirs, strict=False)
    assert not unexpected
    unused = [f"encoder.layers.{i}" for i in range(len(encoder.transformer.resblocks), depth)]
    assert all(name.startswith(("post_layernorm", "embeddings.position_ids", *unused)) for name in missing)
    return model


def test_encoder_family_is_llava(tokenizer, make_batch):
    """Per-token NLL equals that of transformers' LlavaForConditionalGeneration with the same weights."""
    model = small_lvlm("encoder", tokenizer).eval()
    lvlm = model.model
    batch = make_batch(model)
    clip = hugging_face_clip(lvlm.model.vision_tower.encoder, depth=4)
    config = LlavaConfig(
        vision_config=clip.config,
        text_config=lvlm.causal_lm.config,
        image_token_index=lvlm.config.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(clip.state_dict())
    llava.model.language_model.load_state_dict(lvlm.model.language_model.state_dict())
    llava.lm_head.load_state_dict(lvlm.lm_head.state_dict())
    llava.model.multi_modal_projector.linear_1.load_state_dict(lvlm.model.multi_modal_projector[0].state_dict())
    llava.model.multi_modal_projector.linear_2.load_state_dict(lvlm.model.multi_modal_projector[2].state_dict())
    with torch.no_grad():
        ours = model(batch)
        theirs = llava(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
        ).logits
    expected = full_nll(theirs, batch["labels"])
    assert (expected > 0).sum() == (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(ours["nll"].double(), expected, rtol=1e-5, atol=1e-5)
    predicted = theirs.argmax(-1).roll(1, 1)
    assert torch.equal(ours["correct"], (predicted == batch["labels"]) & (batch["labels"] != IGNORE_INDEX))


def test_patch_family_is_llama_on_patches_and_separators(tokenizer, make_batch):
    """Per-token NLL equals that of transformers' Llama fed with embeddings put together position by position."""
    model = small_lvlm("patches", tokenizer).eval()
    lvlm, batch = model.model, make_batch(model)
    embed, project = lvlm.get_input_embeddings(), lvlm.model.vision_tower.proj
    rows = []
    with torch.no_grad():
        for ids, patches in zip(batch["input_ids"], batch["pixel_patches"], strict=True):
            unread = iter(patches)
            rows.append(
                torch.stack([project(next(unread)) if i == lvlm.config.image_token_id else embed(i) for i in ids])
            )
        logits = lvlm.causal_lm(inputs_embeds=torch.stack(rows), attention_mask=batch["attention_mask"]).logits
        ours = model(batch)["nll"]
    torch.testing.assert_close(ours.double(), full_nll(logits, batch["labels"]), rtol=1e-5, atol=1e-5)
    assert (batch["input_ids"] == lvlm.config.row_token_id).any()


def test_what_is_learned_is_what_is_not_frozen(tokenizer):
    tower = build_open_clip("prior-vit-tiny", freeze=True)
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.train().training
    features = tower(torch.rand(2, 3, 96, 96))
    assert features.shape == (128, 128)
    assert not features.requires_grad
    assert not any(p.requires_grad for p in build_patches(32, 16, 64, freeze=True).parameters())


@pytest.mark.parametrize("architecture", ["ViT-S-32", "ViT-B-16-SigLIP"])
def test_any_open_clip_tower(architecture):
    """A plain ViT and a timm tower; features of the chosen block, class token dropped, later blocks removed."""
    tower = build_open_clip(architecture, image_size=64, layer=1).eval()
    image = Image.new("RGB", (100, 60), "red")
    inputs = image_inputs(image_processor_of(tower), image)
    with torch.no_grad():
        features = tower(inputs.tensors["pixel_values"][None])
    side = 64 // (32 if architecture == "ViT-S-32" else 16)
    assert inputs.layout == [IMAGE] * side**2
    assert features.shape == (side**2, tower.config["width"])
    blocks = tower.encoder.transformer.resblocks if architecture == "ViT-S-32" else tower.encoder.trunk.blocks
    assert len(blocks) == 2
    hooked = []
    blocks[-1].register_forward_hook(lambda *arguments: hooked.append(arguments[-1]))
    tower(inputs.tensors["pixel_values"][None])
    torch.testing.assert_close(hooked[0][0][-(side**2) :], features)


def test_no_parameter_of_the_tower_is_unused(tokenizer, make_batch):
    for family in (*FAMILIES, *FRONT_ENDS):
        model = small_lvlm(family, tokenizer)
        batch = make_batch(model)
        model.loss(model(batch), batch).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert without == []


def test_a_pretrained_tower_is_loaded_from_a_file(tmp_path):
    import open_clip

    clip = open_clip.create_model("prior-vit-tiny")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tower = build_open_clip("prior-vit-tiny", pretrained=str(tmp_path / "clip.pt"))
    assert torch.equal(tower.encoder.conv1.weight, clip.visual.conv1.weight)


def test_the_shipped_tower_tells_the_drawings_apart():
    """The patch in the middle of a drawing resembles that of the same drawing in other scenes, at any place."""
    tower = build_open_clip("prior-vit-tiny", pretrained="emoji_scenes", layer=-1, freeze=True)
    side = round(tower.config["image_tokens"] ** 0.5)
    features, names, process = {}, {}, image_processor_of(tower).process
    for split, count in {"train": 600, "validation": 100}.items():
        scenes = [sample_scene(split, sample_rng(split, index, 17)) for index in range(count)]
        pixels = torch.stack([process(draw_scene(scene))[0]["pixel_values"] for scene in scenes])
        grid = nn.functional.layer_norm(tower(pixels), [tower.config["width"]]).view(count, side, side, -1)
        drawings = [(i, item) for i, scene in enumerate(scenes) for item in scene.objects]
        middles = [
            grid[i, (2 * item.y + item.side) * side // 192, (2 * item.x + item.side) * side // 192]
            for i, item in drawings
        ]
        features[split], names[split] = torch.stack(middles), [item.name for _, item in drawings]
    nearest = (features["validation"] @ features["train"].T).argmax(-1).tolist()
    right = [names["train"][i] == name for i, name in zip(nearest, names["validation"], strict=True)]
    assert sum(right) / len(right) > 0.7  # of 115 drawings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "ViT-B-23"}, "Did you mean 'ViT-B-32'"),
        ({"architecture": "ViT-B-32", "pretrained": "nowhere.pt"}, "neither a file nor a tag of ViT-B-32"),
        ({"architecture": "prior-vit-tiny", "pretrained": "emoji"}, r"a tag of prior-vit-tiny \(emoji_scenes\)"),
        ({"architecture": "prior-vit-tiny", "image_size": 100}, "not a multiple of prior-vit-tiny's patch size 12"),
        ({"architecture": "prior-vit-tiny", "layer": 4}, "has 4 layers"),
        ({"architecture": "prior-vit-tiny", "layer": -5, "pretrained": "emoji_scenes"}, "has 4 layers"),
    ],
)
def test_an_impossible_tower_is_refused_before_any_is_built(arguments, message, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("it is built"))
    for refuse in (build_open_clip, build_open_clip.check):
        with pytest.raises(ValueError, match=message):
            refuse(**arguments)


def test_a_skeleton_is_silent_and_the_level_of_the_host_stays(tokenizer, monkeypatch):
    levels = []

    def build_language_model(*_, **__):
        levels.append(logging.root.manager.disable)
        return small_lm(tokenizer)

    monkeypatch.setattr(build, "build_language_model", build_language_model)
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    lvlm_skeleton(tokenizer, {})
    build_open_clip("prior-vit-tiny")
    assert (levels, logging.root.manager.disable) == ([logging.WARNING], logging.INFO)


def test_a_cap_that_the_patch_size_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="max_side=100 is not a multiple of patch_size=16"):
        build_patches(8, patch_size=16, max_side=100)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((64, 64), (4, 4)),
        ((64, 32), (4, 2)),
        ((30, 500), (1, 8)),
        ((128, 100), (8, 6)),
        ((5, 3), (1, 1)),
        ((4000, 10), (8, 1)),
    ],
)
def test_patches_keep_the_aspect_ratio(size, grid):
    height, width = size
    assert patch_grid(height, width, 16, 128) == grid
    inputs = patch_inputs(Image.new("RGB", (width, height)), 16, 128)
    rows, columns = grid
    assert inputs.layout == ([IMAGE] * columns + [ROW_SEPARATOR]) * rows
    assert inputs.tensors["pixel_patches"].shape == (rows * columns, 3 * 16 * 16)


def test_patches_are_in_raster_order():
    image = Image.new("RGB", (8, 8))
    for y in range(8):
        for x in range(8):
            image.putpixel((x, y), (x * 20, y * 20, 255))
    patches = patch_inputs(image, 4, 8).tensors["pixel_patches"].reshape(4, 3, 4, 4)
    for index, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        for y in range(4):
            for x in range(4):
                expected = torch.tensor([(left + x) * 20, (top + y) * 20, 255]) / 127.5 - 1
                torch.testing.assert_close(patches[index, :, y, x], expected)


def test_embeddings_grow_for_the_image_tokens():
    """A tokenizer and a language model without image tokens, as the pretrained ones on hubs are."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from composer_prior.data.tokenizer import add_image_tokens, image_token_ids

    plain = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    config = small_lm(tokenizer_of_size(3)).config.to_dict() | {"vocab_size": 3}
    with pytest.raises(ValueError, match=r"lacks <image> and <row>: call .*add_image_tokens"):
        build_lvlm(tokenizer, language={"config": config}, vision={"name": "patches", "patch_size": 8, "max_side": 32})
    add_image_tokens(tokenizer)
    model = build_lvlm(
        tokenizer, language={"config": config}, vision={"name": "patches", "patch_size": 8, "max_side": 32}
    )
    assert image_token_ids(model.tokenizer) == (3, 4)
    assert model.model.causal_lm.get_input_embeddings().weight.shape[0] == 64
    assert model.model.causal_lm.get_output_embeddings().weight.shape[0] == 64


def tokenizer_of_size(size):
    class Sized:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return size

    return Sized()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_images_are_learned_by_heart(tokenizer, family):
    """After overfitting, generation with the KV cache brings the captions of all eight images back verbatim."""
    from composer_prior.data.batch import CaptionCollator
    from composer_prior.data.tokenizer import bos_id, image_token_ids

    model = small_lvlm(family, tokenizer, hidden_size=64, initializer_range=0.02)
    samples = [make_sample("train", i, canvas=48) for i in range(8)]
    images = [decode_image(sample["image"]) for sample in samples]
    # Different shapes, so that the patch family's images differ in length.
    images = [image.crop((0, 0, 48, 48 if i % 2 else 32)) for i, image in enumerate(images)]
    prompt = "Caption: "
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    items = []
    for index, (image, sample) in enumerate(zip(images, samples, strict=True)):
        inputs = model.image_processor(image)
        caption = [*tokenizer(sample["caption"])["input_ids"], tokenizer.eos_token_id]
        prefix = [bos_id(tokenizer), *(image_token_ids(tokenizer)[kind] for kind in inputs.layout), *prompt_ids]
        labels = [IGNORE_INDEX] * len(prefix) + caption
        ids = torch.tensor(prefix + caption)
        items.append({"input_ids": ids, "labels": torch.tensor(labels), "sample_id": index, **inputs.tensors})
    batch = CaptionCollator(tokenizer.pad_token_id)(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = model.loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 5e-3:
            break
    captions = model.image_text_model.generate_captions(images, prompt, max_new_tokens=120)
    assert captions == [sample["caption"] for sample in samples]
    assert len(set(captions)) == 8


def test_text_alone_cannot_be_asked_for_captions(tokenizer):
    with pytest.raises(ValueError, match="reads text alone"):
        ComposerLVLM(small_lm(tokenizer), tokenizer).image_text_model.generate_captions([Image.new("RGB", (4, 4))])


class Quarters(PriorLVLMImageProcessor):
    max_image_tokens = 4

    def process(self, image):
        return {"pixel_values": pil_to_tensor(image.resize((8, 8))) / 255}, [False] * 4


class MeanColours(nn.Module):
    """A tower from outside of the package: the mean colour of each quarter of an image."""

    def __init__(self, width):
        super().__init__()
        self.config = {"type": "mean_colours", "width": width}
        self.image_processor = Quarters(self.config)
        self.linear = nn.Linear(3, width)

    def forward(self, pixel_values):
        colours = nn.functional.adaptive_avg_pool2d(pixel_values, 2).flatten(2).transpose(1, 2)
        return self.linear(colours).flatten(0, 1)


def test_a_tower_from_outside_trains_and_captions_and_has_no_folder(tokenizer, make_batch, monkeypatch, tmp_path):
    monkeypatch.setitem(registry._COMPONENTS, "vision", {"mean_colours": MeanColours})
    language = {"config": {**small_lm(tokenizer).config.to_dict(), "model_type": "llama"}}
    model = build_lvlm(tokenizer, language, vision={"name": "mean_colours"})
    assert lvlm_skeleton(tokenizer, language, vision={"name": "mean_colours"}).model.device.type == "meta"
    batch = make_batch(model)
    assert (batch["input_ids"] == model.model.config.image_token_id).sum() == 4 * len(batch["input_ids"])
    model.loss(model(batch), batch).backward()
    assert model.model.model.vision_tower.linear.weight.grad.abs().sum() > 0
    assert len(model.image_text_model.generate_captions([Image.new("RGB", (5, 5))] * 2, max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match="with the tower MeanColours cannot be saved in Hugging Face format"):
        model.image_text_model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_without_their_images_are_refused(tokenizer, make_batch, family):
    model = small_lvlm(family, tokenizer)
    batch = {key: value for key, value in make_batch(model).items() if not key.startswith(("pixel", "patch"))}
    with pytest.raises(ValueError, match=r"The images have 0 features and input_ids [0-9]+ image tokens"):
        model(batch)


def test_a_model_whose_logits_are_not_its_heads_is_refused():
    """Its class leaves the scale out that its language model's configuration names."""
    text = {
        "model_type": "granite",
        "logits_scaling": 3.0,
        "hidden_size": 32,
        "intermediate_size": 32,
        "vocab_size": 72,
    }
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(text_config={**text, **layers}, vision_config=vision, image_token_index=71)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration changes its logits after the LM head"):
        ComposerLVLM(LlavaForConditionalGeneration(config), make_processor("llava"))


def test_a_model_without_a_decoder_under_its_head_is_refused(tokenizer):
    parts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, qformer = (
        {**parts, "image_size": 16, "patch_size": 8},
        {**parts, "vocab_size": 8, "encoder_hidden_size": 16},
    )
    text = {"model_type": "opt", **parts, "ffn_dim": 16, "word_embed_proj_dim": 16, "vocab_size": 64}
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=2)
    with pytest.raises(ValueError, match="Blip2ForConditionalGeneration cannot be used as a language model"):
        ComposerLVLM(Blip2ForConditionalGeneration(config), make_processor("llava"))


def test_adapters_go_around_the_whole_model(tokenizer):
    lm = get_peft_model(small_lm(tokenizer), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="make the LVLM without them, then give it to get_peft_model"):
        make_lvlm(lm, build_patches(32, 16, 48), None, tokenizer)
