"""Vision towers: how an image becomes the features that stand in the language model's input.

A tower is a module with

- ``image_processor``: a picklable callable, PIL image -> :class:`ImageInputs`, that belongs to the tower;
- ``max_image_tokens``: the most positions that an image can take in the text sequence;
- ``width``: the size of a feature, None if the tower is built for the language model's own width;
- ``forward(batch) -> [n, width]``: the features of every image token of the batch, in reading order.
"""

from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from composer_prior.data.batch import IMAGE, ROW_SEPARATOR, ImageInputs
from composer_prior.registry import did_you_mean, register

open_clip.add_model_config(Path(__file__).parent / "open_clip_configs")


@register("vision", "open_clip")
class OpenCLIPTower(nn.Module):
    """Patch features of an OpenCLIP visual encoder, ``pixel_values [B, 3, H, W] -> [B * N, width]``.

    Args:
        architecture: name of an OpenCLIP architecture (``open_clip.list_models()``), such as ``ViT-L-14-336``.
        pretrained: an OpenCLIP tag (downloaded) or a local checkpoint; None starts from random weights.
        image_size: side of the square input in pixels; default: the architecture's.
        layer: block whose output is used, counted as in a list; default: ``-2``, the second to last. Later blocks are
            removed. The class token is dropped.
        resize_mode: how OpenCLIP fits an image to the square: ``shortest`` (crops), ``longest`` (pads) or ``squash``;
            default: the architecture's own.
        freeze: keep the tower's weights as they are; it then runs in eval mode without gradient.

    Raises:
        ValueError: for an unknown architecture, a missing checkpoint, a patch size that does not divide the image
            size, or a layer the encoder does not have.
    """

    def __init__(
        self,
        architecture: str,
        pretrained: str | None = None,
        image_size: int | None = None,
        layer: int = -2,
        resize_mode: str | None = None,
        freeze: bool = False,
    ):
        super().__init__()
        self.check(architecture, pretrained, image_size, layer)
        # The encoder's own preprocessing at evaluation: an LVLM learns captions of whole images, without augmentation.
        clip, _, transform = open_clip.create_model_and_transforms(
            architecture,
            pretrained=pretrained,
            force_image_size=image_size,
            image_resize_mode=resize_mode,
            device=torch.empty(0).device,  # meta, where only shapes are wanted
            pretrained_text=False,
        )
        self.encoder = clip.visual
        self.image_size = _square(self.encoder.image_size)
        depth = len(_blocks(self.encoder))
        _check_layer(architecture, layer, depth)
        prunable = getattr(self.encoder, "trunk", self.encoder)  # timm's model inside OpenCLIP's wrapper
        prunable.prune_intermediate_layers(indices=[layer % depth], prune_norm=True, prune_head=True)
        self.frozen = freeze
        self.requires_grad_(not freeze)
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            _, self.max_image_tokens, self.width = self._features(blank).shape
        self.image_processor = partial(_encoder_inputs, transform, self.max_image_tokens)

    @staticmethod
    def check(architecture: str, pretrained: str | None = None, image_size: int | None = None, layer: int = -2) -> None:
        """Refuse impossible arguments without building anything."""
        config = open_clip.get_model_config(architecture)
        if config is None:
            raise ValueError(
                f"model.vision.architecture={architecture!r} is not in OpenCLIP. "
                f"{did_you_mean(architecture, open_clip.list_models())}"
            )
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if pretrained and pretrained not in tags and not Path(pretrained).is_file():
            raise ValueError(
                f"model.vision.pretrained={pretrained!r} is neither a file nor a tag of {architecture} "
                f"({', '.join(tags) or 'it has none'})."
            )
        vision = config["vision_cfg"]
        size, patch = image_size or vision.get("image_size"), vision.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int) and size % patch:
            raise ValueError(
                f"model.vision.image_size={size} is not a multiple of {architecture}'s patch size {patch}."
            )
        depth = vision.get("layers")
        if isinstance(depth, int):
            _check_layer(architecture, layer, depth)

    def train(self, mode: bool = True) -> "OpenCLIPTower":
        return super().train(mode and not self.frozen)

    def _features(self, pixel_values: Tensor) -> Tensor:
        """``[B, N, width]`` patch features."""
        return self.encoder.forward_intermediates(
            pixel_values, indices=1, stop_early=True, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][-1]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._features(batch["pixel_values"]).flatten(0, 1)


@register("vision", "patches")
class PatchEmbedding(nn.Module):
    """Pixel patches through one linear layer, ``pixel_patches [B, N, 3 P P] -> [n, width]`` of the real patches.

    Images keep their aspect ratio; a row separator, a token of the language model, ends each row of patches.

    Args:
        width: the language model's hidden size.
        patch_size: ``P``, side of a patch in pixels.
        max_side: cap on the longer side in pixels.
        freeze: keep the layer as it is.

    Raises:
        ValueError: if ``patch_size`` does not divide ``max_side``.
    """

    def __init__(self, width: int, patch_size: int = 16, max_side: int = 512, freeze: bool = False):
        super().__init__()
        self.check(patch_size, max_side)
        self.width = width
        side = max_side // patch_size
        self.max_image_tokens = side * (side + 1)
        self.proj = nn.Linear(3 * patch_size**2, width)
        self.requires_grad_(not freeze)
        self.image_processor = partial(patch_inputs, patch_size=patch_size, max_side=max_side)

    @staticmethod
    def check(patch_size: int = 16, max_side: int = 512) -> None:
        """Refuse impossible arguments without building anything."""
        if patch_size < 1 or max_side % patch_size:
            raise ValueError(f"model.vision.max_side={max_side} is not a multiple of patch_size={patch_size}.")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.proj(batch["pixel_patches"][batch["patch_mask"]])


def patch_inputs(image: Image.Image, patch_size: int, max_side: int) -> ImageInputs:
    """Cut an RGB image into patches in raster order: ``pixel_patches [N, 3 P P]`` float32 in [-1, 1].

    The longer side is rounded to the patch grid and capped at ``max_side``; the other keeps the aspect ratio as nearly
    as the grid allows.
    """
    height, width = patch_grid(image.height, image.width, patch_size, max_side)
    image = image.resize((width * patch_size, height * patch_size), Image.Resampling.BICUBIC)
    pixels = pil_to_tensor(image).float().div_(127.5).sub_(1.0)  # [3, H, W]
    patches = pixels.reshape(3, height, patch_size, width, patch_size).permute(1, 3, 0, 2, 4)  # [h, w, 3, P, P]
    return ImageInputs(
        {"pixel_patches": patches.flatten(2).flatten(0, 1)}, ([IMAGE] * width + [ROW_SEPARATOR]) * height
    )


def patch_grid(height: int, width: int, patch_size: int, max_side: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of ``height`` x ``width`` pixels."""
    long_side = max(height, width)
    target = min(max_side, max(1, round(long_side / patch_size)) * patch_size)
    rows, columns = (max(1, round(side * target / long_side / patch_size)) for side in (height, width))
    return rows, columns


def _encoder_inputs(transform: Any, num_tokens: int, image: Image.Image) -> ImageInputs:
    return ImageInputs({"pixel_values": transform(image)}, [IMAGE] * num_tokens)


def _check_layer(architecture: str, layer: int, depth: int) -> None:
    if not -depth <= layer < depth:
        raise ValueError(f"model.vision.layer={layer}: {architecture} has {depth} layers.")


def _square(size: int | tuple[int, int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"OpenCLIP image size {height} x {width}: only square inputs are supported.")
    return height


def _blocks(encoder: Any) -> Any:
    """The list of transformer blocks of an OpenCLIP visual tower."""
    if hasattr(encoder, "transformer"):
        return encoder.transformer.resblocks
    if hasattr(getattr(encoder, "trunk", None), "blocks"):
        return encoder.trunk.blocks
    raise ValueError(f"{type(encoder).__name__} has no list of transformer blocks to take patch features from.")
