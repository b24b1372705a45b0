"""Vision towers: how an image becomes the features that stand in the language model's input.

A tower is a module with

- ``image_processor``: a picklable callable, PIL image -> :class:`ImageInputs`, that belongs to the tower;
- ``max_image_tokens``: the most positions that an image can take in the text sequence;
- ``width``: the size of a feature, None if the tower is built for the language model's own width;
- ``config``: a dict of what it is built from, from which :func:`.tower_of` makes it again;
- ``forward(batch) -> [n, width]``: the features of every image token of the batch, in reading order;
- ``blocks``, where it has any: its transformer blocks, by which FSDP2 shards it and activations are checkpointed.
"""

import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from composer_prior.data.batch import IMAGE, ROW_SEPARATOR, ImageInputs
from composer_prior.data.messages import announce, one_line
from composer_prior.models.modeling_prior_lvlm import cut_patches, encoder_features, prune_encoder
from composer_prior.models.open_clip_source import brings_weights, find_source


class OpenCLIPTower(nn.Module):
    """Patch features of an OpenCLIP visual encoder, ``pixel_values [B, 3, H, W] -> [B * N, width]``.

    Args:
        architecture: name of an OpenCLIP architecture (``open_clip.list_models()``), such as
            ``ViT-L-14-336-quickgelu``; or ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``, which hold
            ``open_clip_config.json`` and the weights.
        pretrained: an OpenCLIP tag (downloaded), a tag of weights that come with this package (``emoji_scenes`` of
            ``prior-vit-tiny``) or a local checkpoint; None starts from random weights, but for ``local-dir:`` and
            ``hf-hub:``, which bring theirs.
        image_size: side of the square input in pixels; default: the architecture's.
        layer: block whose output is used, counted as in a list; default: ``-2``, the second to last. Later blocks are
            removed. The class token is dropped.
        resize_mode: how OpenCLIP fits an image to the square: ``shortest`` (crops), ``longest`` (pads) or ``squash``.
            Default of this and the next three: what the weights were trained with, as OpenCLIP's table or the
            ``open_clip_config.json`` beside a checkpoint says it.
        interpolation: ``bicubic`` or ``bilinear``, of the resizing.
        mean, std: of each channel, in [0, 1], which pixels are normalized by.
        freeze: keep the tower's weights as they are; it then runs in eval mode without gradient.

    Raises:
        ValueError: for an unknown architecture, a missing checkpoint, weights that were trained with another
            activation or an unknown preprocessing, a patch size that does not divide the image size, or a layer the
            encoder does not have.
    """

    def __init__(
        self,
        architecture: str,
        pretrained: str | None = None,
        image_size: int | None = None,
        layer: int = -2,
        resize_mode: Literal["shortest", "longest", "squash"] | None = None,
        freeze: bool = False,
        interpolation: Literal["bicubic", "bilinear"] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__()
        given: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
        self.check(architecture, pretrained, image_size, layer, **given)
        source = find_source(architecture, pretrained, given)
        device = torch.empty(0).device
        loads = device.type != "meta"  # where only shapes are wanted
        if loads and source.assumption:
            announce(source.assumption)
        # The encoder's own preprocessing at evaluation: an LVLM learns captions of whole images, without augmentation.
        try:
            clip = open_clip.create_model(
                architecture,
                pretrained=source.weights if loads else None,
                load_weights=loads,
                force_image_size=image_size,
                force_preprocess_cfg=source.preprocess,
                device=device,
                pretrained_text=False,
                require_pretrained=loads and brings_weights(architecture),
            )
        except (RuntimeError, OSError, AssertionError, LookupError, pickle.UnpicklingError) as error:
            what = f"architecture={architecture}" if pretrained is None else f"pretrained={pretrained}"
            raise ValueError(f"model.vision.{what} cannot be loaded: {one_line(error)}") from error
        self.encoder = clip.visual
        depth = len(_blocks(self.encoder))
        _check_layer(architecture, layer, depth)
        prune_encoder(self.encoder, layer % depth)
        description = source.config
        if image_size is not None:
            description["vision_cfg"]["image_size"] = image_size
        self._describe(
            {
                "type": "open_clip",
                "embed_dim": description["embed_dim"],
                "vision_cfg": description["vision_cfg"],
                "quick_gelu": description.get("quick_gelu", False),
                "layer": layer % depth,
                "preprocess": dict(self.encoder.preprocess_cfg),
            }
        )
        self.frozen = freeze
        self.requires_grad_(not freeze)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], encoder: nn.Module) -> "OpenCLIPTower":
        """The tower of a ``config`` around its encoder, whose later blocks are gone already."""
        tower = cls.__new__(cls)
        nn.Module.__init__(tower)
        tower.encoder = encoder
        tower.frozen = False
        tower._describe(dict(config))
        return tower

    def _describe(self, config: dict[str, Any]) -> None:
        """Set what follows from the encoder and its ``config``."""
        self.image_size = _square(self.encoder.image_size)
        with torch.no_grad():
            parameter = next(self.encoder.parameters())
            blank = parameter.new_zeros(1, 3, self.image_size, self.image_size)
            _, self.max_image_tokens, self.width = encoder_features(self.encoder, blank).shape
        self.config = {**config, "width": self.width, "image_tokens": self.max_image_tokens}
        transform = image_transform_v2(PreprocessCfg(**config["preprocess"]), is_train=False)
        self.image_processor = partial(_encoder_inputs, transform, self.max_image_tokens)

    @staticmethod
    def check(
        architecture: str,
        pretrained: str | None = None,
        image_size: int | None = None,
        layer: int = -2,
        mean: Any = None,
        std: Any = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
    ) -> None:
        """Refuse impossible arguments without building anything."""
        given = {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
        vision = find_source(architecture, pretrained, given).config["vision_cfg"]
        size, patch = image_size or vision.get("image_size"), vision.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int) and size % patch:
            raise ValueError(
                f"model.vision.image_size={size} is not a multiple of {architecture}'s patch size {patch}."
            )
        depth = vision.get("layers")
        if isinstance(depth, int):
            _check_layer(architecture, layer, depth)

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's transformer blocks."""
        return list(_blocks(self.encoder))

    def train(self, mode: bool = True) -> "OpenCLIPTower":
        return super().train(mode and not self.frozen)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return encoder_features(self.encoder, batch["pixel_values"]).flatten(0, 1)


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
        self.config = {"type": "patches", "width": width, "patch_size": patch_size, "max_side": max_side}
        self.image_processor = partial(patch_inputs, patch_size=patch_size, max_side=max_side)

    @staticmethod
    def check(patch_size: int = 16, max_side: int = 512) -> None:
        """Refuse impossible arguments without building anything."""
        if patch_size < 1 or max_side % patch_size:
            raise ValueError(f"model.vision.max_side={max_side} is not a multiple of patch_size={patch_size}.")

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.proj(batch["pixel_patches"][batch["patch_mask"]])


def patch_inputs(image: Image.Image, patch_size: int, max_side: int) -> ImageInputs:
    """Cut an RGB image into patches, ``pixel_patches [N, 3 P P]``; see :func:`.cut_patches`."""
    patches, rows, columns = cut_patches(image, patch_size, max_side)
    return ImageInputs({"pixel_patches": patches}, ([IMAGE] * columns + [ROW_SEPARATOR]) * rows)


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
