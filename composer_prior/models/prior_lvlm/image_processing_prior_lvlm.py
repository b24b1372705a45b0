"""Image processor of the LVLM: OpenCLIP's preprocessing, or patches in the image's own aspect ratio."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image


class PriorLVLMImageProcessor(BaseImageProcessor):
    """Turn images into ``pixel_values [B, 3, H, W]``, or ``pixel_patches [B, N, 3 P P]`` and ``patch_mask [B, N]``.

    ``image_grid [B, 2]`` has rows and columns of NaFlex's patches, or of tiles, of which ``pixel_values`` are ``[B, T,
    3, H, W]``.

    Args:
        vision: the tower, as in :class:`.PriorLVLMConfig`.
    """

    model_input_names = ["pixel_values", "pixel_patches", "patch_mask", "image_grid"]  # noqa: RUF012 - as transformers has it

    def __init__(self, vision: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.vision = dict(vision or {})

    @property
    def merge(self) -> int:
        """Side of the blocks of features that become one image token."""
        return self.vision.get("merge", 1)

    @property
    def max_image_tokens(self) -> int:
        """Most positions that an image takes in the text."""
        if self.vision["type"] == "patches":
            side = self.vision["max_side"] // (self.vision["patch_size"] * self.merge)
            return side * (side + 1)
        if self.vision["type"] == "naflex":
            return 2 * (self.vision["max_tokens"] // self.merge**2)  # each may be a row
        tile, most = self.vision["image_tokens"] // self.merge**2, self.vision.get("tiles", {}).get("max", 1)
        return tile if most == 1 else most * (tile + 2) + tile

    def process(self, image: Image.Image) -> tuple[dict[str, Tensor], list[bool]]:
        """Return the tensors of one image, and for each of its positions in the text whether a row ends there."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        if self.vision["type"] in ("patches", "naflex"):
            return self._patches(image)
        transform = open_clip_transform(json.dumps(self.vision["preprocess"]))
        tile = [False] * (self.vision["image_tokens"] // self.merge**2)
        if "tiles" not in self.vision:
            return {"pixel_values": transform(image)}, tile
        squares, rows, columns = cut_tiles(image, self.vision["preprocess"], self.vision["tiles"]["max"])
        pixels = {"pixel_values": torch.stack([*map(transform, squares)]), "image_grid": torch.tensor([rows, columns])}
        return pixels, tile if len(squares) == 1 else ([*[*tile, True] * columns, True]) * rows + tile

    def _patches(self, image: Image.Image) -> tuple[dict[str, Tensor], list[bool]]:
        size, merge = self.vision["patch_size"], self.merge
        if self.vision["type"] == "patches":
            rows, columns = patch_grid(image.height, image.width, size * merge, self.vision["max_side"])
            tensors = {"pixel_patches": cut_patches(image, rows * merge, columns * merge, size, merge)}
        else:  # the encoder needs them in raster order
            from timm.data.naflex_transforms import get_image_size_for_seq  # other towers do without timm

            budget = self.vision["max_tokens"] // merge**2
            _, sides = get_image_size_for_seq((image.height, image.width), size * merge, budget)
            rows, columns = (side // (size * merge) for side in sides)
            patches = cut_patches(image, rows * merge, columns * merge, size, preprocess=self.vision["preprocess"])
            tensors = {"pixel_patches": patches, "image_grid": merge * torch.tensor([rows, columns])}
        return tensors, ([False] * columns + [True]) * rows

    def batch(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack the tensors of images; tiles and patches are padded at their end."""
        tensors = {key: [image[key] for image in images] for key in images[0]}
        batch = {key: nn.utils.rnn.pad_sequence(given, batch_first=True) for key, given in tensors.items()}
        if "pixel_patches" in batch:
            lengths = torch.tensor([len(patches) for patches in tensors["pixel_patches"]])
            batch["patch_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return batch

    def preprocess(self, images: Any, return_tensors: Any = "pt", **kwargs: Any) -> BatchFeature:
        """Return the tensors of one image or of several: Pillow's, arrays, paths or addresses."""
        return BatchFeature(self.batch([self.process(image)[0] for image in flat_images(images)]), return_tensors)


@cache
def open_clip_transform(preprocess: str) -> Any:
    """Make OpenCLIP's preprocessing from its settings, which are JSON."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**json.loads(preprocess)), is_train=False)


def cut_tiles(image: Image.Image, preprocess: Mapping[str, Any], most: int) -> tuple[list[Image.Image], int, int]:
    """Cut an RGB image into squares of a tower's side in reading order, then the whole image in one square.

    An image that one square holds stays as it is.

    Args:
        image: of any size.
        preprocess: the tower's, with ``size`` and ``interpolation``.
        most: how many squares an image is cut into at most.

    Returns:
        the squares, the number of rows, and the number of columns.
    """
    size, interpolation = preprocess["size"], Image.Resampling[preprocess["interpolation"].upper()]
    side = size if isinstance(size, int) else size[0]
    rows, columns = tile_grid(image.height, image.width, side, most)
    if rows * columns == 1:
        return [image], 1, 1
    large = image.resize((columns * side, rows * side), interpolation)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    squares = [large.crop((x, y, x + side, y + side)) for x, y in corners]
    return [*squares, image.resize((side, side), interpolation)], rows, columns


def tile_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Return rows and columns of the grid that keeps the most pixels of an image, of equal ones the fewest squares.

    It is LLaVA-NeXT's choice. One pixel more than a square on both sides gives four squares.
    """

    def kept(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(1, rows * side / height, columns * side / width)
        return max(1, int(scale * height)) * max(1, int(scale * width)), -rows * columns

    return max(((rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)), key=kept)


def cut_patches(
    image: Image.Image,
    rows: int,
    columns: int,
    patch_size: int,
    merge: int = 1,
    preprocess: Mapping[str, Any] | None = None,
) -> Tensor:
    """Resize an RGB image to a grid of patches, and return them in raster order.

    Args:
        image: of any size.
        rows: of patches.
        columns: of patches.
        patch_size: ``P``, side of a patch in pixels.
        merge: the patches of each block of ``merge`` x ``merge`` stand together, the blocks in raster order.
        preprocess: ``mean`` and ``std`` of each channel, in [0, 1], and ``interpolation``. Default: 0.5 and bicubic.

    Returns:
        ``[N, 3 P P]`` float32.
    """
    filter = Image.Resampling[(preprocess or {"interpolation": "bicubic"})["interpolation"].upper()]
    image = image.resize((columns * patch_size, rows * patch_size), filter)
    pixels = pil_to_tensor(image).float()  # [3, H, W]
    if preprocess is None:
        pixels.div_(127.5).sub_(1.0)
    else:
        pixels = normalize(pixels.div_(255), preprocess["mean"], preprocess["std"])
    blocks = (rows // merge, merge, patch_size, columns // merge, merge, patch_size)
    patches = pixels.reshape(3, *blocks).permute(1, 4, 2, 5, 0, 3, 6)  # [h, w, m, m, 3, P, P]
    return patches.flatten(4).flatten(0, 3)


def patch_grid(height: int, width: int, patch_size: int, max_side: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of ``height`` x ``width`` pixels.

    The longer side is rounded to the grid and capped at ``max_side``; the other keeps the aspect ratio as nearly as the
    grid allows.
    """
    long_side = max(height, width)
    target = min(max_side, max(1, round(long_side / patch_size)) * patch_size)
    rows, columns = (max(1, round(side * target / long_side / patch_size)) for side in (height, width))
    return rows, columns


def flat_images(images: Any) -> list[Image.Image]:
    """Return images in a list, nested or not, as Pillow's."""
    if isinstance(images, (list, tuple)):
        return [one for image in images for one in flat_images(image)]
    if isinstance(images, (str, Image.Image)):
        return [load_image(images)]
    pixels = np.asarray(images)  # [H, W, 3], or [3, H, W] as torch has it
    return [Image.fromarray(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels)]


PriorLVLMImageProcessor.register_for_auto_class("AutoImageProcessor")
