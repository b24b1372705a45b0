"""Batches: their images, collation, token counts and microbatches.

A batch is a dict of tensors with Hugging Face's names, every per-token tensor aligned with ``labels``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

IGNORE_INDEX = -100
IMAGE, ROW_SEPARATOR = 0, 1
LOGPROBS = ("ref_logprobs", "viewer_logprobs")  # stored log-probabilities of tokens: of the reference, of the viewer
PROCESSED = "processed"  # the tensors of a processor of transformers in a sample
IMAGES = "images"  # the tensors of each image of a sample that may have any number of them
TENSORS = ("pixel_values", "pixel_patches", "image_grid")  # of an image
ROW = "row"  # the number of the packed row that a sample is in, ``[B]`` int64
ROWS = "_rows"  # end of the key that says how many rows of a tensor each sample has
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


@dataclass(frozen=True)
class ImageInputs:
    """A processed image: the tensors of its batch entry, and the kind of each of its positions in the text sequence.

    A processor of transformers writes all that stands before the caption, the prompt included.
    """

    tensors: dict[str, Any]
    layout: list[int]  # IMAGE or ROW_SEPARATOR, one per position; empty beside a prefix
    prefix: dict[str, list[Any]] | None = None  # ``input_ids`` before the caption, and what is aligned with them
    following: Mapping[str, Any] = field(default_factory=dict)  # what is aligned with the tokens of a caption; else 0


def stack_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batch the tensors of processed images, padded where they differ in length; ``pixel_patches`` get a mask."""
    batch = {}
    for key in images[0] if images else ():
        tensors = [image[key] for image in images]
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        same = bool((lengths == lengths[0]).all())
        # In a loader's worker, default_collate writes to shared memory, which saves a copy.
        batch[key] = default_collate(tensors) if same else pad_sequence(tensors, batch_first=True)
        if key == "pixel_patches":
            batch["patch_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


def has_images(batch: Mapping[str, Any]) -> bool:
    """Return True if a batch has tensors of any image."""
    return any("pixel" in key and not key.endswith(ROWS) and len(batch[key]) > 0 for key in batch)


def join_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batch what a processor of transformers makes of each image: the rows of all, one image after the other.

    Rows of unlike shapes are padded with zeros, as the processors pad theirs. Where a tensor does not have one row for
    each sample, as of tiles or of patches, ``{key}_rows`` (``[B]`` int64) says how many are whose.
    """
    batch = {}
    for key in dict.fromkeys(key for image in images for key in image):
        given = [image[key] for image in images if key in image]
        shape = [max(sides) for sides in zip(*(tensor.shape[1:] for tensor in given), strict=True)]
        parts = [_padded(tensor, shape) for tensor in given]
        rows = torch.tensor([len(image[key]) if key in image else 0 for image in images])
        if bool((rows == 1).all()):
            batch[key] = default_collate([part[0] for part in parts])  # as in stack_images
        else:
            batch |= {key: torch.cat(parts), key + ROWS: rows}
    return batch


def _padded(part: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [n - own for n, own in zip(shape, part.shape[1:], strict=True)]
    return pad(part, [n for end in reversed(missing) for n in (0, end)]) if any(missing) else part


@dataclass(frozen=True)
class CaptionCollator:
    """Make a batch of samples: sequences padded at the end, images stacked.

    Args:
        pad_token_id: fills ``input_ids``; attention and loss ignore it.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        fills |= dict.fromkeys(("image_related", "text_mask", "token_type_ids", "mm_token_type_ids"), 0)
        fills |= dict.fromkeys(LOGPROBS, 0)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch = {
            key: pad_sequence([s[key] for s in samples], batch_first=True, padding_value=fill)
            for key, fill in fills.items()
            if key in samples[0]
        }
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if PROCESSED in samples[0]:
            batch.update(join_images([sample[PROCESSED] for sample in samples]))
        else:
            images = [sample.get(IMAGES) or [sample] * (IMAGES not in sample) for sample in samples]
            batch.update(self._stacked(images))
        for key in ("sample_id", "stream"):
            if key in samples[0]:
                batch[key] = torch.tensor([sample[key] for sample in samples])
        return batch

    @staticmethod
    def _stacked(images: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
        """Stack the images of each sample; ``{key}_rows`` say whose they are where a sample has not exactly one."""
        every = [image for some in images for image in some]
        keys = [key for key in TENSORS if every and key in every[0]]
        batch = stack_images([{key: image[key] for key in keys} for image in every])
        if any(len(some) != 1 for some in images):
            rows = torch.tensor([len(some) for some in images])
            batch |= {key + ROWS: rows for key in batch}
        return batch


@dataclass(frozen=True)
class ScoresCollator:
    """A collator for samples that may have ``ref_logprobs`` or ``viewer_logprobs``, a number for each label in order.

    Args:
        collator: makes a batch of the rest, with ``labels`` ``[B, T]``. The batch gets each of them as ``[B, T]``
            float32, 0 where there is no label.

    Raises:
        ValueError: if a sample has more or fewer of them than labels.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> Any:
        stored = [key for key in LOGPROBS if isinstance(samples[0], Mapping) and key in samples[0]]
        if not stored:
            return self.collator(list(samples))
        batch = self.collator([{k: value for k, value in sample.items() if k not in stored} for sample in samples])
        mask = batch["labels"] != IGNORE_INDEX
        for key in stored:
            scores = [torch.as_tensor(sample[key], dtype=torch.float32) for sample in samples]
            for row, (values, count) in enumerate(zip(scores, mask.sum(1).tolist(), strict=True)):
                if len(values) != count:
                    raise ValueError(
                        f"Row {row} of a batch has {len(values)} stored {key} for {count} labels: "
                        "score the data with the tokenizer, prompt and lengths that they are trained with."
                    )
            batch[key] = torch.zeros(mask.shape).masked_scatter(mask, torch.cat(scores))
        return batch


def loss_mask(batch: Any, name: str) -> Tensor:
    """Return ``[B, T]`` bool, True on the loss-generating tokens of a batch.

    Args:
        batch: a dict with ``labels``.
        name: of the caller, for the error.

    Raises:
        ValueError: if it is not such a dict.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        got = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name} needs a batch that is a dict with `labels` [B, T], -100 where there is none; got {got}."
        )
    return batch["labels"] != IGNORE_INDEX


def sample_ids(batch: Mapping[str, Any], name: str) -> Tensor:
    """Return ``sample_id`` of a batch, ``[B]`` int64.

    Args:
        batch: a dict.
        name: of the caller, for the error.

    Raises:
        ValueError: if the batch does not say which samples it has.
    """
    if "sample_id" not in batch:
        raise ValueError(
            f"{name} needs `sample_id` [B] in the batch, so that nothing depends on how the batch is cut: read the "
            "data with StreamingCaptionDataset, or number the samples."
        )
    return batch["sample_id"]


def stream_names(loader: Any) -> list[str]:
    """Return the names of the streams that a loader's data set mixes, ``stream`` in a batch; none if it names none.

    Args:
        loader: with a ``dataset``, such as a :class:`.CheckedDataset`.
    """
    return [*getattr(getattr(loader, "dataset", None), "stream_names", ())]


def stream_masks(batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return for the name of each stream which samples of a batch it has, ``[B, 1]`` bool.

    Args:
        batch: with ``stream`` ``[B]`` int64 where there are several.
        names: of :func:`stream_names`.
    """
    stream = batch["stream"] if len(names) > 1 else torch.zeros_like(batch["labels"][:, 0])
    return {name: (stream == number)[:, None] for number, name in enumerate(names)}


# Composer divides by the tokens of a step over all ranks. If no sample could be used, this makes the loss 0 instead of
# 0 / 0; beside any real token it is lost in rounding.
NO_TOKENS = 1e-9


def count_tokens(batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Count the tokens of a batch: ``total`` without padding, and ``loss_generating``, which is never exactly 0.

    The latter is always a float, as the ranks add theirs up as tensors of one type.
    """
    counts = torch.stack([batch["attention_mask"].sum(), (batch["labels"] != IGNORE_INDEX).sum()])
    total, labelled = counts.tolist()  # together: Composer asks on an accelerator, for which the host waits
    return {"total": total, "loss_generating": float(labelled) or NO_TOKENS}


def split_packed_images(batch: Mapping[str, Any], microbatch_size: int | float) -> list[dict[str, Any]]:
    """Split a batch; also one of Qwen2-VL, whose ``pixel_values`` are the patches of all images one after the other.

    Give it to Composer as ``DataSpec(..., split_batch=split_packed_images)``; its default would cut the patches of
    images anywhere, and warns of each tensor of a batch that is not larger than a microbatch.

    Args:
        batch: where images are packed, with ``image_grid_thw`` ``[B, 3]`` int64, the patches of each image along time,
            height and width, and ``pixel_values`` ``[n, D]``, ``n`` the sum of their products; likewise videos. One
            image for each sample. Other tensors whose rows are not one for each sample come with ``{key}_rows``, see
            :func:`join_images`.
        microbatch_size: samples in a microbatch, or rows where the samples say which ``row`` they are in.

    Raises:
        ValueError: if images and samples differ in number, or patches and grids do.
    """
    from composer.core.data_spec import default_split_batch  # here: models work without Composer

    samples = len(batch["input_ids"])
    microbatch_size = min(microbatch_size, samples)
    packed = {name: grid_name for name, grid_name in _GRIDS.items() if grid_name in batch and name in batch}
    packed |= {name.removesuffix(ROWS): name for name in batch if name.endswith(ROWS)}
    rest = {key: value for key, value in batch.items() if key not in packed}
    for name in packed.values():
        if len(batch[name]) != samples:
            raise ValueError(
                f"{name} has {len(batch[name])} rows for {samples} samples: split_packed_images needs one for each."
            )
    if ROW in batch:
        counts = batch[ROW].unique_consecutive(return_counts=True)[1].split(int(microbatch_size))
        cut = {key: value.split([int(part.sum()) for part in counts]) for key, value in rest.items()}
        microbatches = [{key: parts[number] for key, parts in cut.items()} for number in range(len(counts))]
    else:
        microbatches = [dict(part) for part in default_split_batch(rest, microbatch_size)]
    for name, counted_by in packed.items():
        # The rows of each sample themselves, or the sides of its grid of patches.
        counts = [int(part[counted_by].reshape(len(part[counted_by]), -1).prod(1).sum()) for part in microbatches]
        for part, patches in zip(microbatches, _split(batch[name], counts, counted_by), strict=True):
            part[name] = patches
    return microbatches


def _split(patches: Tensor, counts: list[int], counted_by: str) -> tuple[Tensor, ...]:
    if sum(counts) != len(patches):
        raise ValueError(f"{counted_by} stands for {sum(counts)} patches, but there are {len(patches)}.")
    return patches.split(counts)
