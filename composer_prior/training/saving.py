"""The model folder that a run leaves."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State, Time
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.download import ATTEMPTS
from composer_prior.data.files import read_object
from composer_prior.data.messages import announce, one_line
from composer_prior.data.nodes import on_first_rank
from composer_prior.data.processing import image_placeholder
from composer_prior.data.remote import Output
from composer_prior.data.storage import StorageError, WriteError, full_disk_told, is_remote
from composer_prior.data.tokenizer import tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.language import causal_lm_of
from composer_prior.models.model_folder import save_model_folder
from composer_prior.models.prior_lvlm import PriorLVLMForConditionalGeneration
from composer_prior.reports.closing import validation_metrics
from composer_prior.training.checkpoints.loading import ARCHITECTURE
from composer_prior.training.config import TrainConfig, written
from composer_prior.training.finite import check_weights
from composer_prior.training.reference import metadata_file, model_folder, model_metadata


def save_architecture(recipe: TrainConfig, model: ComposerLVLM) -> None:
    """Write what a checkpoint of the run lacks to be a model: configuration, tokenizer, processor. Rank 0 does."""
    if dist.get_global_rank() != 0:
        return
    try:
        folder = Path(recipe.run_folder, ARCHITECTURE)
        save_model_folder(model.model, model.processor, folder, None)
    except ValueError as error:
        announce(f"Model: the run will leave checkpoints alone, as {one_line(error)}.")


def save_model(
    recipe: TrainConfig, model: ComposerLVLM, data: Any, validation: Mapping[str, float], out: str | None = None
) -> None:
    """Write the model in Hugging Face format, with a card of what it was made from; the folder is whole or not there.

    A model without a vision tower is written as a reference. Every rank calls it, since the weights may be sharded
    among them; rank 0 writes.

    Args:
        recipe: of the run.
        model: to be written.
        data: the training data, a :class:`.StreamingCaptionDataset`.
        validation: metrics.
        out: folder or remote. Default: ``model`` in the run's folder.
    """
    out = out or str(model_folder(recipe))
    check_weights(model, f"{out} is not written")
    architecture = Path(recipe.run_folder, ARCHITECTURE, "config.json")
    if not model.reads_text_alone and not on_first_rank(architecture.is_file):
        return  # the run has said why
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(model.model, options=options)
    if dist.get_global_rank() != 0:
        return
    try:
        size = sum(tensor.nbytes for tensor in weights.values())
        with full_disk_told(out, size), tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model") if is_remote(out) else Path(out)
            about = (recipe, model, data.fingerprint, validation)
            files = {metadata_file(recipe).name: model_metadata(*about)}
            if not model.reads_text_alone:
                files["README.md"] = model_card(*about)
            save_model_folder(model.model, model.processor, folder, weights, files)
            if is_remote(out):
                Output(out, Path(temporary), ATTEMPTS).publish(folder, sorted(os.listdir(folder)))
    except (ValueError, OSError, StorageError) as error:
        needed = model.reads_text_alone or isinstance(error, WriteError)
        if needed and out == str(model_folder(recipe)):
            raise  # the run's end; on the way it goes on without
        announce(f"Model: {out} was not written: {one_line(error)}.")


class HuggingFaceCheckpointer(Callback):
    """Write the model in Hugging Face format during training, without the optimizer's state (LLM Foundry's name).

    Args:
        recipe: of the run.
        interval: how often, such as ``1000ba`` or ``1ep``.
        save_folder: folder or remote; each model goes to ``ba{batch}`` in it. Default: ``huggingface`` in the run's
            folder.
    """

    def __init__(self, recipe: TrainConfig, interval: str | Time, save_folder: str | None = None):
        self.recipe = recipe
        self.save_folder = save_folder
        self._is_due = create_interval_scheduler(interval, include_end_of_training=False)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Write a model when the interval says so."""
        if event not in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) or not self._is_due(state, event):
            return
        model: Any = unwrapped(state.model)
        data = state.train_dataloader.dataset  # type: ignore[union-attr]
        folder = self.save_folder or os.path.join(self.recipe.run_folder, "huggingface")
        out = f"{folder.rstrip('/')}/ba{state.timestamp.batch.value}"
        save_model(self.recipe, model, data, validation_metrics(state), out)


def model_card(recipe: TrainConfig, model: ComposerLVLM, data: str, validation: Mapping[str, float]) -> str:
    """Return the text of the folder's ``README.md``."""
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in validation.items())
    used = {key: value for key, value in written(recipe).items() if value not in (None, {}, [])}
    file = Path((recipe.data or {}).get("out", "."), "recipe.json")
    known: Any = read_object(file) if recipe.data and file.is_file() else {}
    said, allowed = "It is a model of `transformers`, which needs no code of composer-prior:", ""
    if isinstance(causal_lm_of(model.model), PriorLVLMForConditionalGeneration):
        said = "Without composer-prior, `transformers` runs the code in this folder if you allow it:"
        allowed = ", trust_remote_code=True"
    text = image_placeholder(model.processor) + recipe.train_loader["dataset"].get("prompt", "")
    licence = known.get("licence", "not stated; it is that of the images and captions")
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [prior, composer, captioning]
---
# {recipe.run_name}

A vision-language model that captions images, trained with composer-prior.

```python
from composer_prior import load
from PIL import Image

model = load("path/of/this/folder")
print(model.generate_captions([Image.open("photo.jpg")]))
```

{said}

```python
from transformers import pipeline

captioner = pipeline("image-text-to-text", "path/of/this/folder"{allowed})
print(captioner(images="photo.jpg", text={text!r}))
```

| validation | value |
| --- | --- |
{metrics or "| none | |"}

- Training data: fingerprint `{data}`; licence: {licence}.
- Tokenizer: fingerprint `{tokenizer_fingerprint(model.tokenizer)}`.

## Recipe

```yaml
{OmegaConf.to_yaml(OmegaConf.create(used)).strip()}
```
"""
