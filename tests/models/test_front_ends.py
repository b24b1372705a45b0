"""Front ends with fewer image tokens or more pixels, each against a loop or the model that it is made of."""

import pytest
import torch
from common.models import FRONT_ENDS, small_lm, small_lvlm
from PIL import Image
from torch import nn
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from composer_prior.data.batch import IMAGE
from composer_prior.models.build import build_lvlm, make_lvlm
from composer_prior.models.prior_lvlm import PriorLVLMImageProcessor
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import build_projector
from composer_prior.models.vision import build_open_clip, build_patches, image_inputs


def spread(height, width):
    """A picture whose pixels are all different."""
    values = torch.arange(height * width).reshape(height, width)
    return Image.merge("RGB", [Image.fromarray((values // 256**i % 256).byte().numpy()) for i in range(3)])


def of_samples(model, batch):
    """What a model says of each sample of a batch alone, without its padding."""
    rows = []
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        if "patch_mask" in batch:
            real = batch["patch_mask"][i].sum()
            alone |= {key: alone[key][:, :real] for key in ("pixel_patches", "patch_mask")}
        alone |= {k: v[:, : mask.sum()] for k, v in alone.items() if v.shape[1:] == mask.shape}
        rows.append(model(alone)["nll"][0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@torch.no_grad()
def test_a_batch_says_of_each_sample_what_the_sample_alone_says(front_end, tokenizer, make_batch):
    model = small_lvlm(front_end, tokenizer).eval()
    batch = make_batch(model)
    assert (batch["input_ids"] == model.processor.image_token_id).any(1).all()
    torch.testing.assert_close(model(batch)["nll"], of_samples(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pixel_shuffle", "mean_pool"])
def test_a_factor_of_1_is_the_mlp(name, tokenizer, make_batch):
    found = []
    for projector in ({"name": name, "factor": 1}, {"name": "mlp"}):
        torch.manual_seed(3)
        language = {"config": small_lm(tokenizer).config.to_dict()}
        tower = {"name": "open_clip", "architecture": "prior-vit-tiny", "image_size": 48}
        model = build_lvlm(tokenizer, language, tower, projector).eval()
        batch = make_batch(model)
        model.loss(model(batch), batch).backward()
        found.append({**dict(model.model.named_parameters()), "nll": model(batch)["nll"]})
        found[-1] |= {f"{name}.grad": weight.grad for name, weight in model.model.named_parameters()}
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*(one.values() for one in found), strict=True))


def test_pixel_shuffle_is_that_of_idefics3():
    config = Idefics3Config(scale_factor=2)
    features = torch.randn(3, 36, 5)  # of a grid of 6 x 6
    expected = Idefics3Connector(config).pixel_shuffle(features, 2)
    projector = build_projector("pixel_shuffle", 5, 8, 2)
    seen = []
    projector[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower = build_open_clip("prior-vit-tiny", image_size=72)
    tower.config["merge"] = 2
    tower.encoder.forward_intermediates = lambda *_, **__: {"image_intermediates": [features]}
    projector(tower(torch.zeros(3, 3, 72, 72)))
    assert torch.equal(seen[0], expected.flatten(0, 1))


@torch.no_grad()
def test_mean_pool_is_the_mean_of_each_square(tokenizer):
    model = small_lvlm("mean_pool", tokenizer).model.eval()
    pixels = torch.randn(2, 3, 48, 48)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    tower.config["merge"] = 1
    grid = tower(pixels).view(2, 4, 4, -1)
    squares = [grid[b, y : y + 2, x : x + 2].flatten(0, 1).mean(0) for b in range(2) for y in (0, 2) for x in (0, 2)]
    expected = projector[2](projector[1](projector[0](torch.stack(squares))))
    tower.config["merge"] = 2
    torch.testing.assert_close(model.model.get_image_features(pixel_values=pixels), expected)


@pytest.mark.parametrize("size", [(48, 48), (48, 20), (17, 90), (1, 1)])
def test_patches_that_are_merged_stand_together(size):
    """The grid is one of blocks, and block after block is what one larger patch shows."""
    picture = spread(*size)
    vision = {"type": "patches", "patch_size": 8, "max_side": 48}
    small = image_inputs(PriorLVLMImageProcessor({**vision, "merge": 2}), picture)
    large = image_inputs(PriorLVLMImageProcessor({**vision, "patch_size": 16}), picture)
    assert small.layout == large.layout
    assert large.layout.count(IMAGE) == len(large.tensors["pixel_patches"])
    for block, whole in zip(
        small.tensors["pixel_patches"].view(-1, 4, 3, 8, 8),
        large.tensors["pixel_patches"].view(-1, 3, 16, 16),
        strict=True,
    ):
        corners = [whole[:, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
        assert torch.equal(block, torch.stack(corners))
    longest = PriorLVLMImageProcessor({**vision, "merge": 2}).max_image_tokens
    assert len(small.layout) <= longest == 3 * 4


class Other(nn.Module):
    """A tower from outside, which does not say how its features lie."""

    def __init__(self):
        super().__init__()
        self.config = {"type": "other", "width": 32, "image_tokens": 4}


@pytest.mark.parametrize(
    ("tower", "factor", "message"),
    [
        (lambda: build_open_clip("prior-vit-tiny", image_size=36), 2, "factor=2 does not divide .* grid of 3 x 3"),
        (lambda: build_patches(32, 16, 48), 2, "factor=2 does not divide the tower's grid of 3 x 3"),
        (Other, 2, "factor=2: Other has no grid that is known"),
    ],
)
def test_a_grid_that_the_factor_does_not_divide_is_refused(tower, factor, message, tokenizer):
    with pytest.raises(ValueError, match=message) as error:
        make_lvlm(small_lm(tokenizer), tower(), "pixel_shuffle", tokenizer, factor=factor)
    assert "\n" not in str(error.value)
