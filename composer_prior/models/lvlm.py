"""The large vision-language model: vision tower -> projector -> causal language model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_prior.data.batch import ImageInputs, stack_images
from composer_prior.data.messages import one_line
from composer_prior.data.tokenizer import bos_id, image_token_ids, prompt_ids
from composer_prior.models.continuation import continuation_logprobs, same
from composer_prior.models.head import Head, TransformedHead, label_mask, labelled_nll
from composer_prior.models.label_logits import label_logits, on_text_alone
from composer_prior.models.language import (
    causal_lm_of,
    decoder_layers,
    generate_greedily,
    head_of,
    hidden_size,
    is_decoder_layer,
    is_recurrent,
    last_hidden_states,
    vocabulary_size,
)
from composer_prior.models.modeling_prior_lvlm import PriorLVLMForConditionalGeneration, decoder_of
from composer_prior.models.packing import enable_packing, packed_hidden_states
from composer_prior.models.pretrained import load_form, save_folder, tower_of


@dataclass(frozen=True)
class Caption:
    """A generated caption.

    Args:
        text: the caption.
        pieces: what each token adds to it, with its probability, where that was asked for.
    """

    text: str
    pieces: tuple[tuple[str, float | None], ...] = ()


class LVLM(nn.Module):
    """A causal LM that reads images, in plain PyTorch.

    Args:
        vision: an :class:`.OpenCLIPTower`, a :class:`.PatchEmbedding`, or None for a language model on text alone.
        projector: maps the tower's features to the LM's width; None when they have it.
        language: a Hugging Face causal LM whose embeddings hold the image tokens.
        tokenizer: its tokenizer, with the image tokens (:func:`.add_image_tokens`).
        label_smoothing: share of the uniform distribution over the vocabulary in the target of training, in [0, 1);
            the outputs then have ``smoothed_nll`` too. Default: ``0.0``.
        pack: put the samples of a batch into one row for the language model, so that it computes nothing on padding;
            see :mod:`.packing`. Default: ``False``.
    """

    def __init__(
        self,
        vision: nn.Module | None,
        projector: nn.Module | None,
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label_smoothing: float = 0.0,
        pack: bool = False,
    ):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: expected a share in [0, 1).")
        if label_smoothing:
            _linear_part(head_of(language))  # or refuse it before training
        generate_greedily(language, tokenizer)
        self.label_smoothing = label_smoothing
        self.vision = vision
        self.projector = projector or nn.Identity()
        self.language = language
        self.tokenizer = tokenizer
        self.image_token_id, self.row_token_id = image_token_ids(tokenizer)
        self.prompt = ""  # text between image and caption in training, where it is known
        self.label_logits = False  # whether forward gives those too
        self.pack = pack
        if pack:
            enable_packing(language)
        if vision is not None:
            _check_generation(language)
        if vision is not None and len(tokenizer) > vocabulary_size(language):
            raise ValueError(f"The LM embeds {vocabulary_size(language)} of {len(tokenizer)} tokens.")

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> "LVLM":
        """The model of a folder, or of a hub id, in Hugging Face form, in evaluation mode.

        Args:
            path: what :meth:`save_pretrained` has written.
            trust_remote_code: run code that comes with the language model. Default: ``False``.

        Raises:
            ModelFolderError: one line, naming what is wrong.
        """
        return cls.of(*load_form(path, trust_remote_code))

    @classmethod
    def of(cls, form: PriorLVLMForConditionalGeneration, processor: Any) -> "LVLM":
        """The model of one in Hugging Face form and its processor, with which it shares weights, in evaluation mode."""
        causal_lm: Any = form.causal_lm
        model = cls(tower_of(form), form.model.multi_modal_projector, causal_lm, processor.tokenizer)
        model.prompt = processor.prompt
        return model.eval()

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write the model in Hugging Face form, with tokenizer, image processor and the code that reads it.

        Args:
            folder: must not exist; it appears only when it is whole.
            card: text of the model card. Default: none is written.

        Raises:
            ValueError: for a model that has no Hugging Face form.
            FileExistsError: if the folder exists.
        """
        if Path(folder).exists():
            raise FileExistsError(f"{folder} exists; choose another folder, or remove it first.")
        save_folder(self, folder, self.state_dict(), self.prompt, card)

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks of tower and language model: the units that FSDP2 shards and activations are kept by.

        Embeddings, projector and head belong to none: the head is applied apart from its own forward pass.
        """
        return [*getattr(self.vision, "blocks", ()), *decoder_layers(self.language)]

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Composer's question, about each module of the model, whether it is a unit of FSDP2: one of :attr:`blocks`."""
        in_tower = any(module is block for block in getattr(self.vision, "blocks", ()))
        return in_tower or is_decoder_layer(module, self.language)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Composer's question whether what a module computes is computed again in the backward pass, and not kept."""
        return self.fsdp_wrap_fn(module)

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Input embeddings ``[B, T, D]``, image features in the places of the image tokens."""
        embeddings = self.language.get_input_embeddings()(batch["input_ids"])  # [B, T, D]
        if self.vision is None:
            return embeddings
        features = self.projector(self.vision(self._in_precision(batch)))  # [n, D], n image tokens in the batch
        places = batch["input_ids"] == self.image_token_id
        if not torch.compiler.is_compiling() and (tokens := int(places.sum())) != len(features):
            raise ValueError(
                f"The images have {len(features)} features and input_ids {tokens} image tokens: cut captions alone"
            )
        return embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))

    def _in_precision(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its images in the type of the tower's weights, which FSDP2 or the user may have lowered."""
        dtype = next((p.dtype for p in self.vision.parameters()), torch.float32)  # type: ignore[union-attr]
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``nll``: negative log-likelihood per token, ``[B, T]`` float32, 0 where there is no label; ``correct``: bool.

        Sequences are padded at the end, so causal attention needs no mask: no labelled position sees padding.
        """
        embeddings = self.embed(batch)
        if self.pack:
            hidden = packed_hidden_states(self.language, embeddings, batch["attention_mask"])  # [B, T, D]
        else:
            hidden = last_hidden_states(self.language, inputs_embeds=embeddings)
        nll, correct = labelled_nll(hidden, head_of(self.language), batch["labels"])
        outputs = {"nll": nll, "correct": correct}
        if self.label_logits:
            outputs["label_logits"] = label_logits(hidden, head_of(self.language), batch["labels"])
        if self.label_smoothing and self.training:
            margin = label_margin(hidden, head_of(self.language), batch["labels"])
            outputs["smoothed_nll"] = nll + self.label_smoothing * margin
        return outputs

    @torch.no_grad()
    def text_label_logits(self, input_ids: Tensor, is_text: Tensor, labels: Tensor) -> Tensor:
        """The logit of each label when the language model reads the text alone, as of :func:`.on_text_alone`."""

        def read(ids: Tensor, targets: Tensor) -> Tensor:
            return label_logits(last_hidden_states(self.language, input_ids=ids), head_of(self.language), targets)

        return on_text_alone(read, input_ids, is_text, labels)

    @property
    def image_processor(self) -> Callable[[Image.Image], ImageInputs]:
        """What turns an RGB image into the model's input."""
        if self.vision is None:
            raise ValueError("A language model without a vision tower cannot caption images.")
        process: Any = self.vision.image_processor
        return process

    def generate(
        self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64, **kwargs: Any
    ) -> list[str]:
        """Caption each image, with the KV cache; greedy unless ``kwargs`` of Hugging Face's ``generate`` say otherwise.

        Args:
            images: at least one PIL image.
            prompt: text between the image and the caption. Default: that of training, where it is known, or none.
            max_new_tokens: longest caption in tokens.
        """
        process = self.image_processor
        inputs = [process(image.convert("RGB")) for image in images]
        return [caption.text for caption in self.caption(inputs, prompt, max_new_tokens, **kwargs)]

    @torch.no_grad()
    def caption(
        self,
        images: Sequence[ImageInputs],
        prompt: str | None = None,
        max_new_tokens: int = 64,
        probabilities: bool = False,
        **kwargs: Any,
    ) -> list[Caption]:
        """:meth:`generate` for images that the image processor has prepared.

        Args:
            images, prompt, max_new_tokens, kwargs: as there.
            probabilities: give captions in pieces, each with the probability that the model gave it.
        """
        if probabilities:
            kwargs |= {"return_dict_in_generate": True, "output_logits": True}
        was_training = self.training
        self.eval()
        text = self.prompt if prompt is None else prompt
        # A recurrent layer reads padding too, so images of one length go together.
        groups = same([len(image.layout) for image in images]) if is_recurrent(self.language) else [range(len(images))]
        captions: list[Any] = [None] * len(images)
        try:
            for rows in groups:
                batch, attention_mask = self._generation_batch([images[row] for row in rows], text)
                found = self.generate_ids(batch, attention_mask, max_new_tokens=max_new_tokens, **kwargs)
                for row, caption in zip(rows, self._captions(found, probabilities), strict=True):
                    captions[row] = caption
        finally:
            self.train(was_training)
        return captions

    def _captions(self, found: Any, probabilities: bool) -> list[Caption]:
        """What :meth:`generate_ids` has returned, as text."""
        if not probabilities:
            return [Caption(text) for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]
        language: Any = self.language
        scores = language.compute_transition_scores(
            found.sequences, found.logits, found.get("beam_indices"), normalize_logits=True
        )
        return [self._in_pieces(ids, row.exp()) for ids, row in zip(found.sequences.tolist(), scores, strict=True)]

    @torch.no_grad()
    def text_logprobs(
        self, images: Sequence[ImageInputs], texts: Sequence[Sequence[Sequence[int]]], prompt: str | None = None
    ) -> list[list[list[float]]]:
        """``log P(text[t] | image, prompt, text[:t])`` of every token of the texts of each image, in nats.

        The tower reads an image once, and the language model reads image and prompt once, however many texts there are.

        Args:
            images: prepared by the image processor.
            texts: for each image the ids of its texts, each at least one token long.
            prompt: text between image and text. Default: that of training, where it is known, or none.
        """
        was_training = self.training
        self.eval()
        found: list[list[list[float]]] = [[] for _ in images]
        try:
            for rows in same([len(image.layout) for image in images]):
                batch, attention_mask = self._generation_batch(
                    [images[row] for row in rows], self.prompt if prompt is None else prompt
                )
                prefix = {"inputs_embeds": self.embed(batch), "attention_mask": attention_mask}
                decoder, head = decoder_of(causal_lm_of(self.language)), head_of(self.language)
                scores = continuation_logprobs(decoder, head, prefix, [texts[row] for row in rows])
                for row, values in zip(rows, scores, strict=True):
                    found[row] = values
        finally:
            self.train(was_training)
        return found

    def _in_pieces(self, ids: list[int], probabilities: Tensor) -> Caption:
        """A caption whose pieces are what each token adds to its text, or one where a token changes what was there."""
        pieces: list[tuple[str, float | None]] = []
        text = ""
        for count, probability in enumerate(probabilities.tolist(), 1):
            longer = str(self.tokenizer.decode(ids[:count], skip_special_tokens=True))
            whole = not longer.endswith("\N{REPLACEMENT CHARACTER}") or count == len(ids)  # of a character's bytes
            if whole and longer.startswith(text) and longer != text:
                pieces.append((longer[len(text) :], probability))
                text = longer
        caption = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Caption(caption, tuple(pieces) if text == caption else ((caption, None),))

    @torch.no_grad()
    def generate_ids(self, batch: Mapping[str, Tensor], attention_mask: Tensor, **kwargs: Any) -> Any:
        """Ids ``[B, S]`` int64 that continue the rows of a batch, or what Hugging Face's ``generate`` returns.

        A forward pass of its own: under FSDP2, torch's ``register_fsdp_forward_method`` lets it gather the weights.

        Args:
            batch: ``input_ids`` ``[B, T]``, padded to the left, and the image's tensors.
            attention_mask: ``[B, T]``, 1 on real positions.
            kwargs: of Hugging Face's ``generate``.
        """
        eos = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos
        generate: Any = self.language.generate
        if kwargs.get("num_beams", 1) > 1 and is_recurrent(self.language):
            name = type(causal_lm_of(self.language)).__name__
            raise ValueError(
                f"num_beams={kwargs['num_beams']}: {name} is recurrent, and its states follow no beam; use 1."
            )
        return generate(
            inputs_embeds=self.embed(batch),
            attention_mask=attention_mask,
            **{"do_sample": False, "eos_token_id": eos, "pad_token_id": pad, **kwargs},
        )

    def _generation_batch(self, images: Sequence[ImageInputs], prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        device = self.language.device
        text = prompt_ids(self.tokenizer, prompt)
        placeholders = (self.image_token_id, self.row_token_id)
        rows = [[bos_id(self.tokenizer), *(placeholders[kind] for kind in p.layout), *text] for p in images]
        longest = max(map(len, rows))
        # Padding goes to the left here: generation continues every row at its right end.
        input_ids = torch.tensor([[bos_id(self.tokenizer)] * (longest - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        batch = {"input_ids": input_ids, **stack_images([p.tensors for p in images])}
        return {key: value.to(device) for key, value in batch.items()}, attention_mask.to(device)


@torch.no_grad()
def _check_generation(language: PreTrainedModel) -> None:
    """Refuse, before it is trained on images, an LM that cannot generate from embeddings."""
    model: Any = causal_lm_of(language)
    reason = "its generate takes no inputs_embeds"
    works = model.can_generate() and "inputs_embeds" in signature(model.prepare_inputs_for_generation).parameters
    if works and is_recurrent(model) and model.device.type != "meta":
        image = torch.zeros(1, 3, hidden_size(model), device=model.device, dtype=model.dtype)
        mask = torch.ones(1, 3, dtype=torch.long, device=model.device)
        try:
            model.generate(inputs_embeds=image, attention_mask=mask, max_new_tokens=2)
        except Exception as error:  # whatever the code of some model raises
            works, reason = False, one_line(error)
    if not works:
        raise ValueError(f"{type(model).__name__} cannot caption images ({reason}); give another language model.")


def label_margin(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """By how much the logit of each label exceeds the mean logit, ``[B, T]`` float32, 0 without a label.

    The cross-entropy with a share ``s`` of the uniform distribution in the target is ``nll + s * margin``: both terms
    have the same log-sum-exp, and the mean logit is the product with the mean row of the head's weight.

    Args:
        hidden: ``[B, T, D]`` last hidden states.
        head: a linear layer, whose logits may be scaled.
        labels: ``[B, T]`` int64, not shifted.

    Raises:
        ValueError: for a head of which that does not hold.
    """
    linear, scale = _linear_part(head)
    mask = label_mask(labels)
    targets = labels[mask]
    direction = F.embedding(targets, linear.weight) - linear.weight.mean(0)  # [n, D]
    margin = (hidden[:, :-1][mask[:, 1:]].float() * direction.float()).sum(-1)
    if linear.bias is not None:
        margin = margin + linear.bias[targets] - linear.bias.mean()
    return margin.new_zeros(labels.shape).masked_scatter(mask, margin * scale)


def _linear_part(head: Head) -> tuple[nn.Linear, float]:
    """The linear layer of a head and the factor of its logits; label smoothing needs no more of either."""
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
