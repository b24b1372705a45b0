"""The loaders of a recipe."""

from collections.abc import Mapping
from typing import Any

from composer.core import DataSpec
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from composer_prior.data.captions import StreamingCaptionDataset, caption_data_spec
from composer_prior.training.config import TrainConfig
from composer_prior.training.errors import one_line_errors


def build_loaders(recipe: TrainConfig, model: Any, scores: bool = True, where: str = "") -> dict[str, Any]:
    """Build the loaders of a recipe, ``train`` and, where it has one, ``eval``.

    Args:
        recipe: of the run.
        model: whose tokenizer and image processor they use.
        scores: let samples carry the stored scores that the recipe names.
        where: prefix of the recipe's keys, for messages.
    """
    batch_sizes = {
        "train": per_rank_batch_size(recipe.global_train_batch_size),
        "eval": recipe.device_eval_batch_size,
    }
    loaders = {}
    for name, batch_size in batch_sizes.items():
        config = getattr(recipe, f"{name}_loader")
        if config is not None:
            dataset = config["dataset"] if scores else {**config["dataset"], "scores": None}
            with one_line_errors(f"{where}{name}_loader"):
                loaders[name] = build_loader(
                    {**config, "dataset": dataset},
                    model.tokenizer,
                    getattr(model, "image_processor", None),
                    batch_size,
                    shuffle_seed=recipe.seed,
                    drop_last=name == "train",
                )
    return loaders


def build_loader(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    batch_size: int,
    shuffle_seed: int,
    drop_last: bool,
) -> DataSpec:
    """Build the loader of a recipe: ``dataset`` and arguments of torch's DataLoader.

    Args:
        config: the recipe's ``train_loader`` or ``eval_loader``.
        tokenizer: the tokenizer of the model.
        image_processor: the image processor of the model.
        batch_size: samples per rank.
        shuffle_seed: for a recipe that gives none.
        drop_last: leave out a last batch that is not full, unless the recipe says otherwise.
    """
    arguments = {"shuffle_seed": shuffle_seed, **config["dataset"]}
    dataset = StreamingCaptionDataset(
        tokenizer=tokenizer, image_processor=image_processor, batch_size=batch_size, **arguments
    )
    loader = {"drop_last": drop_last, **{key: value for key, value in config.items() if key != "dataset"}}
    return caption_data_spec(dataset, batch_size, **loader)


def per_rank_batch_size(global_batch_size: int, where: str = "") -> int:
    """Return the samples per rank of a step; raise if the ranks cannot share them evenly."""
    ranks = dist.get_world_size()
    if global_batch_size % ranks:
        raise ValueError(
            f"{where}global_train_batch_size={global_batch_size} cannot be shared evenly by {ranks} ranks."
        )
    return global_batch_size // ranks
