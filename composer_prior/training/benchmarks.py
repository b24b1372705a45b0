"""Benchmarks of the model while it is trained."""

import logging
from collections.abc import Mapping
from typing import Any

from composer.core import Callback, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch.distributed.fsdp import FSDPModule

from composer_prior import registry
from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.messages import announce, failure
from composer_prior.evaluation.benchmark import Benchmark, Figures, run_benchmark
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.training.builders import one_line_errors
from composer_prior.training.keys import benchmark_arguments

log = logging.getLogger(__name__)


class RunBenchmark(Callback):
    """Log ``eval/{name}/{figure}`` at intervals and at the end of training; what goes wrong is said and ends no run.

    Args:
        name: of the benchmark in the recipe.
        benchmark: to run.
        interval: how often, such as ``500ba``; ``1dur`` is at the end.
        limit: the first so many samples; None takes all.
    """

    def __init__(self, name: str, benchmark: Benchmark, interval: str = "1dur", limit: int | None = None):
        self.name = name
        self.benchmark = benchmark
        self.limit = limit
        self.figures: Figures = {}  # of the last time
        self._batch = -1
        ends = {Event.BATCH_END, Event.EPOCH_END}
        self._is_due = create_interval_scheduler(interval, checkpoint_events=False, final_events=ends)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in (Event.BATCH_END, Event.EPOCH_END) and self._is_due(state, event):
            self.run(state, logger)

    def run(self, state: State, logger: Logger) -> None:
        """Run the benchmark now, unless it has been run after this batch."""
        if self._batch == int(state.timestamp.batch):
            return
        self._batch = int(state.timestamp.batch)
        model: Any = unwrapped(state.model)
        # Where ranks share the weights, all of them take part in every pass.
        share = not any(isinstance(module, FSDPModule) for module in model.modules())
        self.figures = {}
        try:
            with get_precision_context(state.precision, state.precision_config):
                self.figures, _ = run_benchmark(self.benchmark, model.image_text_model, limit=self.limit, share=share)
        except Exception as error:  # whatever it is, the training goes on
            log.exception("Benchmark %s", self.name)
            announce(f"\nBenchmark {self.name}: no figures after batch {self._batch}: {failure(error)}")
        values = {name: one["value"] for name, one in self.figures.items() if one["value"] is not None}
        logger.log_metrics({f"eval/{self.name}/{name}": value for name, value in values.items()})

    def headline(self) -> dict[str, float | None]:
        """Return the figures of the closing line by its words."""
        headline = self.benchmark.headline.items()
        return {words: self.figures[name]["value"] for words, name in headline if name in self.figures}


def build_benchmarks(
    benchmarks: Mapping[str, Any], model: Any, reference: str | None = None, where: str = ""
) -> list[RunBenchmark]:
    """Build the callbacks of a recipe's benchmarks, which need a model with a vision tower.

    Args:
        benchmarks: of the recipe.
        model: of the run.
        reference: folder of the text-only reference's model, passed to benchmarks whose ``reference`` is not given.
        where: prefix of the recipe's keys, for messages.
    """
    chosen = {name: arguments for name, arguments in benchmarks.items() if arguments is not None}
    if chosen and not (isinstance(model, ComposerLVLM) and not model.reads_text_alone):
        raise ValueError(f"{where}benchmarks: they are for models with a vision tower; leave them out.")
    callbacks = []
    for name, given in chosen.items():
        key, kind = f"{where}benchmarks.{name}", given.get("benchmark", name)
        constructor = registry.look_up("benchmark", kind, key)
        known = {"reference": reference} if reference and registry.takes(constructor, "reference") else {}
        with one_line_errors(key):
            benchmark = registry.build("benchmark", kind, known | benchmark_arguments(given), key)
        callbacks.append(
            RunBenchmark(name, benchmark, **{one: given[one] for one in ("interval", "limit") if one in given})
        )
    return callbacks
