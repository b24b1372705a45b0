"""The page of a run."""

from collections.abc import Mapping
from pathlib import Path

from composer import Trainer
from composer.utils import dist

from composer_prior.data.storage import write_whole
from composer_prior.evaluation.benchmark import Figures
from composer_prior.reports.closing import Samples
from composer_prior.reports.page import sample_card
from composer_prior.reports.run_report import run_report
from composer_prior.training.config import TrainConfig
from composer_prior.training.metrics_file import MetricsFile


def report_file(recipe: TrainConfig) -> Path:
    """Return the path of a run's page."""
    return Path(recipe.run_folder, "report.html")


def write_report(
    recipe: TrainConfig,
    trainer: Trainer,
    validation: Mapping[str, Mapping[str, float]],
    benchmarks: Mapping[str, Figures],
    samples: Samples,
) -> None:
    """Write the page on rank 0; the page of an earlier run of that name does not stay.

    Args:
        recipe: of the run.
        trainer: at its end.
        validation: metrics of the run and of its reference.
        benchmarks: their last figures.
        samples: captions.
    """
    if dist.get_global_rank() != 0:
        return
    file = report_file(recipe)
    file.unlink(missing_ok=True)
    logged = next(logger for logger in trainer.logger.destinations if isinstance(logger, MetricsFile))
    cards = [
        sample_card(number, image, [true, own.text], [[(true, None)], own.pieces], ["true", "generated"], (1, 1))
        for number, image, true, own in zip(
            samples.numbers, samples.images, samples.captions, samples.generated, strict=True
        )
    ]
    text = Path(recipe.run_folder, "config.yaml").read_text()
    page = run_report(
        logged.records(),
        recipe.run_name,
        validation=validation,
        benchmarks=benchmarks,
        cards=cards,
        recipe=text,
    )
    write_whole(file, page.encode())
