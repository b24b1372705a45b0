"""What a run prints at its end."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from composer import Trainer
from composer.core import State
from streaming import StreamingDataset
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from composer_prior.data.captions import StreamingCaptionDataset, decode_image
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.training.config import TrainConfig
from composer_prior.training.prepare import announce, model_folder, read_card

_COLUMNS = {"all": "", "image-related": "_image_related", "other": "_other"}


def validation_metrics(state: State) -> dict[str, float]:
    """The last evaluation's metrics by name."""
    metrics = state.eval_metrics.get("eval", {})
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def closing_report(recipe: TrainConfig, trainer: Trainer) -> None:
    """Print validation loss and accuracy beside the reference's, captions of a few images, and where things are."""
    rows = {recipe.run_name: validation_metrics(trainer.state)}  # on every rank: it adds up what the ranks counted
    reference = TrainConfig(**recipe.reference) if recipe.reference is not None else None
    card = read_card(reference) if reference is not None else None
    if reference is not None and card is not None:
        rows = {f"{reference.run_name} (text only)": card["validation"], **rows}
    announce(metrics_table(rows))
    model = composer_model(trainer)
    if isinstance(model, ComposerLVLM) and model.model.vision is not None and trainer.state.evaluators:
        data = trainer.state.evaluators[0].dataloader.dataloader.dataset  # type: ignore[union-attr]
        with unsharded(model):  # on every rank: gathering the weights takes all of them
            announce(caption_samples(model, data, recipe.sample_captions))
    announce(_places(recipe, trainer))


def composer_model(trainer: Trainer) -> torch.nn.Module:
    """The model that was given to the Trainer, without DDP around it."""
    model = trainer.state.model
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Hold the whole weights of a model that FSDP2 shards, to use it outside its forward pass."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Validation loss (nats per token) and accuracy over all, image-related and other tokens, one line per model."""
    width = max(map(len, [*rows, "validation"]))
    header = "  ".join(f"{name:>21}" for name in _COLUMNS)
    lines = [f"{'validation':{width}}  {header}", f"{'':{width}}  " + "  ".join([f"{'loss':>10} {'accuracy':>10}"] * 3)]
    for name, metrics in rows.items():
        cells = []
        for suffix in _COLUMNS.values():
            values = [metrics.get(f"{value}{suffix}") for value in ("loss", "accuracy")]
            cells.append(" ".join(f"{value:10.4f}" if value is not None else f"{'-':>10}" for value in values))
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n" + "\n".join(lines)


def caption_samples(model: ComposerLVLM, data: StreamingCaptionDataset, count: int) -> str:
    """Captions that the model generates for the first images of a data set, beside the true ones."""
    samples = [StreamingDataset.get_item(data, index) for index in range(min(count, data.num_samples))]
    if not samples:
        return ""
    prompt = data.tokenizer.decode(data.prompt_ids)
    generated = model.model.generate([decode_image(sample["image"]) for sample in samples], prompt)
    pairs = zip(samples, generated, strict=True)
    return "\n" + "\n\n".join(
        textwrap.indent(f"true:      {sample['caption']}\ngenerated: {caption}", "  ") for sample, caption in pairs
    )


def _places(recipe: TrainConfig, trainer: Trainer) -> str:
    parts = [f"config.yaml and metrics.jsonl are in {Path(recipe.run_folder)}"]
    if recipe.save_folder:
        parts.append(f"checkpoints in {recipe.save_folder}")
    if model_folder(recipe).exists():
        parts.append(f"the model in Hugging Face form in {model_folder(recipe)}")
    return f"\n{recipe.run_name}, {trainer.state.timestamp.batch.value} batches: {', '.join(parts)}."
