"""The text-only reference that a recipe names: where it lies, what it was made from, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_prior.data.files import read_object
from composer_prior.data.tokenizer import build_tokenizer, tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.training.config import TrainConfig, identified

REFERENCE_METADATA = "reference.json"
# What decides which model a recipe makes; a reference made with other values is not the one that a recipe asks for.
_IDENTITY = (
    "seed",
    "max_duration",
    "global_train_batch_size",
    "data",
    "tokenizer",
    "model",
    "optimizer",
    "scheduler",
    "init_from",
)


def model_folder(recipe: TrainConfig) -> Path:
    """Return the folder of a run's model in Hugging Face format."""
    return Path(recipe.run_folder) / "model"


def reference_metadata(recipe: TrainConfig, model: ComposerLVLM, data: str, validation: Mapping[str, float]) -> str:
    """Return the metadata file of a reference: fingerprints of ``data`` and tokenizer, recipe and metrics."""
    metadata = {
        "data": data,
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "recipe": identified(recipe, _IDENTITY),
        "validation": validation,
    }
    return json.dumps(metadata, indent=2)


def read_reference_metadata(reference: TrainConfig) -> dict[str, Any] | None:
    """Read the metadata of the reference of a recipe, or None if the reference is not finished."""
    path = model_folder(reference) / REFERENCE_METADATA
    return read_object(path) if path.is_file() else None


def check_reference(recipe: TrainConfig, data: str | None = None) -> None:
    """Refuse a reference made from other data, another tokenizer or another recipe than the run's, naming what differs.

    The fingerprint of the run's training ``data`` is given once it is known.
    """
    reference = recipe.reference_recipe
    assert reference is not None
    told, metadata = identified(reference, _IDENTITY), read_reference_metadata(reference)
    assert metadata is not None
    folder = model_folder(reference)
    remedy = f"Delete {folder.parent} to train it again, or set reference.run_name."
    changed = [key for key in told if metadata["recipe"].get(key) != told[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"The reference in {folder} was made with other values of {', '.join(changed)} than the recipe's "
            f"({key}: {metadata['recipe'].get(key)} there, {told[key]} here). {remedy}"
        )
    if metadata["tokenizer"] != tokenizer_fingerprint(build_tokenizer(recipe.tokenizer)):
        raise ValueError(f"The reference in {folder} was made with another tokenizer than the run's. {remedy}")
    if data is not None and metadata["data"] != data:
        raise ValueError(f"The reference in {folder} was made from other data than the run's. {remedy}")
