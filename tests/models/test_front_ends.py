"""Front ends with fewer image tokens or more pixels, each against a loop or the model that it is made of."""

import numpy as np
import pytest
import timm
import torch
from common.models import FRONT_ENDS, small_lm, small_lvlm, small_naflex
from PIL import Image
from timm.data.naflex_transforms import ResizeToSequence
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from composer_prior import ComposerLVLM
from composer_prior.data.batch import IGNORE_INDEX, IMAGE, CaptionCollator
from composer_prior.data.captions import decode_image
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.models import vision
from composer_prior.models.build import build_lvlm, make_lvlm
from composer_prior.models.prior_lvlm import PriorLVLMImageProcessor
from composer_prior.models.prior_lvlm.image_processing_prior_lvlm import tile_grid
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import build_projector
from composer_prior.models.vision import build_naflex, build_open_clip, build_patches, image_inputs, image_processor_of


def spread(height, width):
    """A picture whose pixels are all different."""
    values = torch.arange(height * width).reshape(height, width)
    return Image.merge("RGB", [Image.fromarray((values // 256**i % 256).byte().numpy()) for i in range(3)])


def of_samples(model, batch):
    """Return a model's outputs for each sample of a batch alone, without its padding."""
    rows = []
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        if "patch_mask" in batch:
            real = batch["patch_mask"][i].sum()
            alone |= {key: alone[key][:, :real] for key in ("pixel_patches", "patch_mask")}
        if "pixel_values" in batch and "image_grid" in batch:
            tiles = batch["image_grid"][i].prod()
            alone["pixel_values"] = alone["pixel_values"][:, : tiles + (tiles > 1)]
        alone |= {k: v[:, : mask.sum()] for k, v in alone.items() if v.shape[1:] == mask.shape}
        rows.append(model(alone)["nll"][0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def unlike_batch(model, tokenizer):
    """A batch of pictures of unlike shapes with captions of unlike lengths."""
    samples = []
    for i, size in enumerate([(48, 48), (20, 48), (90, 30), (10, 10)]):
        image = model.image_processor(spread(*size))
        caption = tokenizer(make_sample("train", i)["caption"])["input_ids"][: 10 + 5 * i]
        prefix = [tokenizer.bos_token_id, *(image_token_ids(tokenizer)[kind] for kind in image.layout)]
        ids, labels = torch.tensor(prefix + caption), torch.tensor([IGNORE_INDEX] * len(prefix) + caption)
        samples.append({"input_ids": ids, "labels": labels, "sample_id": i, **image.tensors})
    return CaptionCollator(tokenizer.pad_token_id)(samples)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@torch.no_grad()
def test_a_batch_says_of_each_sample_what_the_sample_alone_says(front_end, tokenizer):
    model = small_lvlm(front_end, tokenizer).eval()
    batch = unlike_batch(model, tokenizer)
    assert (batch["input_ids"] == model.processor.image_token_id).any(1).all()
    torch.testing.assert_close(model(batch)["nll"], of_samples(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@torch.no_grad()
def test_mixed_precision_is_rounding(front_end, tokenizer):
    model = small_lvlm(front_end, tokenizer).eval()
    batch = unlike_batch(model, tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)["nll"]
    exact = model(batch)["nll"]
    assert 0 < (rounded - exact).abs().mean() < 0.02 * exact.mean()


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
        (lambda: small_naflex(max_tokens=3), 2, "factor=2: model.vision.max_tokens=3 holds no block"),
        (Other, 2, "factor=2: Other has no grid that is known"),
    ],
)
def test_a_grid_that_the_factor_does_not_divide_is_refused(tower, factor, message, tokenizer):
    with pytest.raises(ValueError, match=message) as error:
        make_lvlm(small_lm(tokenizer), tower(), "pixel_shuffle", tokenizer, factor=factor)
    assert "\n" not in str(error.value)


def tiled(most=4, **changes):
    """A tower of 2 x 2 patches of 12 pixels that reads an image in tiles, and its image processor."""
    tower = build_open_clip("prior-vit-tiny", image_size=24, tiles={"max": most}, **changes)
    return tower, image_processor_of(tower)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((24, 24), (1, 1)),
        ((10, 3), (1, 1)),
        ((24, 25), (1, 2)),
        ((48, 48), (2, 2)),
        ((500, 480), (2, 2)),
        ((96, 24), (4, 1)),
        ((20, 70), (1, 3)),
        ((2000, 100), (4, 1)),
        ((20000, 1), (4, 1)),
        ((1, 20000), (1, 4)),
    ],
)
def test_tiles_are_as_many_as_the_pixels_need(size, grid):
    """Each is what the tower's own preprocessing makes of the piece, and they are bounded for any picture."""
    height, width = size
    rows, columns = grid
    _, processor = tiled()
    plain = image_processor_of(build_open_clip("prior-vit-tiny", image_size=24))
    picture = Image.effect_noise((width, height), 100).convert("RGB")
    tensors, layout = processor.process(picture)
    assert tensors["image_grid"].tolist() == [rows, columns]
    assert tile_grid(height, width, 24, 4) == grid
    if grid == (1, 1):
        expected, ends = plain.process(picture)
        assert torch.equal(tensors["pixel_values"], expected["pixel_values"][None])
        assert layout == ends == [False] * 4
        return
    large = picture.resize((columns * 24, rows * 24), Image.Resampling.BICUBIC)
    pieces = [large.crop((x, y, x + 24, y + 24)) for y in range(0, rows * 24, 24) for x in range(0, columns * 24, 24)]
    pieces.append(picture.resize((24, 24), Image.Resampling.BICUBIC))
    expected = torch.stack([plain.process(piece)[0]["pixel_values"] for piece in pieces])
    assert torch.equal(tensors["pixel_values"], expected)
    expected = []
    for _ in range(rows):
        for _ in range(columns):
            expected += [False] * 4 + [True]
        expected.append(True)
    assert layout == expected + [False] * 4
    assert len(layout) <= processor.max_image_tokens == 4 * 4 + 4 + 4 + 4


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_tile_is_resized_once(mode):
    _, processor = tiled(resize_mode=mode)
    picture = spread(48, 48)
    mean, std = (torch.tensor(processor.vision["preprocess"][key]).view(3, 1, 1) for key in ("mean", "std"))
    tile = torch.from_numpy(np.array(picture.crop((24, 0, 48, 24)))).permute(2, 0, 1)
    torch.testing.assert_close(processor.process(picture)[0]["pixel_values"][1], (tile / 255 - mean) / std)


@torch.no_grad()
def test_one_tile_is_no_tiles(tokenizer, make_batch):
    """Of the same weights, on images that fit into one square, and on larger ones where there is one at most."""
    for most, canvas in ((4, 24), (1, 96)):
        found = []
        for tiles in (None, {"max": most}):
            lm = small_lm(tokenizer)
            tower = build_open_clip("prior-vit-tiny", image_size=24, tiles=tiles)
            model = ComposerLVLM(*make_lvlm(lm, tower, "mlp", tokenizer)).eval()
            samples = [decode_image(make_sample("train", i, canvas=canvas)["image"]) for i in range(3)]
            inputs = model.processor(images=samples, return_tensors="pt")
            found.append((inputs["input_ids"], model.model(**inputs).logits))
        assert all(map(torch.equal, *found))


@torch.no_grad()
def test_tiles_are_read_one_by_one(tokenizer):
    """The features of a batch of unlike grids are those of its squares alone, in the order of the layout."""
    tower, processor = tiled()
    pictures = [spread(48, 48), spread(20, 20), spread(24, 60)]
    images = [processor.process(picture)[0] for picture in pictures]
    expected = [tower.eval()(square[None]) for image in images for square in image["pixel_values"]]
    torch.testing.assert_close(tower(**processor.batch(images)), torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ({"max": 0}, "model.vision.tiles.max=0: expected int of at least 1"),
        ({}, "model.vision.tiles needs max"),
        ({"most": 4}, r"model.vision.tiles.most is not a key of model.vision.tiles. Accepted: max"),
    ],
)
def test_impossible_tiles_are_refused(tiles, message):
    for refuse in (build_open_clip, build_open_clip.check):
        with pytest.raises(ValueError, match=message):
            refuse("prior-vit-tiny", tiles=tiles)


def whole(encoder, picture):
    """The features of a whole timm model's second to last block for one picture, as an image and not in patches."""
    pixels = (pil_to_tensor(picture) / 255 - 0.5) / 0.5
    return encoder.forward_intermediates(pixels[None], indices=[-2], output_fmt="NLC", intermediates_only=True)[0][0]


@torch.no_grad()
def test_naflex_is_the_same_timm_model_run_alone(tmp_path):
    """At a square size and at others, in one batch; from the weights of a file of timm."""
    config = {"depth": 3, "embed_dim": 32, "num_heads": 2, "class_token": True}
    torch.manual_seed(1)
    encoder = timm.create_model("naflexvit_base_patch16_siglip", num_classes=0, **config).eval()
    for weight in encoder.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.05)
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    tower = build_naflex("naflexvit_base_patch16_siglip", str(tmp_path / "weights.pt"), 36, config=config).eval()
    assert tower.config["preprocess"]["mean"] == (0.5, 0.5, 0.5)
    assert len(tower.blocks) == 2
    pictures = [spread(96, 96), spread(64, 144), spread(16, 16 * 36), spread(97, 80), spread(10, 12)]
    processor = image_processor_of(tower)
    images = [processor.process(picture)[0] for picture in pictures]
    assert [image["image_grid"].tolist() for image in images] == [[6, 6], [4, 9], [1, 36], [7, 5], [5, 6]]
    expected = torch.cat([whole(encoder, ResizeToSequence(16, 36)(picture)) for picture in pictures])
    torch.testing.assert_close(tower(**processor.batch(images)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(97, 80), (1, 1), (3000, 2000), (20000, 1), (1, 20000), (30, 900)])
@pytest.mark.parametrize("merge", [1, 2])
def test_naflex_keeps_to_its_budget(height, width, merge):
    tower = small_naflex(max_tokens=120)
    tower.config["merge"] = merge
    processor = image_processor_of(tower)
    tensors, layout = processor.process(Image.new("RGB", (width, height)))
    rows, columns = tensors["image_grid"].tolist()
    assert rows * columns == len(tensors["pixel_patches"]) <= 120
    assert rows % merge == columns % merge == 0
    assert layout == ([False] * (columns // merge) + [True]) * (rows // merge)
    assert len(layout) <= processor.max_image_tokens == 240 // merge**2
    if max(height, width) < 40 * min(height, width):  # one scale, with each side rounded up to the grid
        blocks = ((rows // merge, height), (columns // merge, width))
        assert max((n - 1) / side for n, side in blocks) < min(n / side for n, side in blocks)


@torch.no_grad()
def test_naflex_keeps_the_features_of_a_block_together():
    tower = small_naflex().eval()
    tower.config["merge"] = 2
    images = [image_processor_of(tower).process(spread(*size))[0] for size in [(48, 32), (20, 60)]]
    batch = image_processor_of(tower).batch(images)
    blocks = tower(**batch).unflatten(0, (-1, 4))
    tower.config["merge"] = 1
    features, expected = iter(tower(**batch)), []
    for rows, columns in batch["image_grid"].tolist():
        grid = [[next(features) for _ in range(columns)] for _ in range(rows)]
        corners = [(y, x) for y in range(0, rows, 2) for x in range(0, columns, 2)]
        expected += [torch.stack([grid[y][x], grid[y][x + 1], grid[y + 1][x], grid[y + 1][x + 1]]) for y, x in corners]
    assert torch.equal(blocks, torch.stack(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "vit_base_patch16_224"}, "'vit_base_patch16_224' is no NaFlexVit of timm. .*Accepted"),
        ({"pretrained": "v3"}, r"'v3' is neither a file nor a tag of naflexvit_base_patch16_siglip \(v2_webli\)"),
        ({"pretrained": "v2_webli", "patch_size": 8}, "patch_size is that of the weights"),
        ({"pretrained": "v2_webli", "config": {"patch_size": 8}}, r"config\.patch_size is that of the weights"),
        ({"config": {"patch_size": [8, 16]}}, r"config\.patch_size=\[8, 16\]: patches are square"),
        ({"config": {"patch_drop_rate": 0.5}}, r"config\.patch_drop_rate: the text has a place for each patch"),
        ({"config": {"in_chans": 1}}, r"config\.in_chans=1: images have 3 channels"),
        ({"layer": 12}, "layer=12: naflexvit_base_patch16_siglip has 12 layers"),
        ({"config": {"depths": 3}}, r"model.vision.config: .*unexpected keyword argument.*depths"),
    ],
)
def test_an_impossible_naflex_is_refused_before_any_is_built(arguments, message, monkeypatch):
    monkeypatch.setattr(vision, "NaFlexTower", lambda *_: pytest.fail("it is built"))
    for refuse in (build_naflex, build_naflex.check):
        with pytest.raises(ValueError, match=message) as error:
            refuse(**{"architecture": "naflexvit_base_patch16_siglip", **arguments})
        assert "\n" not in str(error.value)


def test_a_file_with_other_weights_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"model.vision.pretrained=.*weights.pt cannot be loaded: ") as error:
        small_naflex(pretrained=str(tmp_path / "weights.pt"), patch_size=None)
    assert "\n" not in str(error.value)
