"""Any image-text-to-text model of transformers as Composer trains it."""

import inspect
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator, has_images
from composer_prior.data.processing import ProcessorInputs
from composer_prior.data.tokenizer import bos_id, image_token_ids
from composer_prior.models.head import Head, TransformedHead, label_logits, labelled, labelled_nll, weighted_mean
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.language import (
    as_forward,
    block_names,
    causal_lm_of,
    check_adapters,
    check_decoder,
    check_head,
    decoder_of,
    head_of,
    is_block,
    last_hidden_states,
    parts_of,
)
from composer_prior.models.packing import enable_packing, packed_hidden_states
from composer_prior.models.prior_lvlm import PriorLVLMForConditionalGeneration, PriorLVLMImageProcessor
from composer_prior.models.reference import left_pack
from composer_prior.models.vision import image_inputs


class ComposerLVLM(ComposerModel):
    """An image-text-to-text model with loss and metrics. The loss honours ``token_weights`` in the batch.

    The head is applied on labelled positions only, so the logits of a batch are never in memory together.

    Args:
        model: of transformers, such as :class:`.PriorLVLMForConditionalGeneration` or a LLaVA; or a causal language
            model, which learns captions without images.
        processor: of the model; its tokenizer for a language model.
        label_smoothing: share of the uniform distribution over the vocabulary in the target of training, in [0, 1);
            the outputs then have ``smoothed_nll`` too. Default: ``0.0``.
        pack: put the samples of a batch into one row for the language model, so that it computes nothing on padding;
            see :mod:`.packing`. Default: ``False``.
        image_related_metrics: report image-related and other tokens apart; the batch then has ``image_related``
            (``[B, T]`` bool). Default: ``False``.

    Raises:
        ValueError: for an impossible argument, or one that the model cannot honour.
    """

    honours_token_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        label_smoothing: float = 0.0,
        pack: bool = False,
        image_related_metrics: bool = False,
    ):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: expected a share in [0, 1).")
        check_adapters(model)
        if label_smoothing:
            _linear_part(head_of(model))  # or refuse it before training
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.label_smoothing = label_smoothing
        self.pack = pack
        self.image_related_metrics = image_related_metrics
        self.label_logits = False  # True: forward returns those too
        base = causal_lm_of(model)
        check_decoder(base)
        # Ours, and a language model, read sequences that are padded at their end: causal attention needs no mask then.
        self._needs_mask = not (self.reads_text_alone or isinstance(base, PriorLVLMForConditionalGeneration))
        if self._needs_mask:
            check_head(model)  # the loss is made of hidden states and head
        if pack:
            if self._needs_mask:
                raise ValueError(f"pack=True: {type(base).__name__} cannot keep packed sequences apart; leave it out.")
            enable_packing(parts_of(model)["language"])  # type: ignore[arg-type]
        self._checked = False
        self.inputs = {*inspect.signature(decoder_of(base).forward).parameters}
        # Composer asks these about each module: a unit of FSDP2, and of activation checkpointing, is a block.
        vars(model)["fsdp_wrap_fn"] = vars(model)["activation_checkpointing_fn"] = partial(is_block, block_names(model))

    @property
    def reads_text_alone(self) -> bool:
        """True for a language model, which reads no images."""
        return isinstance(self.processor, PreTrainedTokenizerBase)

    @property
    def image_processor(self) -> Any:
        """A function from an image to :class:`.ImageInputs`; None for a language model."""
        if self.reads_text_alone:
            return None
        if isinstance(self.processor.image_processor, PriorLVLMImageProcessor):
            return partial(image_inputs, self.processor.image_processor)
        config: Any = causal_lm_of(self.model).config
        return ProcessorInputs(
            self.processor,
            caption_type=self._caption_type,
            positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        )

    @property
    def _caption_type(self) -> int:
        """``token_type_ids`` of captions: 1 for PaliGemma, where all tokens see those of type 0."""
        return int(causal_lm_of(self.model).config.model_type == "paligemma")  # type: ignore[union-attr]

    @property
    def image_text_model(self) -> ImageTextModel:
        """The same model as it captions images and scores texts."""
        if self.reads_text_alone:
            raise ValueError(f"{type(self.model).__name__} reads text alone: it cannot caption images.")
        return ImageTextModel(self.model, self.processor)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll``: negative log-likelihood per token, ``[B, T]`` float32, 0 without a label; ``correct``: bool.

        Args:
            batch: the inputs of the model's decoder with ``labels`` ``[B, T]``, not shifted.
        """
        if self.reads_text_alone or has_images(batch) or self._names_images(batch):
            return as_forward(self.model, type(self)._forward, self, batch)
        rows, length = batch["labels"].shape
        outputs = as_forward(self.model, type(self)._forward, self, self._beside_blank(batch))
        return {key: value[:rows, :length] for key, value in outputs.items()}

    def _names_images(self, batch: Mapping[str, Tensor]) -> bool:
        """Return True if a batch has tokens of images, which the model refuses without these."""
        image = getattr(causal_lm_of(self.model).config, "image_token_id", None)
        return image is not None and bool((batch["input_ids"] == image).any())

    def _beside_blank(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch without images with one more row, a blank image without labels, which changes no loss.

        So every part of the model takes part in every pass: with several ranks each one waits for the others there.
        """
        given, blank = {key: value for key, value in batch.items() if len(value)}, self._blank
        length = max(given["labels"].shape[1], blank["labels"].shape[1])
        found = {key: value.to(given["labels"].device) for key, value in blank.items() if key not in given}
        for key in given.keys() & blank.keys():
            fill = IGNORE_INDEX if key == "labels" else 0
            rows = (given[key], blank[key].to(given[key].device, given[key].dtype))
            found[key] = torch.cat([F.pad(row, (0, length - row.shape[1]), value=fill) for row in rows])
        return found

    @cached_property
    def _blank(self) -> dict[str, Tensor]:
        """A batch of one blank image: what a decoder reads, and ``labels`` without any."""
        image = self.image_processor(Image.new("RGB", (64, 64)))
        ids = image_token_ids(self.tokenizer) if image.prefix is None else ()
        aligned = image.prefix or {"input_ids": [bos_id(self.tokenizer), *(ids[kind] for kind in image.layout)]}
        sample = {key: torch.tensor(values) for key, values in aligned.items()} | image.tensors | {"sample_id": 0}
        batch = CaptionCollator(0)([{**sample, "labels": torch.full_like(sample["input_ids"], IGNORE_INDEX)}])
        return {key: value for key, value in batch.items() if key in {"labels", *self.inputs}}

    def _forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real, labels = batch.get("attention_mask"), batch["labels"]
        hidden = self._hidden_states(batch)  # [B, T, D], or [1, N, D] of the real positions
        if not self.pack:
            return self._outputs(hidden, labels)
        assert real is not None
        real, first = real.bool(), torch.arange(labels.shape[1], device=labels.device) == 0
        in_row = labels.masked_fill(first, IGNORE_INDEX)[real][None]
        outputs = self._outputs(hidden, in_row)
        return {key: value.new_zeros(labels.shape).masked_scatter(real, value) for key, value in outputs.items()}

    @torch.compiler.disable  # the number of labelled tokens differs from batch to batch
    def _outputs(self, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        head = head_of(self.model)
        nll, correct = labelled_nll(hidden, head, labels)
        outputs = {"nll": nll, "correct": correct}
        if self.label_logits:
            outputs["label_logits"] = label_logits(hidden, head, labels)
        if self.label_smoothing and self.training:
            outputs["smoothed_nll"] = nll + self.label_smoothing * label_margin(hidden, head, labels)
        return outputs

    def _hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key in self.inputs}
        if not torch.compiler.is_compiling() and not self._needs_mask and not self._checked:
            check_padding(batch.get("attention_mask"))
            self._checked = True  # a loader pads all batches at one side
        if self.pack:
            mask, language = batch["attention_mask"], parts_of(self.model)["language"]
            inputs["input_ids"] = inputs["input_ids"][mask.bool()][None]
            row = self._embed(inputs)[0]
            return packed_hidden_states(language, row, mask)[None]  # type: ignore[arg-type]
        if not self._needs_mask:
            inputs.pop("attention_mask", None)
        return last_hidden_states(self.model, **inputs)

    def _embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        base: Any = causal_lm_of(self.model)
        if self.reads_text_alone:
            return base.get_input_embeddings()(inputs["input_ids"])
        return base.model.embed(**{key: value for key, value in inputs.items() if key != "attention_mask"})

    @torch.no_grad()
    def text_label_logits(self, input_ids: Tensor, is_text: Tensor, labels: Tensor, normalized: bool = False) -> Tensor:
        """Return the logit of each label, or with ``normalized`` its log-probability, when the model reads only text.

        The text moves together without gaps. Ids and labels are ``[B, T]`` int64, ``is_text`` is ``[B, T]`` bool. The
        result is ``[B, T]`` float32, 0 without a label, and NaN for a label with no text before it.
        """
        ids, targets, positions, _ = left_pack(input_ids, is_text, labels)
        inputs = {"input_ids": ids}
        if self._caption_type:  # PaliGemma is causal where it is given both
            inputs |= {"token_type_ids": torch.ones_like(ids), "labels": targets}

        def read() -> Tensor:
            hidden, head = last_hidden_states(self.model, **inputs), head_of(self.model)
            return -labelled_nll(hidden, head, targets)[0] if normalized else label_logits(hidden, head, targets)

        found = as_forward(self.model, read)
        found[:, 0].masked_fill_(targets[:, 0] != IGNORE_INDEX, torch.nan)
        return torch.zeros(labels.shape, device=labels.device).scatter(1, positions, found)

    def loss(
        self,
        outputs: Mapping[str, Tensor],
        batch: Any,
        *args: Any,
        reduction: Literal["mean", "none"] = "mean",
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean over the loss-generating tokens of weight times negative log-likelihood.

        Args:
            outputs: those of ``forward``.
            batch: a dict of tensors, or a pair whose second is ``labels``.
            *args: ignored.
            reduction: ``"none"`` gives the mean over the tokens of each sample, ``[B]``.
            **kwargs: ignored.
        """
        labels, weights = (
            (batch[1], None) if isinstance(batch, tuple) else (batch["labels"], batch.get("token_weights"))
        )
        nll = outputs.get("smoothed_nll", outputs["nll"])
        if reduction == "none":
            return nll.sum(1) / (labels != IGNORE_INDEX).sum(1).clamp(min=1)
        return weighted_mean(nll, weights, labels)

    def eval_forward(self, batch: Mapping[str, Tensor], outputs: Any = None) -> dict[str, Tensor]:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return dict(caption_metrics(self.image_related_metrics))

    def update_metric(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor], metric: Metric) -> None:
        assert isinstance(metric, TokenMetric)
        metric.update(batch, outputs)


class TokenMetric(MeanMetric):
    """Mean over tokens of the negative log-likelihood (``loss``), its exponential (``perplexity``), or ``accuracy``.

    Args:
        value: what is averaged.
        tokens: over ``all`` loss-generating tokens, the ``image_related`` or the ``other`` ones of them.
    """

    def __init__(
        self,
        value: Literal["loss", "perplexity", "accuracy"],
        tokens: Literal["all", "image_related", "other"] = "all",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.value_name = value
        self.tokens = tokens

    def update(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        values = outputs["correct" if self.value_name == "accuracy" else "nll"]
        mask = batch["labels"] != IGNORE_INDEX
        if self.tokens == "image_related":
            mask = mask & batch["image_related"]
        elif self.tokens == "other":
            mask = mask & ~batch["image_related"]
        mask = mask & ~values.isnan()  # as MeanMetric does it, which asks the device whether there are any
        self.mean_value += values.float().where(mask, 0).sum()
        self.weight += mask.sum()

    def compute(self) -> Tensor:
        mean = super().compute()
        return mean.exp() if self.value_name == "perplexity" else mean


def caption_metrics(image_related: bool) -> dict[str, TokenMetric]:
    """Loss, perplexity and accuracy, and loss and accuracy of image-related and other tokens where they are known."""
    metrics = {name: TokenMetric(name) for name in ("loss", "perplexity", "accuracy")}  # type: ignore[arg-type]
    for tokens in ("image_related", "other") if image_related else ():
        for value in ("loss", "accuracy"):
            metrics[f"{value}_{tokens}"] = TokenMetric(value, tokens)  # type: ignore[arg-type]
    return metrics


def check_padding(attention_mask: Tensor | None) -> None:
    """Raise if sequences are padded elsewhere than at their end, where only a mask could hide the padding."""
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError(
            "The batch is padded on the left, but the model is trained on sequences padded at their end: set "
            "processor.tokenizer.padding_side = 'right'."
        )


def label_margin(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return by how much the logit of each label exceeds the mean logit, ``[B, T]`` float32, 0 without a label.

    The cross-entropy with a share ``s`` of the uniform distribution in the target is ``nll + s * margin``: both terms
    have the same log-sum-exp, and the mean logit is the product with the mean row of the head's weight.

    Args:
        hidden: ``[B, T, D]`` last hidden states.
        head: a linear layer, whose logits may be scaled.
        labels: ``[B, T]`` int64, not shifted.
    """
    linear, scale = _linear_part(head)
    rows, targets, mask = labelled(hidden, labels)
    direction = F.embedding(targets, linear.weight) - linear.weight.mean(0)  # [n, D]
    margin = (rows.float() * direction.float()).sum(-1)
    if linear.bias is not None:
        margin = margin + linear.bias[targets] - linear.bias.mean()
    return margin.new_zeros(labels.shape).masked_scatter(mask, margin * scale)


def _linear_part(head: Head) -> tuple[nn.Linear, float]:
    """Return the linear layer of a head and the factor of its logits; label smoothing needs no more of either."""
    given = TransformedHead.of(head)
    if given.softcap is not None:
        raise ValueError(
            f"label_smoothing and an LM that caps its logits at {given.softcap} do not combine; set it to 0."
        )
    if not isinstance(given.module, nn.Linear):
        raise ValueError(
            f"label_smoothing needs a linear LM head, not {type(given.module).__name__}; leave the head bare."
        )
    return given.module, given.scale
