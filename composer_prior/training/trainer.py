"""From a recipe to a Composer Trainer, and from its first step to what a run leaves behind."""

import json
import os
import re
import signal
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from composer import Trainer
from composer.core import Algorithm, Evaluator, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from omegaconf import OmegaConf

from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.batch import stream_names
from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.data.hub import push
from composer_prior.data.messages import announce
from composer_prior.data.nodes import check_same, on_first_rank
from composer_prior.data.scores import COLUMN, VIEWER_COLUMN
from composer_prior.data.storage import write_whole
from composer_prior.data.tokenizer import build_tokenizer, tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.hugging_face import hugging_face_skeleton, knows_features, unused_weights
from composer_prior.models.language import prepare_compile
from composer_prior.models.lora import scaling_of
from composer_prior.models.sharding import build_parallelism, check_checkpointing, prepare_sharded
from composer_prior.registry import without_name
from composer_prior.reports.closing import (
    Samples,
    benchmarks_table,
    caption_samples,
    closing_part,
    metrics_table,
    validation_metrics,
)
from composer_prior.reports.page import sample_card
from composer_prior.reports.run_report import run_report
from composer_prior.training.benchmarks import RunBenchmark, build_benchmarks
from composer_prior.training.builders import (
    build_all,
    build_loaders,
    build_model,
    build_named,
    build_precision,
    build_profiler,
    one_line_errors,
    trusts_code,
    without_models,
)
from composer_prior.training.checkpoints.identity import WEIGHT_NAMES, RunIdentity
from composer_prior.training.checkpoints.loading import load_weights
from composer_prior.training.checkpoints.pickles import ASKED_BY_COMPOSER
from composer_prior.training.checkpoints.saver import Checkpoints
from composer_prior.training.checkpoints.sigterm import Preempted, StopOnSigterm
from composer_prior.training.checkpoints.start import find_start, leave_behind
from composer_prior.training.config import TrainConfig, identified, written
from composer_prior.training.finite import FiniteSteps, SkipEmptySteps, check_weights
from composer_prior.training.loggers import MetricsFile, Tracker
from composer_prior.training.monitors import StreamMonitor
from composer_prior.training.optimizer import NO_GROUP, build_optimizer
from composer_prior.training.reference import check_helper, model_folder, read_metadata
from composer_prior.training.saving import save_architecture, save_model
from composer_prior.training.validate import check_fit


class FindUnused(Algorithm):
    """Let DDP look for weights without a gradient, of families of which none are known beforehand."""

    find_unused_parameters = True  # type: ignore[assignment]

    def match(self, event: Event, state: State) -> bool:
        """Return False: nothing is applied."""
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do nothing."""


@one_line_errors()
def build_trainer(recipe: TrainConfig) -> Trainer:
    """Build the Trainer of a recipe; data, tokenizer, reference and scores must exist."""
    reproducibility.seed_all(recipe.seed)
    tokenizer = build_tokenizer(recipe.tokenizer)
    model = build_model(recipe.model, tokenizer, recipe.parallelism_config)
    loaders = build_loaders(recipe, model)
    train_data: StreamingCaptionDataset = loaders["train_loader"].dataloader.dataset
    if isinstance(model, ComposerLVLM):
        if not model.reads_text_alone:
            model.processor.prompt = train_data.prompt
        model.image_related_metrics = all(spec.dataloader.dataset.has_spans for spec in loaders.values())
        check_fit(model, train_data)
    if recipe.model["name"] == "hugging_face":
        skeleton = partial(hugging_face_skeleton, tokenizer, **without_name(recipe.model))
        for name in on_first_rank(lambda: unused_weights(skeleton())):
            model.get_parameter(name).requires_grad_(False)
    for key in recipe.helpers:
        check_helper(recipe, key, train_data.fingerprint)
    check_checkpointing(recipe.parallelism_config, model)
    optimizer = build_optimizer(recipe.optimizer, model)
    identity = {
        **(WEIGHT_NAMES if isinstance(model, ComposerLVLM) else {}),
        **identified(recipe, ("model", "optimizer")),
        "lora_scaling": scaling_of(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": train_data.fingerprint,
        **train_data.identity,
        "seed": recipe.seed,
    }
    check_same(identity)
    start, known = on_first_rank(partial(find_start, recipe, identity))
    run_id = known or on_first_rank(lambda: uuid.uuid4().hex)
    has_weights = not any(parameter.is_meta for parameter in model.parameters())
    if recipe.init_from is not None and start is None and has_weights:
        announce(load_weights(recipe.init_from, model, trusts_code(recipe)))
    if recipe.compile_config is not None:
        prepare_compile()
    mixed = any(len(stream_names(spec.dataloader)) > 1 for spec in loaders.values())
    reference = None if recipe.reference_recipe is None else str(model_folder(recipe.reference_recipe))
    callbacks: list[Any] = [SkipEmptySteps()] if train_data.on_bad_sample == "skip" else []
    callbacks += [StreamMonitor()] if mixed and isinstance(model, ComposerLVLM) else []
    callbacks += build_all("callback", recipe.callbacks, recipe=recipe)
    callbacks += build_benchmarks(recipe.benchmarks, model, reference)
    metrics = [*model.get_metrics(is_train=False)]
    labels = {"eval_loader": "eval", **{f"eval_loaders.{name}": f"eval/{name}" for name in recipe.eval_loaders}}
    evaluators = [
        Evaluator(label=label, dataloader=loaders[key], metric_names=metrics)
        for key, label in labels.items()
        if key in loaders
    ]
    saver = [] if recipe.save_folder is None else [Checkpoints(recipe)]
    os.environ.update(ASKED_BY_COMPOSER)
    # Where samples carry stored scores, no model is loaded for nothing.
    scorers = {"reference": COLUMN, "viewer": VIEWER_COLUMN}
    stored = [model for model, column in scorers.items() if column in train_data.scores]
    algorithms = build_all("algorithm", without_models("algorithm", recipe.algorithms, stored))
    if recipe.model["name"] == "hugging_face" and recipe.parallelism_config is None and not knows_features(model):
        algorithms.append(FindUnused())
    trackers = build_all("logger", recipe.loggers, recipe=recipe, run_id=run_id)
    trainer = Trainer(
        model=model,
        train_dataloader=loaders["train_loader"],
        eval_dataloader=evaluators or None,
        eval_interval=recipe.eval_interval,
        max_duration=recipe.max_duration,
        optimizers=optimizer,
        schedulers=build_named("scheduler", recipe.scheduler),
        step_schedulers_every_batch=True,
        algorithms=algorithms,
        callbacks=[RunIdentity(identity, run_id), FiniteSteps(recipe.nan_steps), StopOnSigterm(), *callbacks, *saver],
        loggers=[MetricsFile(Path(recipe.run_folder, "metrics.jsonl")), *trackers],
        run_name=recipe.run_name,
        seed=recipe.seed,
        precision=build_precision(recipe.precision),
        device_train_microbatch_size=recipe.device_train_microbatch_size,
        accumulate_train_batch_on_tokens=True,
        parallelism_config=build_parallelism(recipe.parallelism_config),
        compile_config=recipe.compile_config,
        progress_bar=recipe.progress_bar,
        profiler=build_profiler(recipe),
        load_path=start,
        load_progress_bar=recipe.progress_bar,
        dist_timeout=recipe.dist_timeout,
    )
    prepare_sharded(trainer.state.model)
    if start is not None:
        _check_start(recipe, trainer, start)
    on_first_rank(partial(leave_behind, recipe, start))  # last: nothing is removed for a run that cannot start
    return trainer


def _check_start(recipe: TrainConfig, trainer: Trainer, start: str) -> None:
    """Raise if a run cannot resume from a checkpoint; print the learning rate at which it resumes."""
    state = trainer.state
    check_weights(state.model, f"{start} is not gone on from; delete it for an earlier one")
    now, end = state.timestamp, cast(Time[int], state.max_duration)
    done = now.get(end.unit)
    begun = (
        f" and {now.batch_in_epoch.value} batches" if end.unit == TimeUnit.EPOCH and now.batch_in_epoch.value else ""
    )
    counted = end.unit in (TimeUnit.BATCH, TimeUnit.EPOCH)  # the last batch may hold more than is left of the others
    if counted and (done > end or (done == end and begun)):
        raise ValueError(
            f"{recipe.run_name}: max_duration={recipe.max_duration} is less than {start} has done, "
            f"{done.to_timestring()}{begun}; give more, an earlier one as load_path, or another run_name."
        )
    if done < end:
        schedule: Any = state.schedulers[0]
        groups = state.optimizers[0].param_groups
        own = max(range(len(groups)), key=lambda i: sum(weight.numel() for weight in groups[i]["params"]))
        rate, following = groups[own]["lr"], schedule.base_lrs[own] * schedule.lr_lambdas[own](0)
        name = groups[own].get("name")
        several = any(group.get("name") != name for group in groups)
        said = f"the learning rate of {'the others' if name == NO_GROUP else name}" if several else "the learning rate"
        announce(
            f"{recipe.run_name} goes on after batch {now.batch.value}, from {start}. The schedule is that of "
            f"max_duration={recipe.max_duration}: {said} goes from {rate:.3g} to {following:.3g} there."
        )


def _fit(recipe: TrainConfig, trainer: Trainer) -> None:
    """Train; when SIGTERM comes, save, say where the run will resume, and end the program as Composer does then."""
    try:
        trainer.fit()
    except Preempted:
        batch = trainer.state.timestamp.batch.value
        stopped = f"{recipe.run_name} was stopped by SIGTERM after batch {batch}"
        savers = [callback for callback in trainer.state.callbacks if isinstance(callback, Checkpoints)]
        if savers:
            announce(
                f"{stopped} and saves; Composer's launcher waits 30 s for that, composer-prior launch for its end."
            )
            saved = savers[0].save(trainer.state, trainer.logger)
            announce(f"{saved} is saved; the same command with autoresume=true goes on from there.")
        else:
            announce(f"{stopped}; it keeps no checkpoints.")
        trainer.close()
        sys.exit(128 + signal.SIGTERM)


def finish(recipe: TrainConfig, trainer: Trainer) -> Trainer:
    """Train, report, and push the models of the run and its helpers: other ranks no longer wait for the first one."""
    complete(recipe, trainer)
    for one in (*recipe.helpers.values(), recipe):
        push(model_folder(one), one.push_to_hub, "model")
    return trainer


def complete(recipe: TrainConfig, trainer: Trainer) -> None:
    """Train, write what the run leaves, and report."""
    folder = Path(recipe.run_folder)
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(written(recipe))).encode())
    data = cast(Any, trainer.state.train_dataloader).dataset
    model = unwrapped(trainer.state.model)
    if isinstance(model, ComposerLVLM) and not model.reads_text_alone:
        save_architecture(recipe, model)
    benchmarks = [callback for callback in trainer.state.callbacks if isinstance(callback, RunBenchmark)]
    try:
        now = trainer.state.timestamp
        if now.get(trainer.state.max_duration.unit) < trainer.state.max_duration:
            _fit(recipe, trainer)
        else:
            announce(f"{recipe.run_name} has finished already; set another max_duration or run_name to train on.")
            times = {f"time/{unit}": getattr(now, unit).value for unit in ("batch", "sample", "epoch", "token")}
            trainer.logger.log_metrics(times)  # it may have been stopped before it had logged them
            if trainer.state.evaluators:
                trainer.eval()
            else:
                trainer.engine.run_event(Event.EVAL_STANDALONE_START)  # the metrics' file is to be gone on with
        for benchmark in benchmarks:
            benchmark.run(trainer.state, trainer.logger)
        if isinstance(model, ComposerLVLM):
            save_model(recipe, model, data, validation_metrics(trainer.state))
        dist.barrier()
        _report(recipe, trainer, benchmarks)
    except BaseException:
        trainer.engine.close()  # trainer.close() would wait for the other ranks, and they for this one
        raise
    trainer.close()


def _report(recipe: TrainConfig, trainer: Trainer, benchmarks: Sequence[RunBenchmark]) -> None:
    """Print the results of a run and write its page; a part that fails is left out."""
    rows: dict[str, Any] = {}
    samples, page = Samples(), Path(recipe.run_folder, "report.html")
    with closing_part():
        ours = validation_metrics(trainer.state)  # on every rank: it adds up what the ranks counted
        for key, helper in recipe.helpers.items():
            if (metadata := read_metadata(helper)) is not None:
                reads = "text only" if key == "reference" else "with images"
                rows[f"{helper.run_name} ({reads})"] = metadata["validation"]
        rows[recipe.run_name] = ours
        last = MetricsFile.of(trainer.logger).current
        for stream in re.findall(r"^metrics/eval/([^/]+)/loss$", "\n".join(last), re.MULTILINE):
            found = {name: last[f"metrics/eval/{stream}/{name}"] for name in ("loss", "accuracy")}
            rows[f"{recipe.run_name}, {stream}"] = found
        announce(metrics_table(rows))
    with closing_part():
        announce(benchmarks_table({one.name: one.headline() for one in benchmarks}))
    with closing_part():
        samples = caption_samples(trainer, recipe.sample_captions)
        announce(samples)
    with closing_part():
        if dist.get_global_rank() == 0:
            page.unlink(missing_ok=True)  # of an earlier run of that name
            write_whole(page, _page(recipe, trainer, rows, benchmarks, samples).encode())
    with closing_part():
        if dist.get_global_rank() == 0:
            _publish(recipe, trainer, benchmarks, samples)
    with closing_part():
        where = f"a page for your browser is {page}; " if page.exists() else ""
        parts = [f"{where}config.yaml and metrics.jsonl are in {Path(recipe.run_folder)}"]
        if recipe.save_folder:
            parts.append(f"checkpoints in {recipe.save_folder}")
        if model_folder(recipe).exists():
            parts.append(f"the model in Hugging Face format in {model_folder(recipe)}")
        announce(f"\n{recipe.run_name}, {trainer.state.timestamp.batch.value} batches: {', '.join(parts)}.")


def _publish(recipe: TrainConfig, trainer: Trainer, benchmarks: Sequence[RunBenchmark], samples: Samples) -> None:
    """Store the recipe, the page, the sampled captions and the figures of benchmarks with the run in its trackers."""
    names = ("config.yaml", "report.html")
    files = {name: file.read_text() for name in names if (file := Path(recipe.run_folder, name)).is_file()}
    shown = zip(samples.numbers, samples.captions, samples.generated, strict=True)
    captions = [{"sample": number, "true": true, "generated": own.text} for number, true, own in shown]
    files["samples.json"] = json.dumps(captions, indent=1)
    files["benchmarks.json"] = json.dumps({one.name: one.figures for one in benchmarks}, indent=1)
    for tracker in trainer.logger.destinations:
        if isinstance(tracker, Tracker):
            tracker.publish(files)


def _page(
    recipe: TrainConfig, trainer: Trainer, rows: dict[str, Any], benchmarks: Sequence[RunBenchmark], samples: Samples
) -> str:
    """Return the page of a run, with its validation metrics as rows."""
    shown = zip(samples.numbers, samples.images, samples.captions, samples.generated, strict=True)
    cards = [
        sample_card(number, image, [true, own.text], [[(true, None)], own.pieces], ["true", "generated"], (1, 1))
        for number, image, true, own in shown
    ]
    records = MetricsFile.of(trainer.logger).records()
    figures = {one.name: one.figures for one in benchmarks}
    text = Path(recipe.run_folder, "config.yaml").read_text()
    return run_report(records, recipe.run_name, validation=rows, benchmarks=figures, cards=cards, recipe=text)
