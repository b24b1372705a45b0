"""Load a trained model to use it."""

from pathlib import Path

import torch

from composer_prior.models.image_text_model import ImageTextModel


def load(path: str | Path, trust_remote_code: bool = False) -> ImageTextModel:
    """Load a trained model with its processor, in evaluation mode.

    Args:
        path: a run folder, a checkpoint of a run, or the model folder or hub id of any image-text-to-text model.
        trust_remote_code: run code that comes with the model. Default: ``False``.

    Raises:
        ModelFolderError: one line, naming what is wrong.
    """
    place = Path(path).expanduser()
    if (place / "config.json").is_file() or not place.exists():
        return ImageTextModel.from_pretrained(path, trust_remote_code)
    if (place / "model" / "config.json").is_file():
        return load(place / "model", trust_remote_code)
    from composer_prior.training.checkpoints.loading import load_checkpoint  # here: it alone needs Composer

    return load_checkpoint(place, trust_remote_code)


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have, before a model is loaded."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # "meta" holds no values
        why = str(error).partition("\n")[0].partition(". Please")[0][:200]
        raise ValueError(f"device={device} cannot be used here: {why}; leave it out for what there is.") from error
