"""Write a trained model in the format of another library: ``composer-prior export MODEL OUT format=llava``."""

from pathlib import Path
from typing import Any

from composer_prior.data.locks import sole_writer
from composer_prior.registry import did_you_mean

FORMATS = ("llava",)


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "llava",
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model and write it in another format; the result is compared with the model first.

    Args:
        model: a run folder, a model folder, a checkpoint of a run, or a hub id.
        out: the folder to write.
        format: ``llava``: ``LlavaForConditionalGeneration`` of transformers, with no code of ours.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``. Default: the model's own.
        overwrite: replace a folder that an earlier export has written.
        trust_remote_code: run code that comes with the language model.

    Returns:
        What was measured, see :class:`.LlavaReport`.

    Raises:
        ValueError, OSError: one line, naming what is wrong.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} is not known: {', '.join(FORMATS)}. {did_you_mean(format, FORMATS)}")
    from composer_prior.inference.loading import load
    from composer_prior.models.llava import check_output, export_llava  # here: help and errors come before torch

    check_output(Path(out).expanduser(), dtype, overwrite)
    with sole_writer(out, "out"):
        return export_llava(load(model, trust_remote_code), out, dtype=dtype, overwrite=overwrite)
