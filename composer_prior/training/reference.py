"""The reference and the viewer that a recipe names: where they are, what they were made from, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit

from composer_prior import registry
from composer_prior.data.files import read_object
from composer_prior.data.scores import METADATA
from composer_prior.data.tokenizer import build_tokenizer, tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.training.config import TrainConfig, identified

# These keys decide which model a recipe makes. A model that was made with other values is refused.
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
    "algorithms",
)


def sees_images(model: Mapping[str, Any]) -> bool:
    """Return True if a recipe's ``model`` has a vision tower."""
    return bool(model.get("vision")) or model["name"] == "hugging_face"


def model_folder(recipe: TrainConfig) -> Path:
    """Return the folder of a run's model in Hugging Face format."""
    return Path(recipe.run_folder) / "model"


def metadata_file(recipe: TrainConfig) -> Path:
    """Return the path of the metadata of a run's model, which is written with it."""
    return model_folder(recipe) / ("training.json" if sees_images(recipe.model) else "reference.json")


def model_metadata(recipe: TrainConfig, model: ComposerLVLM, data: str, validation: Mapping[str, float]) -> str:
    """Return the metadata of a model: fingerprints of ``data`` and tokenizer, recipe and metrics."""
    metadata = {
        "data": data,
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "recipe": identified(recipe, _IDENTITY),
        "validation": validation,
        "reference": _reference_of(recipe),
        "packing_ratio": recipe.train_loader["dataset"].get("packing_ratio"),
    }
    return json.dumps(metadata, indent=2)


def _reference_of(recipe: TrainConfig) -> dict[str, Any] | None:
    """Return the validation metrics of a recipe's reference, which tell it from one that was trained anew."""
    metadata = None if recipe.reference_recipe is None else read_metadata(recipe.reference_recipe)
    return None if metadata is None else metadata["validation"]


def read_metadata(recipe: TrainConfig) -> dict[str, Any] | None:
    """Read the metadata of a run's model, or None if the run is not finished."""
    path = metadata_file(recipe)
    return read_object(path) if path.is_file() else None


def check_helper(recipe: TrainConfig, key: str, data: str | None = None) -> None:
    """Refuse a reference or viewer made from other data, another tokenizer or another recipe than the run's.

    The fingerprint of the run's training ``data`` is given once it is known.

    Raises:
        ValueError: naming what differs.
    """
    helper = recipe.helpers[key]
    metadata = read_metadata(helper)
    assert metadata is not None
    known = metadata["recipe"]
    told = identified(helper, [name for name in _IDENTITY if name in known])  # an older version wrote fewer
    folder = model_folder(helper)
    remedy = f"Delete {folder.parent} to train it again, or set {key}.run_name."
    changed = [name for name in told if known.get(name) != told[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The {key} in {folder} was made with other values of {', '.join(changed)} than the recipe's "
            f"({name}: {known.get(name)} there, {told[name]} here). {remedy}"
        )
    if metadata["tokenizer"] != tokenizer_fingerprint(build_tokenizer(recipe.tokenizer)):
        raise ValueError(f"The {key} in {folder} was made with another tokenizer than the run's. {remedy}")
    if metadata.get("reference") != _reference_of(helper) and "reference" in metadata:
        raise ValueError(f"The {key} in {folder} was made with another reference than the run's. {remedy}")
    if data is not None and metadata["data"] != data:
        raise ValueError(f"The {key} in {folder} was made from other data than the run's. {remedy}")


def reference_of(recipe: TrainConfig) -> str | None:
    """Return the folder of a recipe's own reference, or the folder or hub id that its algorithms name, or None."""
    if recipe.reference_recipe is not None:
        return str(model_folder(recipe.reference_recipe))
    named = {given["reference"] for given in recipe.algorithms.values() if (given or {}).get("reference")}
    if len(named) > 1:
        raise ValueError(f"The algorithms name {len(named)} references, {', '.join(sorted(named))}: give one.")
    return next(iter(named), None)


def viewer_of(recipe: TrainConfig) -> str | None:
    """Return the folder or hub id of the viewer that a recipe's algorithms name, or of its own, or None."""
    named = [given["viewer"] for given in recipe.algorithms.values() if (given or {}).get("viewer")]
    named += [str(model_folder(recipe.helpers["viewer"]))] if "viewer" in recipe.helpers else []
    return named[0] if named else None


def compared_with(recipe: TrainConfig) -> list[str]:
    """Return what a recipe's algorithms compare a viewer with, ``reference`` or ``model``; none where none has one."""
    found = []
    for name, given in recipe.algorithms.items():
        constructor = registry.look_up("algorithm", name, f"algorithms.{name}")
        if given is not None and all(registry.takes(constructor, key) for key in ("viewer", "reference")):
            found.append(given.get("over", "reference"))
    return found


def short_viewer(recipe: TrainConfig, viewer: str | None = None) -> str:
    """Return a warning if a viewer is trained on fewer samples than the run that it serves; "" if not, or if unknown.

    Args:
        recipe: of the run.
        viewer: folder or hub id. Default: that of the recipe, or of its stored scores.
    """
    scores = recipe.train_loader["dataset"].get("viewer_scores")
    viewer = viewer or viewer_of(recipe)
    if viewer is None and scores and Path(scores, METADATA).is_file():
        viewer = read_object(Path(scores, METADATA))["reference"]["path"]
    if viewer is None or not compared_with(recipe):
        return ""
    card, own, theirs = Path(viewer, "training.json"), recipe.helpers.get("viewer"), dict[str, Any]()
    ratio: Any = None
    if own is not None and card.parent == model_folder(own):
        theirs, ratio = vars(own), own.train_loader["dataset"].get("packing_ratio")
    elif card.is_file():
        known = read_object(card)
        theirs, ratio = known.get("recipe") or {}, known.get("packing_ratio")
    if not {"max_duration", "global_train_batch_size"} <= {*theirs}:
        return ""
    seen, needed = _samples(theirs, ratio), _samples(vars(recipe), recipe.train_loader["dataset"].get("packing_ratio"))
    if seen is None or needed is None or seen >= needed:
        return ""
    return (
        f"Warning: the viewer {viewer} is trained on {seen:,} samples, fewer than the {needed:,} of this run: tokens "
        "that it has not learned get little weight. Train it longer, or name another viewer."
    )


def _samples(keys: Mapping[str, Any], ratio: float | str | None) -> int | None:
    """Return the number of samples that a recipe trains on, or None if unknown.

    The samples of epochs depend on the data, and so do those of rows with the ``packing_ratio`` ``"auto"``.
    """
    length, each = Time.from_timestring(keys["max_duration"]), ratio or 1
    if isinstance(each, str) or length.unit not in (TimeUnit.BATCH, TimeUnit.SAMPLE):
        return None
    return int(length.value * each * (keys["global_train_batch_size"] if length.unit == TimeUnit.BATCH else 1))
