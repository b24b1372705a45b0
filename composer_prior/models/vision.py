"""Vision towers: built from a recipe's ``model.vision``.

A tower is a module with

- ``config``: a dict that describes it, with ``width``, the size of a feature, and ``type``;
- ``forward`` of the image processor's tensors, by name: ``pixel_values``, ``pixel_patches`` or ``image_grid``, as the
  collator keeps no others; and ``patch_mask``, which it adds to ``pixel_patches``. It returns the features
  ``[n, width]`` of every image token of the batch, in reading order;
- ``blocks``, where it has any: its transformer blocks, by which FSDP2 shards it and activations are checkpointed;
- ``image_processor``, where :class:`.PriorLVLMImageProcessor` of its ``config`` will not do: a subclass with its own
  ``process`` and ``max_image_tokens``.
"""

import pickle
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
from PIL import Image
from torch import nn

from composer_prior import registry
from composer_prior.data.batch import ImageInputs
from composer_prior.data.messages import announce, one_line
from composer_prior.models.open_clip_source import Source, brings_weights, find_source
from composer_prior.models.prior_lvlm import PriorLVLMImageProcessor
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import (
    NaFlexTower,
    OpenCLIPTower,
    PatchEmbedding,
    encoder_blocks,
    encoder_features,
    prune_encoder,
)


def build_open_clip(
    architecture: str,
    pretrained: str | None = None,
    image_size: int | None = None,
    layer: int = -2,
    resize_mode: Literal["shortest", "longest", "squash"] | None = None,
    freeze: bool = False,
    interpolation: Literal["bicubic", "bilinear"] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    tiles: dict[str, Any] | None = None,
    preprocess_of: str | None = None,
) -> OpenCLIPTower:
    """Build a tower of an OpenCLIP visual encoder.

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
        freeze: keep the tower's weights as they are; it then runs in eval mode without gradient.
        interpolation: ``bicubic`` or ``bilinear``, of the resizing.
        mean: of each channel, in [0, 1], by which pixels are normalized.
        std: of each channel, in [0, 1], by which pixels are normalized.
        tiles: ``{max: 4}``: larger images are cut into up to so many squares, and the whole image follows in one more.
            Default: one square an image.
        preprocess_of: a tag of the architecture by which images are prepared, for weights that do not say how.

    Raises:
        ValueError: for an unknown architecture, a missing checkpoint, weights that were trained with another
            activation or an unknown preprocessing, a patch size that does not divide the image size, or a layer the
            encoder does not have.
    """
    source = _find_encoder(
        architecture, pretrained, image_size, layer, mean, std, interpolation, resize_mode, tiles, preprocess_of
    )
    description = source.config
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
    encoder = clip.visual
    depth = len(encoder_blocks(encoder))
    _check_layer(architecture, layer, depth)
    prune_encoder(encoder, layer % depth)
    if image_size is not None:
        description["vision_cfg"]["image_size"] = image_size
    side = encoder.image_size
    height, width = (side, side) if isinstance(side, int) else side
    if height != width:
        raise ValueError(f"OpenCLIP image size {height} x {width}: only square inputs are supported.")
    with torch.no_grad():
        blank = next(encoder.parameters()).new_zeros(1, 3, height, width)
        _, image_tokens, features = encoder_features(encoder, blank).shape
    config = {
        "type": "open_clip",
        "embed_dim": description["embed_dim"],
        "vision_cfg": description["vision_cfg"],
        "quick_gelu": description.get("quick_gelu", False),
        "layer": layer % depth,
        "preprocess": dict(encoder.preprocess_cfg),
        "width": features,
        "image_tokens": image_tokens,
        **({"tiles": dict(tiles)} if tiles is not None else {}),
    }
    return OpenCLIPTower(config, encoder).requires_grad_(not freeze).train()


def _find_encoder(
    architecture: str,
    pretrained: str | None = None,
    image_size: int | None = None,
    layer: int = -2,
    mean: Any = None,
    std: Any = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
    tiles: dict[str, Any] | None = None,
    preprocess_of: str | None = None,
) -> Source:
    """Find the source of an encoder; refuse impossible arguments before weights are loaded."""
    if tiles is not None:
        registry.check_arguments(_tiles, tiles, "model.vision.tiles")
    given = {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
    source = find_source(architecture, pretrained, given, preprocess_of)
    vision = source.config["vision_cfg"]
    size, patch = image_size or vision.get("image_size"), vision.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and size % patch:
        raise ValueError(f"model.vision.image_size={size} is not a multiple of {architecture}'s patch size {patch}.")
    if isinstance(vision.get("layers"), int):  # only the encoder itself knows the depth of timm's models
        _check_layer(architecture, layer, vision["layers"])
    return source


def _tiles(max: registry.Count) -> None:
    """Have the keys of ``tiles``, which are checked by this signature."""


def _check_layer(architecture: str, layer: int, depth: int) -> None:
    if not -depth <= layer < depth:
        raise ValueError(f"model.vision.layer={layer}: {architecture} has {depth} layers.")


def build_naflex(
    architecture: str,
    pretrained: str | None = None,
    max_tokens: registry.Count = 256,
    patch_size: registry.Count | None = None,
    layer: int = -2,
    freeze: bool = False,
    config: dict[str, Any] | None = None,
) -> NaFlexTower:
    """Build a tower of timm's NaFlexVit, which reads images in their own aspect ratio.

    An image is scaled so that it has as many patches as the budget allows; a row separator ends each row of them.

    Args:
        architecture: of timm, such as ``naflexvit_base_patch16_siglip`` (SigLIP 2).
        pretrained: a tag of timm (downloaded), such as ``v2_webli``, or a local checkpoint; None starts from random
            weights. Pixels are normalized as timm says of the tag, or of the architecture.
        max_tokens: most patches of an image. Default: ``256``.
        patch_size: side of a patch in pixels, of a tower with random weights. Default: the architecture's.
        layer: block whose output is used, counted as in a list; default: ``-2``. Later blocks are removed.
        freeze: keep the tower's weights as they are; it then runs in eval mode without gradient.
        config: changes of the architecture, arguments of timm's ``NaFlexVitCfg``. Default: none.

    Raises:
        ValueError: for an unknown architecture or tag, a missing checkpoint, a layer the encoder does not have, or a
            configuration that drops patches, or has another shape of them or another number of channels.
    """
    vision = _describe_naflex(architecture, pretrained, max_tokens, patch_size, layer, config)
    encoder: Any = None
    if pretrained is not None:
        given: dict[str, Any] = {"pretrained_cfg_overlay": {"file": pretrained}} if Path(pretrained).is_file() else {}
        name = architecture if given else f"{architecture}.{pretrained}"
        try:
            encoder = timm.create_model(name, pretrained=True, **given, **vision["arguments"])
        except (RuntimeError, OSError, LookupError, pickle.UnpicklingError) as error:
            raise ValueError(f"model.vision.pretrained={pretrained} cannot be loaded: {one_line(error)}") from error
        prune_encoder(encoder, vision["layer"])
    return NaFlexTower(vision, encoder).requires_grad_(not freeze).train()


def _describe_naflex(
    architecture: str,
    pretrained: str | None = None,
    max_tokens: int = 256,
    patch_size: int | None = None,
    layer: int = -2,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the configuration of a NaFlexVit; refuse impossible arguments before weights are loaded."""
    known = timm.list_models("naflexvit_*")
    if architecture not in known:
        raise ValueError(
            f"model.vision.architecture={architecture!r} is no NaFlexVit of timm. "
            f"{registry.did_you_mean(architecture, known)}"
        )
    tags = [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]
    if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"model.vision.pretrained={pretrained!r} is neither a file nor a tag of {architecture} "
            f"({', '.join(tags) or 'it has none'})."
        )
    config = config or {}
    if pretrained is not None and (patch_size is not None or "patch_size" in config):
        key = "config.patch_size" if patch_size is None else "patch_size"
        raise ValueError(f"model.vision.{key} is that of the weights, pretrained; leave it out.")
    if config.get("patch_drop_rate"):
        raise ValueError("model.vision.config.patch_drop_rate: the text has a place for each patch; leave it out.")
    if config.get("in_chans", 3) != 3:
        raise ValueError(f"model.vision.config.in_chans={config['in_chans']}: images have 3 channels; leave it out.")
    arguments = {**config, "num_classes": 0, **({"patch_size": patch_size} if patch_size else {})}
    try:
        with torch.device("meta"):
            encoder: Any = timm.create_model(architecture, **arguments)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"model.vision.config: {one_line(error)}") from error
    height, width = encoder.embeds.patch_size
    if height != width:
        raise ValueError(f"model.vision.config.patch_size={[height, width]}: patches are square; give one number.")
    _check_layer(architecture, layer, len(encoder.blocks))
    trained: Any = timm.get_pretrained_cfg(f"{architecture}.{pretrained}" if pretrained in tags else architecture)
    return {
        "type": "naflex",
        "architecture": architecture,
        "arguments": arguments,
        "layer": layer % len(encoder.blocks),
        "patch_size": height,
        "max_tokens": max_tokens,
        "width": encoder.embed_dim,
        "preprocess": {key: getattr(trained, key) for key in ("mean", "std", "interpolation")},
    }


def build_patches(width: int, patch_size: int = 16, max_side: int = 512, freeze: bool = False) -> PatchEmbedding:
    """Build a patch embedding, without an encoder.

    Images keep their aspect ratio; a row separator, a token of the language model, ends each row of patches.

    Args:
        width: the language model's hidden size.
        patch_size: ``P``, side of a patch in pixels.
        max_side: cap on the longer side in pixels.
        freeze: keep the layer as it is.

    Raises:
        ValueError: if ``patch_size`` does not divide ``max_side``.
    """
    _check_patches(patch_size, max_side)
    tower = PatchEmbedding({"type": "patches", "width": width, "patch_size": patch_size, "max_side": max_side})
    return tower.requires_grad_(not freeze)


def _check_patches(patch_size: int = 16, max_side: int = 512) -> None:
    if patch_size < 1 or max_side % patch_size:
        raise ValueError(f"model.vision.max_side={max_side} is not a multiple of patch_size={patch_size}.")


# The check of a recipe calls these, before there are data and a language model.
build_open_clip.check = _find_encoder  # type: ignore[attr-defined]
build_naflex.check = _describe_naflex  # type: ignore[attr-defined]
build_patches.check = _check_patches  # type: ignore[attr-defined]


def image_processor_of(tower: nn.Module) -> PriorLVLMImageProcessor:
    """Return the image processor of a tower."""
    return getattr(tower, "image_processor", None) or PriorLVLMImageProcessor(tower.config)  # type: ignore[arg-type]


def image_inputs(image_processor: PriorLVLMImageProcessor, image: Image.Image) -> ImageInputs:
    """Return one image as a data set's samples hold it; :class:`.StreamingCaptionDataset` takes a partial of this."""
    tensors, row_ends = image_processor.process(image)
    return ImageInputs(tensors, [int(ends) for ends in row_ends])
