"""Data, tokenizer, reference and scores that cells of a study share, each in a folder named by a digest of its inputs.

Cells of the same parts get the same folders, which one process makes before any of them starts.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from composer_prior.data.storage import is_remote
from composer_prior.training.config import TrainConfig

# Of a reference's recipe: where it goes, and what is shown or saved on the way.
_NAMES = ("run_name", "run_folder", "save_folder", "progress_bar", "callbacks", "loggers", "autoresume")


class Shared(NamedTuple):
    """The inputs that a cell shares with others: overrides that set their paths, and paths that it needs to start."""

    overrides: dict[str, Any]
    places: frozenset[str]


def share(recipe: TrainConfig, given: Collection[str], folder: Path) -> Shared:
    """Return the paths of the inputs that a cell shares.

    Args:
        recipe: of the cell, as it is without this.
        given: dotted keys that the study sets; a place among them stays.
        folder: for all that is shared.
    """
    overrides: dict[str, Any] = {}

    def place(key: str, there: str, kind: str, *decided_by: Any) -> str:
        if any(f"{key}.".startswith(f"{one}.") for one in given):
            return there
        overrides[key] = str(folder / f"{kind}-{digest(*decided_by)}")
        return overrides[key]

    places: list[str] = []
    captions = _captions(recipe.train_loader["dataset"])
    data = None
    if recipe.data is not None:
        rest = {key: value for key, value in recipe.data.items() if key != "out"}
        data = place("data.out", recipe.data["out"], "data", rest)
        places.append(data)
    tokenizer = recipe.tokenizer["name"]
    if recipe.tokenizer.get("train"):
        tokenizer = place("tokenizer.name", tokenizer, "tokenizer", data, recipe.tokenizer["train"], captions)
        places.append(tokenizer)
    made: dict[str, Any] = {"data": data, "tokenizer": {**recipe.tokenizer, "name": tokenizer}}
    for model, scored in (("reference", "scores"), ("viewer", "viewer_scores")):
        config = getattr(recipe, model)
        if config is None:
            continue
        theirs = {key: value for key, value in config.items() if key not in _NAMES} | made
        if theirs.get("viewer") is None:
            theirs.pop("viewer", None)  # so that references keep the names that they had without this key
        was = config["run_folder"]
        named = f"{model}.run_name" in given
        folder_of = was if named else place(f"{model}.run_folder", was, model, theirs)
        places.append(folder_of)
        made["reference"] = folder_of  # which the viewer may start from
        for name, loader in recipe.loaders.items():
            dataset = loader.get("dataset") or {}
            scores = dataset.get(scored)
            if not scores:
                continue
            key = f"{name}.dataset.{scored}"
            if not is_remote(scores) and Path(was) in Path(scores).parents and key not in given:
                read = {one: dataset.get(one) for one in ("max_caption_tokens", "prompt", "on_bad_sample")}
                scores = overrides[key] = f"{folder_of}/scores-{digest(_captions(dataset), read)}"
            places.append(scores)
    return Shared(overrides, frozenset(places))


def digest(*parts: Any) -> str:
    """Return eight hexadecimal digits of anything that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def preparations(places: Sequence[frozenset[str]]) -> list[int | None]:
    """Return for each cell the number of the cell whose preparation makes all places that it needs, or None.

    ``places`` holds what each cell needs. The chosen cell is the first of those whose needs no other cell exceeds.
    """
    largest = [one for one in places if one and not any(one < other for other in places)]
    return [next((places.index(one) for one in largest if need <= one), None) if need else None for need in places]


def _captions(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a data set that decide its captions."""
    return {key: dataset[key] for key in ("local", "remote", "split", "streams") if dataset.get(key)}
