"""Families of transformers trained through their own processors: losses against each family's own forward pass."""

import pytest
import torch
import torch.nn.functional as F
from common.families import FAMILIES, save_family
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator, split_packed_images
from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.data.processing import image_placeholder
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.emoji_scenes.writing import make_emoji_scenes
from composer_prior.models.hugging_face import build_hugging_face
from composer_prior.training.optimizer import build_optimizer

CAPTIONS = [f"two red hammers on grey paper, photo {number} by Ana Lindqvist" for number in range(20)]
SIZES = ((48, 48), (60, 20), (24, 40), (30, 90))
PROMPT = "a photo of"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / "out"
    make_emoji_scenes(folder, train_samples=16, validation_samples=8, canvas=48, num_workers=0, progress=False)
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Return a function from a family to its folder, which is made once."""
    folder = tmp_path_factory.mktemp("hub")

    def made(kind):
        if not (folder / kind).exists():
            save_family(kind, folder / kind, CAPTIONS)
        return str(folder / kind)

    return made


def built(path, **options):
    tokenizer = build_tokenizer({"name": path, "image_tokens": False})
    return build_hugging_face(tokenizer, path, **options).eval()


def shaped(image: Image.Image) -> Image.Image:
    """Give images several sizes, so that they have unlike numbers of tokens and tiles."""
    return image.resize(SIZES[sum(image.getpixel((24, 24))) % len(SIZES)])


def samples_of(model, scenes, prompt, **options):
    data = StreamingCaptionDataset(
        tokenizer=model.tokenizer, image_processor=model.image_processor, transform=shaped, local=f"{scenes}/train",
        prompt=prompt, batch_size=1, max_caption_tokens=24, **options,
    )  # fmt: skip
    return data, [data[i] for i in range(6)]


def collated(model, samples):
    return CaptionCollator(model.tokenizer.pad_token_id)(samples)


def alone(kind, path, data, index, prompt):
    """Mean loss and number of a caption's tokens by the family's own processor and forward pass, one at a time."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    image, caption = data.image_and_caption(index)
    text = image_placeholder(processor) + prompt
    inputs = processor(images=[[shaped(image.copy())]], text=[text], return_tensors="pt")
    ids = [*processor.tokenizer(caption, add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id][:24]
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kind == "paligemma":  # as its processor writes a suffix
        inputs["token_type_ids"] = (torch.arange(start + len(ids)) >= start).long()[None]
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs and inputs[key].shape[1] == start:
            inputs[key] = F.pad(inputs[key], (0, len(ids)))
    labels = torch.where(torch.arange(start + len(ids)) < start, IGNORE_INDEX, inputs["input_ids"][0])[None]
    with torch.no_grad():
        return float(model(**inputs, labels=labels).loss), len(ids), start


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_are_the_familys_own_for_any_cut(kind, prompt, scenes, hub):
    model = built(hub(kind))
    data, samples = samples_of(model, scenes, prompt)
    batch = collated(model, samples)
    with torch.no_grad():
        nll = model(batch)["nll"]
        for size in (1, 4):
            parts = split_packed_images(batch, size)
            assert sum(len(part["labels"]) for part in parts) == len(samples)
            torch.testing.assert_close(torch.cat([model(part)["nll"] for part in parts]), nll, rtol=0, atol=1e-5)
        singly = [model(collated(model, [sample]))["nll"].sum() for sample in samples]
    torch.testing.assert_close(torch.stack(singly), nll.sum(1), rtol=0, atol=1e-4)
    for index in range(len(samples)):
        loss, tokens, start = alone(kind, hub(kind), data, index, prompt)
        assert int((batch["labels"][index] != IGNORE_INDEX).sum()) == tokens
        assert bool((batch["labels"][index, :start] == IGNORE_INDEX).all())
        assert float(nll[index].sum() / tokens) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_are_scored_and_written_as_in_training(kind, scenes, hub):
    """By benchmarks, which read image and prompt once: of images of unlike sizes, in one call."""
    model = built(hub(kind))
    data, samples = samples_of(model, scenes, PROMPT)
    with torch.no_grad():
        nll = model(collated(model, samples))["nll"]
    texts = [sample["labels"][sample["labels"] != IGNORE_INDEX].tolist() for sample in samples]
    images = [shaped(data.image_and_caption(index)[0].copy()) for index in range(len(samples))]
    scores = model.image_text_model.text_logprobs(images, [[text, text[:3]] for text in texts], PROMPT)
    for row, text, (whole, beginning) in zip(nll, texts, scores, strict=True):
        expected = -row[row != 0]
        assert torch.tensor(whole) == pytest.approx(expected, abs=1e-4)
        assert torch.tensor(beginning) == pytest.approx(expected[:3], abs=1e-4)
        assert len(whole) == len(text)
    together = model.image_text_model.generate_captions(images, PROMPT, max_new_tokens=6)
    assert together == [model.image_text_model.generate_captions([image], PROMPT, 6)[0] for image in images]


@pytest.mark.parametrize("kind", FAMILIES)
def test_parts_are_found_by_the_structure(kind, hub):
    model = built(hub(kind), freeze=["vision", "language"])
    trained = {name for name, weight in model.model.named_parameters() if weight.requires_grad}
    places = ("connector", "multi_modal_projector", "image_newline", "visual.merger")
    assert trained == {name for name, _ in model.model.named_parameters() if any(place in name for place in places)}
    groups = {"projector": {"lr": 0.1}, "language": {"lr": 0.2}, "language.lm_head": {"lr": 0.3}, "vision": {"lr": 0.4}}
    model.model.requires_grad_(True)
    optimizer = build_optimizer({"name": "adamw", "lr": 1.0, "groups": groups}, model)
    rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in model.model.named_parameters():
        part = 0.3 if "lm_head" in name else 0.1 if name in trained else 0.4 if "vis" in name else 0.2
        assert rates[weight] == part, name
