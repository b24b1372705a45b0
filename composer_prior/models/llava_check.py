"""Holds a model in LLaVA format against the model itself: pixels, ids, logits and captions of a few pictures."""

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from composer_prior.data.messages import OneLineError, one_line
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.language import evaluating, parts_of
from composer_prior.models.prior_lvlm import PriorLVLMForConditionalGeneration
from composer_prior.models.prior_lvlm.processing_prior_lvlm import IMAGE_TOKEN

TOLERANCE = 1e-4  # of logits up to 10; larger ones have fewer decimals in float32
PIXEL_TOLERANCE = 1e-5  # a level of 255 is a thousand times that: below are roundings of float32
PICTURES, CAPTION_TOKENS = 3, 16
# The warnings of the report.
BY_DEFAULT = (
    "AutoProcessor.from_pretrained(folder) of transformers 5 fits pictures with torchvision, not with Pillow: pixels "
    'differ by up to {:.1e}; from_pretrained(folder, backend="pil") has no such difference.'
)
FLAT = (
    "pictures that are {} pixels high: transformers takes their rows for channels, and fails or makes other pixels; "
    'the processor reads them right with input_data_format="channels_last". The model folder of the run has no such '
    "difference."
)
SHIFTED = (
    "resize_mode=shortest: of a picture whose longer side, once the shorter has {} pixels, is longer by 3, 7, 11 and "
    "so on, one size in four, transformers cuts out what lies one pixel further to the left or top; on {} such "
    "pictures {} captions are the same and logits differ by up to {:.1e}. The model folder of the run has no such "
    "difference."
)


class LlavaError(OneLineError, ValueError):
    """A model that has no LLaVA equivalent, or whose LLaVA format is not the same model."""


def refusal(what: str, why: str) -> LlavaError:
    """Return the error for a part that LLaVA does not support, with an alternative."""
    return LlavaError(
        f"{what} has no LLaVA equivalent: {why.rstrip('.')}; use the model folder of the run, which transformers "
        "reads with trust_remote_code=True."
    )


def failure(language: Any, error: Exception) -> LlavaError:
    """Return the error for a language model that fails inside of LLaVA."""
    return LlavaError(
        f"LLaVA with the language model {type(language).__name__} fails ({one_line(error, 200)}); nothing is written. "
        "The model folder of the run is another way, which transformers reads with trust_remote_code=True."
    )


@torch.no_grad()
def compare(
    model: ImageTextModel, llava: Any, processor: LlavaProcessor, default: LlavaProcessor
) -> tuple[float, float, list[str]]:
    """Compare a LLaVA in float32, as transformers loads it, with the model on pictures of odd sizes.

    ``processor`` is that on Pillow, and ``default`` the one that transformers loads when it is not asked for Pillow.

    Returns:
        the largest differences of a logit and of a normalized pixel, and of which pictures pixels differ all the same.

    Raises:
        LlavaError: one line, naming what differs.
    """
    if {parameter.dtype for parameter in model.model.parameters()} != {torch.float32}:
        model = _in_float32(model)
    try:
        with evaluating(model.model):
            return _compare(model, llava.to(model.model.device), processor, default)
    except LlavaError:
        raise
    except Exception as error:  # whatever a language model says to what LLaVA gives it
        raise failure(parts_of(model.model)["language"], error) from error


def _in_float32(model: ImageTextModel) -> ImageTextModel:
    """Return a copy in float32; what the model computes without weights is computed in float32 anew."""
    config = copy.deepcopy(model.model.config)
    config.dtype = config.text_config.dtype = torch.float32
    tower = copy.deepcopy(model.model.model.vision_tower)
    copied: Any = PriorLVLMForConditionalGeneration(config, vision_tower=tower.float())
    copied.load_state_dict({name: tensor.float() for name, tensor in model.model.state_dict().items()})
    return ImageTextModel(copied.to(model.model.device), model.processor)


def _compare(
    model: ImageTextModel, llava: Any, processor: LlavaProcessor, default: LlavaProcessor
) -> tuple[float, float, list[str]]:
    tower: Any = model.model.model.vision_tower
    pictures, shifted = _pictures(tower.image_size, tower.config["preprocess"]["resize_mode"] == "shortest")
    inputs, ours = _inputs(model, processor, pictures)
    if sorted(inputs) != ["attention_mask", "input_ids", "pixel_values"]:
        raise LlavaError(f"The processor makes {', '.join(inputs)}, which is not what LLaVA reads; nothing is written.")
    pixels = _difference(inputs["pixel_values"], ours["pixel_values"])
    if not pixels <= PIXEL_TOLERANCE:
        raise LlavaError(f"The image processor's pixels differ by up to {pixels:.1e}; nothing is written.")
    expected, theirs = _captions(model, llava, processor, pictures, inputs)
    logits, bound = _logit_difference(model, llava, inputs, ours)
    if not logits <= bound:  # nor if they are not numbers
        raise LlavaError(f"Logits differ by up to {logits:.1e}, more than {bound:.1e}; nothing is written.")
    if expected != theirs:
        raise LlavaError(f"LLaVA captions {theirs}, and the model {expected}; nothing is written.")
    warnings = []
    by_default = _difference(_inputs(model, default, pictures)[0]["pixel_values"], ours["pixel_values"])
    if not by_default <= PIXEL_TOLERANCE:
        warnings.append(BY_DEFAULT.format(by_default))
    flat = [height for height in (1, 2, 3) if _reads_otherwise(model, processor, pictures[0].resize((32, height)))]
    if flat:
        warnings.append(FLAT.format(" or ".join(map(str, flat))))
    if shifted:
        inputs, ours = _inputs(model, processor, shifted)
        pairs = zip(*_captions(model, llava, processor, shifted, inputs), strict=True)
        same, differing = sum(a == b for a, b in pairs), _logit_difference(model, llava, inputs, ours)[0]
        warnings.append(SHIFTED.format(tower.image_size, len(shifted), same, differing))
    return logits, pixels, warnings


def _reads_otherwise(model: ImageTextModel, processor: LlavaProcessor, picture: Image.Image) -> bool:
    """Return True if the stock processor fails on a picture, or its pixels differ from ours."""
    try:
        inputs, ours = _inputs(model, processor, [picture])
    except ValueError:
        return True
    return not _difference(inputs["pixel_values"], ours["pixel_values"]) <= PIXEL_TOLERANCE


def _inputs(model: ImageTextModel, processor: LlavaProcessor, pictures: list[Image.Image]) -> tuple[Any, Any]:
    """Return the outputs of the stock processor and of ours for images with the prompt of training; ids are equal."""
    text = [IMAGE_TOKEN + model.prompt] * len(pictures)
    device = model.model.device
    inputs = processor(images=pictures, text=text, return_tensors="pt").to(device)
    ours = model.processor(images=pictures, return_tensors="pt").to(device)
    if not torch.equal(inputs["input_ids"], ours["input_ids"]):
        theirs, expected = (ids["input_ids"][0].tolist() for ids in (inputs, ours))
        raise LlavaError(
            f"The tokenizer reads the prompt as {theirs[:2]} ... {theirs[-6:]} ({len(theirs)} tokens), not as "
            f"{expected[:2]} ... {expected[-6:]} ({len(expected)} tokens); nothing is written."
        )
    return inputs, ours


def _captions(
    model: ImageTextModel, llava: Any, processor: LlavaProcessor, pictures: list[Image.Image], inputs: Any
) -> tuple[list[str], list[str]]:
    """Return the captions of the model and of LLaVA."""
    ids = llava.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False)
    theirs = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return model.generate_captions(pictures, max_new_tokens=CAPTION_TOKENS), theirs


def _logit_difference(model: ImageTextModel, llava: Any, inputs: Any, ours: Any) -> tuple[float, float]:
    """Return the largest difference of a logit on the prompt and on text after it, and its tolerance."""
    count = inputs["input_ids"].shape[0]
    following = torch.arange(CAPTION_TOKENS, device=inputs["input_ids"].device) * 7 % len(model.tokenizer)
    following = following[following != model.processor.image_token_id].expand(count, -1)

    def longer(batch: Any) -> dict[str, Tensor]:
        mask = torch.cat([batch["attention_mask"], torch.ones_like(following)], 1)
        return {**batch, "input_ids": torch.cat([batch["input_ids"], following], 1), "attention_mask": mask}

    batch = longer(ours)
    expected = model.model(**batch, use_cache=False).logits
    difference = _difference(llava(**longer(inputs), use_cache=False).logits, expected)
    return difference, TOLERANCE * max(1.0, float(expected.abs().max()) / 10)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def _pictures(image_size: int, shortest: bool) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of odd sizes, always the same, and where the shorter side is fitted, those that are cut otherwise."""
    generator = np.random.default_rng(17)
    same: list[Image.Image] = []
    shifted: list[Image.Image] = []
    while len(same) < PICTURES or (shortest and len(shifted) < PICTURES):
        width, height = (int(side) for side in generator.integers(32, 400, 2))
        pixels = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        kind = shifted if shortest and cut_differs(width, height, image_size) else same
        if len(kind) < PICTURES:
            kind.append(pixels.resize((width, height), Image.Resampling.BICUBIC))
    return same, shifted


def cut_differs(width: int, height: int, image_size: int) -> bool:
    """Return True if torchvision and transformers crop a picture differently after its shorter side is resized.

    torchvision rounds half of an odd rest to even, and transformers rounds it down.
    """
    long, short = max(width, height), min(width, height)
    return (int(image_size * long / short) - image_size) % 4 == 3
