"""Composer's SelectiveBackprop on batches that are dicts: it keeps or drops whole samples."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from composer_prior.data.batch import ROWS
from composer_prior.models.composer_lvlm import ComposerLVLM


def selective_backprop_keys(model: ComposerLVLM) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return arguments for ``SelectiveBackprop`` that select by a sample's mean negative log-likelihood.

    It takes one tensor as the model's input. That is the numbers of the rows here, and a hook of the model puts the
    rows of the batch in their place.

    Args:
        model: the model that is trained.
    """
    selecting: dict[str, Tensor] = {}

    def numbers(batch: Mapping[str, Tensor]) -> Tensor:
        selecting.update(batch)
        return torch.arange(len(batch["labels"]), device=batch["labels"].device)

    def keep(batch: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        selecting.clear()
        return _rows(batch, chosen)

    def rows_of_numbers(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        (batch,) = arguments
        return (_rows(selecting, batch[0]),) if isinstance(batch, tuple) else arguments

    model.register_forward_pre_hook(rows_of_numbers)
    return {
        "input_key": (numbers, keep),
        "target_key": (lambda batch: batch["labels"], lambda batch, _: batch),
    }


def _rows(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    if any(key.endswith(ROWS) for key in batch):
        raise ValueError("SelectiveBackprop selects among samples of one image of one tensor each; leave it out.")
    return {key: value[rows] for key, value in batch.items()}
