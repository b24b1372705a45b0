"""Methods that weight the loss of caption tokens, as Composer algorithms."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, cast

import torch
from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from composer_prior import registry
from composer_prior.algorithms.token_weighting.image_tokens import without_images
from composer_prior.algorithms.token_weighting.normalize import (
    Normalization,
    check_normalization,
    normalize_part,
    sums_of_part,
)
from composer_prior.algorithms.token_weighting.stacking import check_stack
from composer_prior.algorithms.token_weighting.statistics import heaviest, summary, token_sums
from composer_prior.data.batch import loss_mask, stream_masks, stream_names
from composer_prior.registry import did_you_mean

Streams = Mapping[str, Mapping[str, float] | None]
_STEP_EVENTS = (
    Event.BATCH_START,
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.BEFORE_LOSS,
    Event.AFTER_LOSS,
    Event.AFTER_TRAIN_BATCH,
)


class TokenWeighting(Algorithm, ABC):
    """Weight the loss of each caption token; what the weight is, a subclass says.

    The weights enter the batch as ``token_weights`` (``[B, T]`` float32) on ``Event.BEFORE_LOSS`` and leave it on
    ``Event.AFTER_LOSS``. The model applies them in its loss and says so with ``honours_token_weights``, and its
    outputs have ``nll`` (``[B, T]`` float32), as those of a :class:`.ComposerLVLM` do.

    Samples without an image keep the weight 1 in a model that reads images, unless ``streams`` has settings of theirs.

    Logged each step, after the method's name and a slash: ``effective_sample_size`` (``(sum w)^2 / (n sum w^2)``),
    ``top_decile_share`` (share of the weight held by the heaviest tenth of the rank's tokens), ``loss_weighted`` and
    ``loss_unweighted``. Where data mix several streams, also of each, as ``{method}/{stream}/loss_weighted``.

    Args:
        normalization: ``"sequence"``: the weights of a caption sum to its number of tokens; ``"batch"``: those of the
            global batch do; ``"none"``. Default: ``"sequence"``.
        start: time from which tokens are weighted. Default: ``"0dur"``.
        end: time from which they are not any more. Default: ``"1dur"``. Outside the interval the loss is the
            model's own next-token prediction.
        streams: settings of the method for samples of a stream of the data, by its name, such as
            ``{"chat": {"floor": 0.5}}``; None leaves their loss next-token prediction. Settings, also ``{}``, are of
            all samples of the stream, with an image or without. Default: ``None``, the same for all.

    Raises:
        ValueError: for an impossible argument, a stream that the data do not have, another algorithm that it cannot run
            beside, a batch without ``labels``, or a model that does not apply the weights.
    """

    name: ClassVar[str]
    by_stream: ClassVar[tuple[str, ...]] = ()  # arguments that may differ by stream

    def __init__(
        self,
        normalization: Normalization = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        streams: Streams | None = None,
    ):
        check_normalization(normalization)
        self.normalization = normalization
        self.start = Time.from_timestring(start) if isinstance(start, str) else start
        self.end = Time.from_timestring(end) if isinstance(end, str) else end
        self.streams = self._checked({} if streams is None else streams)
        self._names: list[str] = []  # of the streams of the data
        self._captions_alone = False  # so that each sample has an image
        self._batch_sums: Tensor | None = None
        self._statistics: defaultdict[str, list[tuple[dict[str, Tensor], Tensor]]] = defaultdict(list)  # by stream
        self._logged = False

    @abstractmethod
    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        """Return weights before normalization, ``[B, T]`` float32, 0 where ``mask`` is False.

        They must not depend on how the batch was cut into microbatches. With ``normalization="batch"`` they are also
        asked for before the forward pass, of the whole batch.

        Args:
            state: with the batch and, on ``Event.BEFORE_LOSS``, the model's outputs.
            mask: ``[B, T]`` bool, True on the loss-generating tokens that are weighted.
        """

    def prepare(self, state: State) -> None:
        """Run once, before training."""

    def begin_batch(self, state: State, mask: Tensor) -> None:
        """Run with the whole batch of the rank, before it is cut into microbatches."""

    def before_forward(self, state: State) -> None:
        """Run with each microbatch, before the model's forward pass."""

    def sums(self, state: State, mask: Tensor) -> dict[str, Tensor]:
        """Return sums over weighted tokens of a microbatch, in float64, whose means are logged too."""
        return {}

    def check_streams(self, names: Sequence[str]) -> None:
        """Raise a ValueError for a key of ``streams`` that is not among the names of the data's streams."""
        for name in self.streams:
            if name not in names:
                raise ValueError(
                    f"algorithms.{self.name}.streams.{name}: the data have no such stream. {did_you_mean(name, names)}"
                )

    def _checked(self, streams: Streams) -> dict[str, dict[str, Any] | None]:
        """Return settings by stream; raise for those that the method does not have, and for impossible ones."""
        others = {*registry.parameters_of(type(self))} - {*self.by_stream}
        for name, settings in streams.items():
            place = f"streams.{name}"
            if settings is not None and not isinstance(settings, Mapping):
                raise ValueError(f"{place}={settings!r}: expected settings such as {{floor: 0.5}}, or null.")
            registry.check_arguments(type(self), settings or {}, place, self.name, others)
            try:
                getattr(self, "check", dict)(**(settings or {}))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        return {str(name): None if settings is None else {**settings} for name, settings in streams.items()}

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START) or (event in _STEP_EVENTS and self._is_active(state))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            check_algorithms(state.algorithms, unwrapped(state.model))
            _check_model(unwrapped(state.model), type(self).__name__)
        elif event == Event.FIT_START:
            self._names = stream_names(state.train_dataloader)
            data = getattr(state.train_dataloader, "dataset", None)
            self._captions_alone = getattr(data, "has_messages", True) is False
            self.check_streams(self._names)
            self.prepare(state)
        elif event == Event.BATCH_START:
            self._begin_batch(state)
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._statistics.clear()  # of a pass that ran out of memory, or of an optimizer that takes two
        elif event == Event.BEFORE_FORWARD:
            self.before_forward(state)
        elif event == Event.BEFORE_LOSS:
            self._insert_weights(state)
        elif event == Event.AFTER_LOSS:
            self._finish_loss(state)
        elif event == Event.AFTER_TRAIN_BATCH and not self._logged:
            self._log(logger)
            self._logged = True

    def _is_active(self, state: State) -> bool:
        return _reached(state, self.start) and not _reached(state, self.end)

    def _begin_batch(self, state: State) -> None:
        """Compute all that needs the whole batch before it is split into microbatches."""
        self._logged = False
        mask = self._loss_mask(state.batch)
        self.begin_batch(state, mask)
        if self.normalization == "batch":
            self._batch_sums = state.device.tensor_to_device(sums_of_part(*self._weights(state, mask)))
            dist.all_reduce(self._batch_sums, reduce_operation="SUM")

    def _insert_weights(self, state: State) -> None:
        mask = self._loss_mask(state.batch)
        weights, weighted = self._weights(state, mask)
        weights = normalize_part(weights, weighted, self.normalization, self._batch_sums)
        state.batch["token_weights"] = torch.where(mask & ~weighted, 1.0, weights)

    def _weights(self, state: State, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights by the settings of each stream, before normalization, and which tokens have one."""
        weighted = self.weighted(state, mask)
        weights = self.raw_weights(state, weighted)
        for name, settings in self.streams.items():
            if settings:
                other = copy(self)
                vars(other).update(settings)
                rows = stream_masks(state.batch, self._names)[name]
                weights = torch.where(rows, other.raw_weights(state, weighted), weights)
        return weights, weighted

    def weighted(self, state: State, mask: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the loss-generating tokens without those of samples whose weights stay 1."""
        unweighted = torch.zeros_like(mask[:, :1])
        if not self._captions_alone:
            unweighted = without_images(state.batch, unwrapped(state.model))
        for name, settings in self.streams.items():
            rows = stream_masks(state.batch, self._names)[name]
            unweighted = unweighted | rows if settings is None else unweighted & ~rows
        return mask & ~unweighted

    def _finish_loss(self, state: State) -> None:
        mask = self._loss_mask(state.batch)
        weighted = self.weighted(state, mask)
        weights = state.batch.pop("token_weights")
        weights, nll = weights.detach(), self.nll(state).detach()
        parts = {"": mask}
        if len(self._names) > 1:
            parts |= {f"{name}/": mask & rows for name, rows in stream_masks(state.batch, self._names).items()}
        for name, part in parts.items():
            sums = token_sums(weights, nll.float(), part) | self.sums(state, part & weighted)
            sums["weighted"] = (part & weighted).sum().double()
            self._statistics[name].append((sums, weights.where(part, 0).flatten()))

    def nll(self, state: State) -> Tensor:
        """Return the model's negative log-likelihood of each label, ``[B, T]`` float32, after the forward pass."""
        return cast(Mapping[str, Tensor], state.outputs)["nll"]

    def _loss_mask(self, batch: Any) -> Tensor:
        return loss_mask(batch, type(self).__name__)

    def _log(self, logger: Logger) -> None:
        totals = dict[str, dict[str, Tensor]]()
        for stream, parts in self._statistics.items():
            sums, weights = zip(*parts, strict=True)
            totals[stream] = {name: sum(part[name] for part in sums) for name in sums[0]}
            totals[stream]["top"] = heaviest(torch.cat(weights), totals[stream]["count"])
        self._statistics.clear()
        values = torch.stack([torch.stack([*of.values()]) for of in totals.values()])
        dist.all_reduce(values, reduce_operation="SUM")
        for (stream, names), row in zip(totals.items(), values.tolist(), strict=True):
            metrics = summary(dict(zip(names, row, strict=True)))
            if metrics:
                logger.log_metrics({f"{self.name}/{stream}{name}": value for name, value in metrics.items()})


def check_algorithms(algorithms: Sequence[Algorithm], model: Any) -> None:
    """Refuse, where tokens are weighted, algorithms that cannot run beside that, and two weightings.

    Raises:
        ValueError: one line, naming the algorithm, the reason and what to do.
    """
    method = weighting_of(algorithms)
    if method is not None:
        check_stack(algorithms, model, method)


def weighting_of(algorithms: Sequence[Algorithm]) -> str | None:
    """Return the name of the algorithm that weights tokens, or None.

    Raises:
        ValueError: if several do.
    """
    names = [type(algorithm).__name__ for algorithm in algorithms if isinstance(algorithm, TokenWeighting)]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both weight the tokens: leave all but one out.")
    return names[0] if names else None


def _check_model(model: Any, method: str) -> None:
    if not getattr(model, "honours_token_weights", False):
        raise ValueError(
            f"{method} needs a model that applies token_weights in its loss, and {type(model).__name__} does not: wrap "
            "the model of transformers in ComposerLVLM(model, processor)."
        )


def unwrapped(model: Any) -> Any:
    """Return a model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _reached(state: State, time: Time) -> bool:
    if time.unit == TimeUnit.DURATION:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed >= time
    return state.timestamp.get(time.unit) >= time
