"""The arguments of a scoring job."""

import os
from dataclasses import dataclass, field
from typing import Any, cast, get_args

UNIT_SAMPLES = 4096
# Options of a job with a recipe.
BESIDE_RECIPE = ("out", "loader", "viewer", "batch_tokens", "unit_samples", "dtype", "push_to_hub")


@dataclass(frozen=True)
class ScoreJob:
    """The arguments of a scoring job.

    Args:
        out: folder, which may begin with ``~``, or URL for the scores.
        reference: folder or hub id of a Hugging Face causal language model. With a viewer, none is needed.
        tokenizer: of the model to be trained, ``name`` and ``kwargs`` as in a recipe.
        dataset: as in a recipe's ``train_loader.dataset``, such as ``local``, ``remote`` and ``max_caption_tokens``.
        batch_tokens: tokens of one forward pass, padding included; by default, chosen for the device.
        unit_samples: samples that are sorted by length, scored and written together.
        dtype: of the model's weights and computation, ``float32``, ``bfloat16`` or ``float16``; by default that of
            its files, but float32 without a GPU.
        trust_remote_code: run code that comes with the model.
        progress_bar: show one on the first rank.
        viewer: folder or hub id of an image-text-to-text model, which scores captions beside their images in the place
            of the reference.
        push_to_hub: ``USER/NAME``, a data set of the Hub that the scores are uploaded to; a new one is private.
    """

    out: str
    reference: str | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None
    unit_samples: int = UNIT_SAMPLES
    dtype: str | None = None
    trust_remote_code: bool = False
    progress_bar: bool = True
    viewer: str | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        """Raise for impossible values."""
        from composer_prior.models.reference import Dtype  # here, so that the command's help comes without torch

        for name, value in (("batch_tokens", self.batch_tokens), ("unit_samples", self.unit_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if (self.reference is None) == (self.viewer is None):
            raise ValueError("Give a reference, or a viewer in its place.")
        if self.dtype not in (None, *get_args(Dtype)):
            raise ValueError(f"dtype={self.dtype}: expected one of {', '.join(get_args(Dtype))}.")
        object.__setattr__(self, "out", os.path.expanduser(self.out))

    @property
    def model(self) -> str:
        """The folder or hub id of the model that scores."""
        return cast(str, self.viewer if self.reference is None else self.reference)
