"""Microbatches of batches whose images do not lie along the first dimension."""

from collections.abc import Mapping
from typing import Any

from composer.core.data_spec import default_split_batch
from torch import Tensor

_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def split_packed_images(batch: Mapping[str, Any], microbatch_size: int | float) -> list[dict[str, Any]]:
    """Split a batch of Qwen2-VL, whose ``pixel_values`` are the patches of all images one after the other.

    Give it to Composer as ``DataSpec(..., split_batch=split_packed_images)``; its default would cut the patches of
    images anywhere.

    Args:
        batch: with ``image_grid_thw`` ``[B, 3]`` int64, the patches of each image along time, height and width, and
            ``pixel_values`` ``[n, D]``, ``n`` the sum of their products; likewise videos. One image for each sample.
        microbatch_size: samples in a microbatch.

    Raises:
        ValueError: if images and samples differ in number, or patches and grids do.
    """
    samples = len(batch["input_ids"])
    rest = {key: value for key, value in batch.items() if key not in _GRIDS}
    for name in _GRIDS.values():
        if name in batch and len(batch[name]) != samples:
            raise ValueError(
                f"{name} has {len(batch[name])} rows for {samples} samples: split_packed_images needs one for each."
            )
    microbatches = [dict(part) for part in default_split_batch(rest, microbatch_size)]
    for name, grid_name in _GRIDS.items():
        if name in batch:
            counts = [int(part[grid_name].prod(1).sum()) for part in microbatches]
            for part, patches in zip(microbatches, _split(batch[name], counts, grid_name), strict=True):
                part[name] = patches
    return microbatches


def _split(patches: Tensor, counts: list[int], grid_name: str) -> tuple[Tensor, ...]:
    if sum(counts) != len(patches):
        raise ValueError(f"{grid_name} stands for {sum(counts)} patches, but there are {len(patches)}.")
    return patches.split(counts)
