"""Tables and captions that a run prints at its end."""

import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from composer import Trainer
from composer.core import State, get_precision_context
from composer.utils import dist
from PIL import Image

from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.data.messages import announce, failure, one_line
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.image_text_model import Caption
from composer_prior.reports.run_report import TOKENS

log = logging.getLogger(__name__)


def validation_metrics(state: State) -> dict[str, float]:
    """Return the last evaluation's metrics by name."""
    metrics = state.eval_metrics.get("eval", {})
    return {name: float(metric.compute()) for name, metric in metrics.items()}


@contextmanager
def closing_part() -> Iterator[None]:
    """Print an error in a part of the closing report and go on; the finished run stays."""
    try:
        yield
    except Exception as error:
        log.exception("The closing report")
        announce(f"\nThe closing report lacks a part: {type(error).__name__}: {failure(error)}")


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Format validation loss and accuracy over all, image-related and other tokens, a line per model."""
    width = max(map(len, [*rows, "validation"]))
    header = "  ".join(f"{name:>21}" for name in TOKENS)
    lines = [f"{'validation':{width}}  {header}", f"{'':{width}}  " + "  ".join([f"{'loss':>10} {'accuracy':>10}"] * 3)]
    for name, metrics in rows.items():
        cells = []
        for suffix in TOKENS.values():
            values = [metrics.get(f"{value}{suffix}") for value in ("loss", "accuracy")]
            cells.append(" ".join(f"{value:10.4f}" if value is not None else f"{'-':>10}" for value in values))
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n" + "\n".join(lines)


def benchmarks_table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Format one line for each benchmark, its figures behind their words."""
    width = max(map(len, rows), default=0)
    lines = [
        f"{name:{width}}  "
        + "  ".join(f"{words} {'-' if value is None else f'{value:.3f}'}" for words, value in row.items())
        for name, row in rows.items()
        if row
    ]
    return "\n" + "\n".join(lines) if lines else ""


@dataclass
class Samples:
    """Validation images with their numbers, captions and generated captions; and why others were left out."""

    images: list[Image.Image] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    generated: list[Caption] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        """Format the captions, one pair below the other."""
        pairs = zip(self.captions, self.generated, strict=True)
        blocks = [f"true:      {true}\ngenerated: {own.text}" for true, own in pairs]
        blocks += [f"left out:  {reason}" for reason in self.left_out]
        return "\n" + "\n\n".join(textwrap.indent(block, "  ") for block in blocks) if blocks else ""


def caption_samples(trainer: Trainer, count: int) -> Samples:
    """Generate captions of the first validation images with the trained model, beside the true ones.

    Every rank must call it, as sharded weights take part in generation on all ranks. Unusable samples are named and
    left out. A model without a vision tower and a run without validation have no samples.
    """
    state, model = trainer.state, unwrapped(trainer.state.model)
    if not isinstance(model, ComposerLVLM) or model.reads_text_alone or not state.evaluators:
        return Samples()
    data = state.evaluators[0].dataloader.dataloader.dataset  # type: ignore[union-attr]
    if data.has_messages:
        return Samples()
    found: list[Any] = [None]
    if dist.get_global_rank() == 0:
        found[0] = _first_samples(data, count)
    dist.broadcast_object_list(found)  # an error on the first rank must not leave the others waiting
    samples: Samples = found[0]
    if samples.images:
        captioner = model.image_text_model
        with get_precision_context(state.precision, state.precision_config):
            samples.generated = captioner.generate(captioner.inputs(samples.images, data.prompt), probabilities=True)
    return samples


def _first_samples(data: StreamingCaptionDataset, count: int) -> Samples:
    """Read the first images with their captions, and note the errors of unreadable ones."""
    samples = Samples()
    for sample_id in range(min(data.num_samples, 4 * count)):
        if len(samples.images) == count:
            break
        try:
            image, caption = data.image_and_caption(sample_id)
            samples.images.append(image)
            samples.captions.append(caption)
            samples.numbers.append(sample_id)
        except Exception as error:
            samples.left_out.append(one_line(error))
    return samples
