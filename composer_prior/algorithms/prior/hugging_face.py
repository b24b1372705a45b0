"""PRIOR in transformers' ``Trainer`` and the trainers made from it, such as TRL's ``SFTTrainer``."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from composer_prior.algorithms.prior.weights import check_arguments, raw_weights
from composer_prior.algorithms.token_weighting.image_tokens import image_token_ids, text_positions, without_images
from composer_prior.algorithms.token_weighting.normalize import (
    Normalization,
    check_logprobs,
    normalize_part,
    sums_of_part,
)
from composer_prior.algorithms.token_weighting.statistics import heaviest, summary, token_sums
from composer_prior.data.batch import IGNORE_INDEX, ScoresCollator, loss_mask
from composer_prior.models.head import logits_nll
from composer_prior.models.reference import Dtype, ReferenceLM

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a subclass brings its own trainer


class PRIORMixin(Trainer):
    """Weight the loss of each caption token by ``(1 - P_r)^alpha`` in a Hugging Face trainer.

    The weights of an optimizer step are made before its first forward pass, of all its batches on all ranks, so that
    nothing depends on ``gradient_accumulation_steps`` or the number of ranks. Evaluation is not weighted, and nor are
    samples without an image.

    Logged beside the trainer's own: what :class:`.PRIOR` logs, over the tokens since the last time.

    Args:
        args, kwargs: of the trainer.
        reference: a causal language model (:class:`.ReferenceLM`, a Hugging Face model, or the path of one), which
            scores each batch; or None, when the data set has a column ``ref_logprobs``, see :meth:`score`.
            Default: ``None``.
        alpha: exponent, >= 0. Default: ``1.0``, the paper's.
        normalization: ``"sequence"``, ``"batch"`` (all of an optimizer step) or ``"none"``. Default: ``"sequence"``.
        floor: share of next-token prediction mixed in, in [0, 1). Default: ``0.0``, the paper's.
        reference_dtype: of the weights of a reference given as a path, ``float32``, ``bfloat16`` or ``float16``.
            Default: that of its files, but float32 without a GPU.

    Raises:
        ValueError: for an impossible argument, an option of the trainer that it cannot run beside, a reference with
            another vocabulary than the model's, a batch with neither ``ref_logprobs`` nor a reference to compute them,
            NaN or positive log-probabilities, or a model without logits.

    Example:
        .. code-block:: python

            class PRIORTrainer(PRIORMixin, SFTTrainer): ...

            trainer = PRIORTrainer(model, options, train_dataset=data, reference="runs/reference/model")
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        trainers = [base for base in cls.__bases__ if hasattr(base, "compute_loss")]
        if not issubclass(trainers[0], PRIORMixin):
            name = trainers[0].__name__
            raise TypeError(
                f"Name PRIORMixin before {name}, or nothing is weighted: class {cls.__name__}(PRIORMixin, {name})."
            )

    def __init__(
        self,
        *args: Any,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        alpha: float = 1.0,
        normalization: Normalization = "sequence",
        floor: float = 0.0,
        reference_dtype: Dtype | None = None,
        **kwargs: Any,
    ):
        check_arguments(alpha, normalization, floor)
        super().__init__(*args, **kwargs)
        _check_trainer(self)
        self.alpha, self.normalization, self.floor = alpha, normalization, floor
        self.reference = None if reference is None else ReferenceLM.of(reference, reference_dtype)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self._reader = SimpleNamespace(model=self.model, tokenizer=tokenizer)
        if self.reference is not None:
            if tokenizer is None:
                raise ValueError(
                    f"{type(self).__name__} needs processing_class=..., the model's processor or tokenizer, to tell "
                    "the image's tokens from text."
                )
            self.reference.check_vocabulary(self._reader)
            image_token_ids(self._reader)
        self._sums: dict[str, Tensor] = {}
        self.data_collator = ScoresCollator(self.data_collator)
        # The loss is divided here by the tokens of the whole step: let the trainer not divide it again by the batches.
        self._evaluates_on_items, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True

    def score(self, dataset: Any, batch_size: int = 64) -> Any:
        """Compute the reference log-probabilities of a data set's labels, to be stored beside it.

        Args:
            dataset: a ``datasets.Dataset`` of the samples that the trainer takes.
            batch_size: samples that are collated together. Default: ``64``.

        Returns:
            a ``datasets.Dataset`` with the column ``ref_logprobs`` alone, in the same order.
        """

        def scores(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            batch = self.data_collator(samples)
            rows = zip(self.ref_logprobs(batch), self._loss_mask(batch), strict=True)
            return {"ref_logprobs": [logprobs[mask].cpu().numpy() for logprobs, mask in rows]}

        dataset = self._remove_unused_columns(dataset)  # as in training: a collator may look at what there is
        # With a name for the result, the reference's weights are not hashed for one.
        options = {"batched": True, "batch_size": batch_size, "new_fingerprint": uuid4().hex}
        return dataset.map(scores, remove_columns=dataset.column_names, desc="Scoring", **options)

    def ref_logprobs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``log P_r(labels[t] | text before t)``, ``[B, T]`` float32: the batch's own, or else the reference's."""
        if "ref_logprobs" in batch:
            return batch["ref_logprobs"]
        if self.reference is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} found neither `ref_logprobs` in the data nor a reference model: give {name}(reference=...) a "
                "causal LM trained on the captions, or a data set with stored scores."
            )
        with self.accelerator.autocast():
            logprobs = self.reference.to(self.args.device).logprobs(
                batch["input_ids"], text_positions(batch, self._reader), batch["labels"]
            )
        return logprobs.to(batch["labels"].device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of an optimizer step with their weights, and the number of tokens of the step."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        masks = [self._loss_mask(batch) for batch in batches]
        weighted = [mask & ~without_images(batch, self._reader) for batch, mask in zip(batches, masks, strict=True)]
        raw = [self._raw_weights(batch, part) for batch, part in zip(batches, weighted, strict=True)]
        of_parts = zip(raw, weighted, masks, strict=True)
        sums = [torch.cat([sums_of_part(part, some), mask.sum()[None]]) for part, some, mask in of_parts]
        sums = self.accelerator.reduce(torch.stack(sums).sum(0).to(self.args.device), "sum")
        weights = [
            torch.where(mask & ~some, 1.0, normalize_part(part, some, self.normalization, sums[:2].to(part.device)))
            for part, some, mask in zip(raw, weighted, masks, strict=True)
        ]
        tokens = torch.stack([mask.sum() for mask in masks]).sum()
        self._add({"top": heaviest(torch.cat([part.flatten() for part in weights]), tokens)})
        count = sums[2].clamp(min=1).float()
        # DDP averages the gradients of the ranks. Unless the trainer makes up for that, the count does.
        count = count if self.args.average_tokens_across_devices else count / self.accelerator.num_processes
        return [{**batch, "token_weights": part} for batch, part in zip(batches, weights, strict=True)], count

    def _raw_weights(self, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        logprobs = self.ref_logprobs({**batch, "labels": batch["labels"].where(mask, IGNORE_INDEX)})
        check_logprobs(logprobs, mask)
        self._add({"reference_nll": -logprobs[mask].double().sum(), "weighted": mask.sum().double()})
        return raw_weights(logprobs, mask, self.alpha, self.floor)

    def _loss_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        mask = loss_mask(batch, type(self).__name__)
        if "attention_mask" not in batch and "position_ids" in batch:
            raise ValueError(
                f"{type(self).__name__} needs one caption in each row, but this batch holds several in one, without "
                "padding: use a collator that pads."
            )
        return mask

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the trainer's loss, weighted in training."""
        weights = inputs.pop("token_weights", None)
        inputs.pop("ref_logprobs", None)
        if not cast(nn.Module, self.model).training:
            items = num_items_in_batch if self._evaluates_on_items else None
            return super().compute_loss(model, inputs, return_outputs, items)
        if weights is None:
            raise ValueError(
                f"{type(self).__name__} got a batch without weights: the trainer that it is mixed into must take the "
                "batches of a step from `get_batch_samples`, as transformers.Trainer and TRL's SFTTrainer do."
            )
        weighted: Any = partial(self._weighted, model, weights)
        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def _weighted(self, model: Any, weights: Tensor, /, **inputs: Any) -> Any:
        """Return the model's outputs, with weights in the outputs that the trainer computes its loss from."""
        if inputs.get("fused_lm_head"):  # TRL's trainer, which sums the log-probabilities of labels[:, 1:]
            labels, outputs = inputs["labels"], model(**inputs)
            nll = torch.nn.functional.pad(-outputs["log_probs"], (1, 0))
            outputs["log_probs"] = outputs["log_probs"] * weights[:, 1:]
        else:
            labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch")
            # PaliGemma lets captions see what follows unless it is given labels.
            kind = getattr(getattr(self.model, "config", None), "model_type", None)
            seen = {"labels": labels} if kind == "paligemma" else {}
            outputs = model(**inputs, **seen)
            nll = logits_nll(_logits(outputs), labels)
            outputs["loss"] = (nll * weights).sum() / count
        mask = labels != IGNORE_INDEX
        self._add(token_sums(weights, nll.detach().float(), mask))
        return outputs

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.to(self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the trainer's metrics with statistics of the weights since the last log."""
        if "loss" in logs and self._sums:
            values = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum")
            metrics = summary(dict(zip(self._sums, values.tolist(), strict=True)))
            logs.update({f"prior/{name}": value for name, value in metrics.items()})
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        if "ref_logprobs" not in columns:
            columns.append("ref_logprobs")  # not an unused one


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        raise ValueError(
            f"PRIOR needs the per-token `logits` in the model's outputs, as a dict; got {type(outputs).__name__}."
        )
    return logits


def _check_trainer(trainer: Any) -> None:
    """Refuse options of a trainer beside which the loss would be another than PRIOR's.

    Raises:
        ValueError: one line, naming the option, the reason and what to do.
    """
    args = trainer.args
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    packs = "its captions share a row, and the reference reads one a row; leave it out"
    refusals = {
        "label_smoothing_factor": (args.label_smoothing_factor, "the loss is that of the labels alone; leave it at 0"),
        "compute_loss_func": (trainer.compute_loss_func, "PRIOR is a loss itself; leave it out"),
        "loss_type='dft'": (getattr(args, "loss_type", None) == "dft", "it weights tokens too; leave it out"),
        "packing": (getattr(args, "packing", False), packs),
        "padding_free": (getattr(args, "padding_free", False), packs),
        "nn.DataParallel": (args.n_gpu > 1, "start one process for each GPU, with accelerate launch or torchrun"),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "it makes bfloat16 of the weights; use DDP or FSDP"),
        "tensor, context or sequence parallelism": (
            parallel is not None and parallel.non_data_parallel_size > 1,
            "a rank must have whole captions of its own; use DDP or FSDP",
        ),
    }
    for option, (used, reason) in refusals.items():
        if used:
            raise ValueError(f"{type(trainer).__name__} does not run with {option}: {reason}.")
