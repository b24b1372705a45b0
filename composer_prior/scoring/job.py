"""The arguments of a scoring job."""

import os
from dataclasses import dataclass
from typing import Any, get_args

UNIT_SAMPLES = 4096
BESIDE_RECIPE = ("out", "loader", "batch_tokens", "unit_samples", "dtype")  # options of a job with a recipe


@dataclass(frozen=True)
class ScoreJob:
    """The arguments of a scoring job.

    Args:
        out: folder, which may begin with ``~``, or URL for the scores.
        reference: folder or hub id of a Hugging Face causal language model.
        tokenizer: of the model to be trained, ``name`` and ``kwargs`` as in a recipe.
        dataset: as in a recipe's ``train_loader.dataset``, such as ``local``, ``remote`` and ``max_caption_tokens``.
        batch_tokens: tokens of one forward pass, padding included; by default, chosen for the device.
        unit_samples: samples that are sorted by length, scored and written together.
        dtype: of the reference's weights and computation, ``float32``, ``bfloat16`` or ``float16``; by default that of
            its files, but float32 without a GPU.
        trust_remote_code: run code that comes with the reference.
        progress_bar: show one on the first rank.
    """

    out: str
    reference: str
    tokenizer: dict[str, Any]
    dataset: dict[str, Any]
    batch_tokens: int | None = None
    unit_samples: int = UNIT_SAMPLES
    dtype: str | None = None
    trust_remote_code: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        """Raise for impossible values."""
        from composer_prior.models.reference import Dtype  # here, so that the command's help comes without torch

        for name, value in (("batch_tokens", self.batch_tokens), ("unit_samples", self.unit_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if self.dtype not in (None, *get_args(Dtype)):
            raise ValueError(f"dtype={self.dtype}: expected one of {', '.join(get_args(Dtype))}.")
        object.__setattr__(self, "out", os.path.expanduser(self.out))
