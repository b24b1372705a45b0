"""PRIOR as a Composer algorithm."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from composer.core import Algorithm, Event, Precision, State, Time, TimeUnit, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from composer_prior.algorithms.prior.image_tokens import image_positions, image_token_ids
from composer_prior.algorithms.prior.stacking import check_stack
from composer_prior.algorithms.prior.weights import (
    Normalization,
    check_arguments,
    check_logprobs,
    normalize,
    raw_weights,
)
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.head import logits_nll, weighted_mean
from composer_prior.models.reference import ReferenceLM

_STEP_EVENTS = (
    Event.BATCH_START,
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_LOSS,
    Event.AFTER_LOSS,
    Event.AFTER_TRAIN_BATCH,
)


class PRIOR(Algorithm):
    """Weight the loss of each caption token by ``(1 - P_r)^alpha`` (`arXiv 2505.08971`_, section 3).

    ``P_r`` is the token's probability under a text-only language model trained on the same captions. The weights enter
    the batch as ``token_weights`` (``[B, T]`` float32) on ``Event.BEFORE_LOSS`` and leave it on ``Event.AFTER_LOSS``.
    A model whose attribute ``honours_token_weights`` is true applies them itself; for any other model the algorithm
    computes the weighted loss from the ``logits`` of its outputs and the ``labels`` of the batch.

    Logged each step: ``prior/reference_nll`` (nats per token), ``prior/effective_sample_size``
    (``(sum w)^2 / (n sum w^2)``), ``prior/top_decile_share`` (share of the weight held by the heaviest tenth of the
    rank's tokens), ``prior/loss_weighted`` and ``prior/loss_unweighted``.

    Args:
        reference: a causal language model (:class:`.ReferenceLM`, a Hugging Face model, or the path of one), which
            scores each batch; or None, when the batch carries ``ref_logprobs``. Default: ``None``.
        alpha: exponent, >= 0. Default: ``1.0``, the paper's.
        normalization: ``"sequence"``, ``"batch"`` (the global batch) or ``"none"``. Default: ``"sequence"``.
        floor: share of next-token prediction mixed in, in [0, 1). Default: ``0.0``, the paper's.
        start: time from which tokens are weighted. Default: ``"0dur"``.
        end: time from which they are not any more. Default: ``"1dur"``. Outside the interval the loss is the
            model's own next-token prediction.
        shard_reference: keep one part of the reference's weights on each rank (FSDP2) instead of all of them; they
            are gathered for the scoring of a batch. Default: ``False``.

    Raises:
        ValueError: for an impossible argument, another algorithm that it cannot run beside, a reference with another
            vocabulary than the model's, a batch without ``labels`` or with neither ``ref_logprobs`` nor a reference to
            compute them, NaN or positive log-probabilities, or a model without logits.

    Example:
        .. code-block:: python

            trainer = Trainer(model=model, algorithms=[PRIOR(reference="runs/reference/model")], ...)

    .. _arXiv 2505.08971: https://arxiv.org/abs/2505.08971
    """

    def __init__(
        self,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        alpha: float = 1.0,
        normalization: Normalization = "sequence",
        floor: float = 0.0,
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
    ):
        check_arguments(alpha, normalization, floor)
        if isinstance(reference, str):
            reference = ReferenceLM.from_pretrained(reference)
        elif isinstance(reference, nn.Module):  # with PEFT it is no PreTrainedModel
            reference = ReferenceLM(reference)
        self.reference = reference
        self.shard_reference = shard_reference
        self.alpha = alpha
        self.normalization = normalization
        self.floor = floor
        self.start = Time.from_timestring(start) if isinstance(start, str) else start
        self.end = Time.from_timestring(end) if isinstance(end, str) else end
        self._batch_sums: tuple[Tensor, Tensor] | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._logged = False

    @staticmethod
    def check(alpha: float = 1.0, normalization: str = "sequence", floor: float = 0.0) -> None:
        """Refuse impossible arguments without building anything."""
        check_arguments(alpha, normalization, floor)

    def match(self, event: Event, state: State) -> bool:
        if event == Event.INIT:
            return True
        if event == Event.FIT_START:
            return self.reference is not None
        return event in _STEP_EVENTS and self._is_active(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            check_stack(state.algorithms, _unwrapped(state.model))
        elif event == Event.FIT_START:
            assert self.reference is not None
            self.reference.check_vocabulary(_unwrapped(state.model))
            if self.shard_reference and dist.get_world_size() > 1:
                self.reference.to(cast(torch.device, state.device._device)).shard()
            image_token_ids(_unwrapped(state.model))
        elif event == Event.BATCH_START:
            self._score_batch(state)
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._statistics.clear()  # of a pass that ran out of memory, or of an optimizer that takes two
        elif event == Event.BEFORE_LOSS:
            self._insert_weights(state)
        elif event == Event.AFTER_LOSS:
            self._finish_loss(state)
        elif event == Event.AFTER_TRAIN_BATCH and not self._logged:
            self._log(logger)
            self._logged = True

    def _is_active(self, state: State) -> bool:
        return _reached(state, self.start) and not _reached(state, self.end)

    def _score_batch(self, state: State) -> None:
        """Score the whole batch before it is cut into microbatches, so that nothing depends on the cut."""
        self._logged = False
        mask = _loss_mask(state.batch)
        ref_logprobs = self._ref_logprobs(state)
        check_logprobs(ref_logprobs, mask)
        if self.normalization == "batch":
            weights = raw_weights(ref_logprobs, mask, self.alpha, self.floor)
            sums = state.device.tensor_to_device(torch.stack([weights.sum(dtype=torch.float64), mask.sum()]))
            dist.all_reduce(sums, reduce_operation="SUM")
            self._batch_sums = (sums[0], sums[1])

    def _ref_logprobs(self, state: State) -> Tensor:
        """``ref_logprobs`` of the batch, computed by the reference unless they are there."""
        batch = state.batch
        if "ref_logprobs" not in batch:
            if self.reference is None:
                raise ValueError(
                    "PRIOR found neither `ref_logprobs` in the batch nor a reference model: give "
                    "PRIOR(reference=...) a causal LM trained on the captions, or load stored scores."
                )
            self.reference.to(cast(torch.device, state.device._device))
            with get_precision_context(state.precision or Precision.FP32, state.precision_config):
                is_text = ~image_positions(batch["input_ids"], batch["labels"], _unwrapped(state.model))
                if "attention_mask" in batch:
                    is_text &= batch["attention_mask"].bool()
                ref_logprobs = self.reference.logprobs(batch["input_ids"], is_text, batch["labels"])
            # The dict that the loader made stays as it is: a loader may yield it again.
            state.batch = {**batch, "ref_logprobs": ref_logprobs.to(batch["labels"].device)}
        return state.batch["ref_logprobs"]

    def _insert_weights(self, state: State) -> None:
        mask = _loss_mask(state.batch)
        ref_logprobs = self._ref_logprobs(state)
        if not ref_logprobs.is_cuda:  # the whole batch was checked already: do not stall the device for it again
            check_logprobs(ref_logprobs, mask)
        weights = raw_weights(ref_logprobs, mask, self.alpha, self.floor)
        if self.normalization == "sequence":
            weights = normalize(weights, mask, weights.sum(1, keepdim=True), mask.sum(1, keepdim=True))
        elif self.normalization == "batch":
            weight_sum, token_count = self._batch_sums or (weights.sum(), mask.sum())
            weights = normalize(weights.double(), mask, weight_sum, token_count).float()
        state.batch["token_weights"] = weights

    def _finish_loss(self, state: State) -> None:
        mask = _loss_mask(state.batch)
        weights = state.batch.pop("token_weights")
        if getattr(_unwrapped(state.model), "honours_token_weights", False):
            nll = cast(Mapping[str, Tensor], state.outputs)["nll"]
        else:
            nll = logits_nll(_logits(state.outputs), state.batch["labels"])
            state.loss = weighted_mean(nll, weights, state.batch["labels"])
        self._statistics.append(_step_statistics(weights, nll.detach(), state.batch["ref_logprobs"], mask))

    def _log(self, logger: Logger) -> None:
        sums = torch.stack([sums for sums, _ in self._statistics]).sum(0)
        weights = torch.cat([weights for _, weights in self._statistics])
        self._statistics.clear()
        top = weights.topk(-(-len(weights) // 10)).values.sum() if len(weights) else weights.sum()
        sums = torch.cat([sums, top.double().reshape(1)])
        dist.all_reduce(sums, reduce_operation="SUM")
        count, weight, squared_weight, reference_nll, weighted, unweighted, top_weight = sums.tolist()
        if count == 0:
            return
        logger.log_metrics(
            {
                "prior/reference_nll": reference_nll / count,
                "prior/effective_sample_size": weight**2 / (count * squared_weight) if squared_weight else 0.0,
                "prior/top_decile_share": top_weight / weight if weight else 0.0,
                "prior/loss_weighted": weighted / count,
                "prior/loss_unweighted": unweighted / count,
            }
        )


def _step_statistics(weights: Tensor, nll: Tensor, ref_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of a microbatch, in float64, and their weights."""
    weights, nll, reference_nll = weights[mask], nll[mask].float(), -ref_logprobs[mask].float()
    terms = (torch.ones_like(weights), weights, weights**2, reference_nll, weights * nll, nll)
    return torch.stack([term.sum(dtype=torch.float64) for term in terms]), weights


def _loss_mask(batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        got = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"PRIOR needs a batch that is a dict with `labels` [B, T], -100 where there is none; got {got}."
        )
    return batch["labels"] != IGNORE_INDEX


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            "PRIOR needs the per-token `logits` in the model's outputs (a Hugging Face model in Composer's "
            f"HuggingFaceModel has them), or a model with `honours_token_weights`; got {type(outputs).__name__}."
        )
    return logits


def _unwrapped(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _reached(state: State, time: Time) -> bool:
    if time.unit == TimeUnit.DURATION:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed >= time
    return state.timestamp.get(time.unit) >= time
