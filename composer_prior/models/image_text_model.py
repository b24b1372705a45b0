"""An image-text-to-text model of transformers at work: captions of images, and likelihoods of texts."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache, PretrainedConfig

from composer_prior.data.chat import DATED, first_token
from composer_prior.data.hub import ModelFolderError, find_model, load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.data.processing import check_height, image_placeholder, image_tokens
from composer_prior.data.tokenizer import encode_caption, prompt_ids
from composer_prior.models.head import Head, target_logprobs
from composer_prior.models.language import (
    as_forward,
    causal_lm_of,
    check_decoder,
    decoder_of,
    evaluating,
    generate_greedily,
    head_of,
    is_recurrent,
    parts_of,
)
from composer_prior.models.model_folder import load_processor, save_model_folder
from composer_prior.models.prior_lvlm import PriorLVLMConfig, PriorLVLMForConditionalGeneration, PriorLVLMProcessor
from composer_prior.models.reference import batches_by_length

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # of one pass of likelihoods, its beginning included


@dataclass(frozen=True)
class Caption:
    """A generated caption."""

    text: str
    pieces: tuple[tuple[str, float | None], ...] = ()  # what each token adds, with its probability, where asked for


class TokenLogprobs(NamedTuple):
    """Log-probability of each token of a text, and which characters of the text it is."""

    values: list[float]  # in nats; the last is that of the end of the sequence, where that was asked for
    offsets: list[tuple[int, int]]  # ``[start, end)`` of each token in the text; ``(n, n)`` for the end of the sequence


class ImageTextModel:
    """A model of transformers with its processor, such as :func:`~composer_prior.inference.loading.load` returns.

    Args:
        model: such as a :class:`.PriorLVLMForConditionalGeneration`, a LLaVA, a Qwen2-VL or an Idefics3, or one of PEFT
            around it. It generates the most likely tokens unless a call says otherwise, whatever its configuration
            says.
        processor: of the model. With a chat template, image and prompt are what the user says.

    Raises:
        ValueError: for a model without a decoder and a head.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        check_decoder(causal_lm_of(model))
        generate_greedily(model)

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> "ImageTextModel":
        """Load model and processor from a folder or hub id, in evaluation mode.

        Args:
            path: the folder or hub id.
            trust_remote_code: run code that comes with the model. Default: ``False``.

        Raises:
            ModelFolderError: one line, naming what is wrong.
        """
        if Path(path).is_dir() and not Path(path, "config.json").is_file():  # transformers would guess by the name
            raise ModelFolderError(f"{path} holds no model: it has no config.json.")
        try:
            processor_class, _, model_class = captioner_classes(path, trust_remote_code)
            processor = load_processor(processor_class, path, trust_remote_code)
            model, found = load_pretrained(model_class, path, trust_remote_code, output_loading_info=True)
        except ModelFolderError:
            raise
        except Exception as error:  # whatever the code of some model raises
            raise ModelFolderError(f"{path} holds no model that can be loaded: {one_line(error)}") from error
        differing = differing_weights(found, unexpected=isinstance(model, PriorLVLMForConditionalGeneration))
        if differing:
            raise ModelFolderError(f"{path} is not whole: {len(differing)} weights differ, such as {differing[0]}.")
        return cls(model.eval(), processor)

    def to(self, device: torch.device | str) -> "ImageTextModel":
        """Move the model's weights."""
        self.model.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and processor with the code that reads them, see :func:`.save_model_folder`.

        The folder must not exist; it appears only when it is whole.
        """
        if Path(folder).exists():
            raise FileExistsError(f"{folder} exists; choose another folder, or remove it first.")
        save_model_folder(self.model, self.processor, folder, self.model.state_dict())

    @property
    def prompt(self) -> str:
        """Text between image and caption in training, where it is known."""
        return getattr(self.processor, "prompt", "")

    def inputs(self, images: Sequence[Image.Image], prompt: str | None = None) -> dict[str, Tensor]:
        """Return what :meth:`generate` takes, see :func:`model_inputs`."""
        return self._taken(model_inputs(self.processor, images, prompt))

    def generate_captions(
        self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64, **kwargs: Any
    ) -> list[str]:
        """Caption each image; greedy unless ``kwargs`` of Hugging Face's ``generate`` say otherwise.

        Args:
            images: Pillow's, at least one.
            prompt: text between the image and the caption. Default: that of training, where it is known, or none.
            max_new_tokens: longest caption in tokens. Default: ``64``.
            **kwargs: of ``generate``.
        """
        return [caption.text for caption in self.generate(self.inputs(images, prompt), max_new_tokens, **kwargs)]

    @torch.no_grad()
    def generate(
        self, inputs: Mapping[str, Tensor], max_new_tokens: int = 64, probabilities: bool = False, **kwargs: Any
    ) -> list[Caption]:
        """Continue each row of :meth:`inputs`.

        Args:
            inputs: padded on the left.
            max_new_tokens: longest caption in tokens. Default: ``64``.
            probabilities: give captions in pieces, each with the probability that the model gave it.
            **kwargs: of Hugging Face's ``generate``; a recurrent language model takes no beams.
        """
        recurrent = is_recurrent(self.model)
        if recurrent and kwargs.get("num_beams", 1) > 1:
            name = type(parts_of(self.model)["language"]).__name__
            raise ValueError(
                f"num_beams={kwargs['num_beams']}: {name} is recurrent, and its states follow no beam; use 1."
            )
        if probabilities:
            kwargs |= {"return_dict_in_generate": True, "output_logits": True}
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs}
        lengths = inputs["attention_mask"].sum(1).tolist()
        # A recurrent layer reads padding too, so rows of one length go together.
        groups = same(lengths) if recurrent else [list(range(len(lengths)))]
        captions: list[Any] = [None] * len(lengths)
        with evaluating(self.model):
            for rows in groups:
                given = self._rows(inputs, rows)
                found = as_forward(self.model, self.model.generate, **given, **options)
                start = given["input_ids"].shape[1]
                for row, caption in zip(rows, self._captions(found, start, probabilities), strict=True):
                    captions[row] = caption
        return captions

    def _taken(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the model takes of a processor's tensors: some tokenizers give ``token_type_ids`` to any."""
        base: Any = causal_lm_of(self.model)
        steps = (base.forward, base.prepare_inputs_for_generation)
        names = {name for step in steps for name in inspect.signature(step).parameters}
        return {key: value for key, value in inputs.items() if key in names}

    def _rows(self, inputs: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """Return some rows of what the model takes, on its device and without the padding that all of them have."""
        inputs = self._taken(inputs)
        if len(rows) == len(inputs["input_ids"]):
            return {key: value.to(self.model.device) for key, value in inputs.items()}
        chosen = {key: value[list(rows)] for key, value in inputs.items()}
        padding = int((chosen["attention_mask"] == 0).sum(1).min())
        chosen |= {key: chosen[key][:, padding:] for key in ("input_ids", "attention_mask")}
        return {key: value.to(self.model.device) for key, value in chosen.items()}

    def _captions(self, found: Any, start: int, probabilities: bool) -> list[Caption]:
        """Return what a model's ``generate`` has returned as text."""
        if not probabilities:
            return [Caption(text) for text in self.tokenizer.batch_decode(found[:, start:], skip_special_tokens=True)]
        scores = self.model.compute_transition_scores(
            found.sequences, found.logits, found.get("beam_indices"), normalize_logits=True
        )
        new = found.sequences[:, start:].tolist()
        return [self._in_pieces(ids, row.exp()) for ids, row in zip(new, scores, strict=True)]

    def _in_pieces(self, ids: list[int], probabilities: Tensor) -> Caption:
        """Return a caption whose pieces are what each token adds; one piece where a token changes what was there."""
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

    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        """Return the log-probabilities of the texts of each image.

        Args:
            images: Pillow's.
            texts: for each image the texts that are scored with it.
            prompt: text between image and text. Default: that of training, where it is known, or none.
            end: score the end of the sequence too.
        """
        encoded = [[encode_text(self.tokenizer, text, end) for text in some] for some in texts]
        ids = [[one for one, _ in some] for some in encoded]
        return with_offsets(self.text_logprobs(images, ids, prompt), encoded)

    @torch.no_grad()
    def text_logprobs(
        self, images: Sequence[Image.Image], texts: Sequence[Sequence[Sequence[int]]], prompt: str | None = None
    ) -> list[list[list[float]]]:
        """Return ``log P(text[t] | image, prompt, text[:t])`` of every token of the texts of each image, in nats.

        The model reads image and prompt once, however many texts there are.

        Args:
            images: Pillow's.
            texts: for each image the ids of its texts, each at least one token long.
            prompt: text between image and text. Default: that of training, where it is known, or none.
        """
        inputs = self.inputs(images, prompt)
        groups = same(inputs["attention_mask"].sum(1).tolist())
        cuts = all(len(value) == len(images) for value in inputs.values())
        if len(groups) > 1 and not cuts:  # images without a batch dimension, such as Qwen2-VL's
            return [self.text_logprobs([image], [some], prompt)[0] for image, some in zip(images, texts, strict=True)]
        found: list[list[list[float]]] = [[] for _ in images]
        with evaluating(self.model):
            for rows in groups:
                of_rows = [texts[row] for row in rows]
                scores = as_forward(self.model, self._continue, self._rows(inputs, rows), of_rows)
                for row, values in zip(rows, scores, strict=True):
                    found[row] = values
        return found

    def _continue(self, prefix: Mapping[str, Tensor], texts: Sequence[Sequence[Sequence[int]]]) -> Any:
        base: Any = causal_lm_of(self.model)
        decoder: Any = decoder_of(base)
        if isinstance(base, PriorLVLMForConditionalGeneration):  # a recurrent decoder reads the beginning again
            rest = {key: value for key, value in prefix.items() if key != "attention_mask"}
            prefix = {"inputs_embeds": base.model.embed(**rest), "attention_mask": prefix["attention_mask"]}
            decoder = base.get_decoder()
        return continuation_logprobs(decoder, head_of(self.model), prefix, texts)


def classes_of(path: str | Path, trust_remote_code: bool = False) -> tuple[Any, Any, Any] | None:
    """Return the classes of processor, configuration and model of a folder or hub id; None if it sees no images."""
    settings, _ = PretrainedConfig.get_config_dict(find_model(path))
    if settings.get("model_type") == PriorLVLMConfig.model_type:  # never the copy of the code in its folder
        return PriorLVLMProcessor, PriorLVLMConfig, PriorLVLMForConditionalGeneration
    known = captions_images(load_pretrained(AutoConfig, path, trust_remote_code))
    return (AutoProcessor, AutoConfig, AutoModelForImageTextToText) if known else None


def captioner_classes(path: str | Path, trust_remote_code: bool = False) -> tuple[Any, Any, Any]:
    """Return what :func:`classes_of` does; raise ModelFolderError for a model that sees no images."""
    classes = classes_of(path, trust_remote_code)
    if classes is None:
        settings, _ = PretrainedConfig.get_config_dict(find_model(path))
        raise ModelFolderError(f"{path} holds a {settings.get('model_type')}, which captions no images.")
    return classes


def captions_images(config: PretrainedConfig) -> bool:
    """Return True if a configuration is that of an image-text-to-text model, of transformers or of code beside it."""
    model: Any = AutoModelForImageTextToText
    return type(config) in model._model_mapping or model.__name__ in (getattr(config, "auto_map", None) or {})


@torch.no_grad()
def continuation_logprobs(
    decoder: Any,
    head: Head,
    prefix: Mapping[str, Tensor],
    texts: Sequence[Sequence[Sequence[int]]],
    batch_tokens: int | None = None,
) -> list[list[list[float]]]:
    """``log P(text[t] | beginning, text[:t])`` of every token of the texts that go on from each of ``P`` beginnings.

    The head is applied on what predicts a token and nowhere else.

    Args:
        decoder: maps tensors to hidden states with a cache of keys and values: the part of a causal LM, or of an
            image-text-to-text model of transformers, that stands under its head. In evaluation mode.
        head: maps ``[n, D]`` hidden states to ``[n, V]`` logits.
        prefix: the decoder's input for the beginnings, of one length ``T``, without padding: ``inputs_embeds``
            ``[P, T, D]``, or ``input_ids`` ``[P, T]`` with the tensors of images; and ``attention_mask`` ``[P, T]``.
        texts: for each beginning the ids of its texts, each at least one token long.
        batch_tokens: positions of one pass, beginnings and padding included. Default: 4,096 on a CPU, else 65,536.

    Returns:
        for each beginning and each of its texts a float per token, in nats.
    """
    counts = [len(some) for some in texts]
    ids = [text for some in texts for text in some]
    mask = prefix["attention_mask"]
    device = mask.device
    if not ids:
        return [[] for _ in texts]
    owners = torch.repeat_interleave(torch.tensor(counts))  # [N], the beginning of each text
    lengths = torch.tensor([len(text) for text in ids])
    again = is_recurrent(decoder)
    if again and "inputs_embeds" not in prefix:
        raise ValueError(
            f"{type(decoder).__name__} is recurrent: it keeps nothing that several texts could go on from."
        )
    start = decoder(**prefix, use_cache=not again)
    last = start.last_hidden_state[:, -1]  # [P, D], predicts the first token
    values: list[list[float]] = [[] for _ in ids]
    budget = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    for rows in batches_by_length(lengths + mask.shape[1], budget):
        padded = pad_sequence([torch.tensor(ids[row]) for row in rows.tolist()], batch_first=True).to(device)  # [b, s]
        owner = owners[rows].to(device)
        hidden = torch.cat([last[owner, None], _go_on(decoder, prefix, start, owner, padded[:, :-1])], 1)  # [b, s, D]
        real = (torch.arange(padded.shape[1]) < lengths[rows, None]).to(device)
        found = target_logprobs(hidden[real], head, padded[real]).cpu().split(lengths[rows].tolist())
        for row, scores in zip(rows.tolist(), found, strict=True):
            values[row] = scores.tolist()
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _go_on(decoder: Any, prefix: Mapping[str, Tensor], start: Any, owner: Tensor, ids: Tensor) -> Tensor:
    """Return the hidden states ``[b, s, D]`` of texts, each after its beginning."""
    if not ids.shape[1]:
        return start.last_hidden_state[owner, :0]
    if not isinstance(start.get("past_key_values"), DynamicCache):  # as of recurrent models: read the beginning again
        if "inputs_embeds" not in prefix:
            raise ValueError(f"{type(decoder).__name__} keeps no keys and values that texts could go on from.")
        embedded = decoder.get_input_embeddings()(ids)
        whole = torch.cat([prefix["inputs_embeds"][owner].to(embedded.dtype), embedded], 1)
        return decoder(inputs_embeds=whole, use_cache=False).last_hidden_state[:, -ids.shape[1] :]
    mask = prefix["attention_mask"]
    cache = copy.copy(start.past_key_values)
    cache.layers = [copy.copy(layer) for layer in cache.layers]  # what is appended is appended to copies
    cache.batch_select_indices(owner)
    inputs: dict[str, Any] = {"attention_mask": mask.new_ones(len(ids), mask.shape[1] + ids.shape[1])}
    if getattr(decoder, "rope_deltas", None) is not None:  # Qwen-VL: an image takes fewer positions than tokens
        places = torch.arange(mask.shape[1], mask.shape[1] + ids.shape[1], device=ids.device)
        inputs["position_ids"] = (places + decoder.rope_deltas.reshape(-1, 1)[owner]).expand(3, -1, -1)
    return decoder(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).last_hidden_state


def same(values: Sequence[Any]) -> list[list[int]]:
    """Group the indices of equal values."""
    return [[i for i, other in enumerate(values) if other == value] for value in dict.fromkeys(values)]


def model_inputs(processor: Any, images: Sequence[Image.Image], prompt: str | None = None) -> dict[str, Tensor]:
    """Return what stands before captions, as a model's processor writes it: image and prompt, padded on the left.

    The default of the prompt is that of training, where it is known, or none; it must not spell the image.
    """
    text = getattr(processor, "prompt", "") if prompt is None else prompt
    prompt_ids(processor.tokenizer, text, image_tokens(processor))
    if not isinstance(processor, PriorLVLMProcessor):
        for image in images:
            check_height(processor, image)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        turn = {"role": "user", "content": content}
        written = processor.apply_chat_template([turn], add_generation_prompt=True, **DATED)
    else:
        written = image_placeholder(processor) + text
    pictures = [[image.convert("RGB")] for image in images]
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if written.startswith(first_token(processor.tokenizer)):
        options["add_special_tokens"] = False
    found = processor(images=pictures, text=[written] * len(images), **options)
    return {key: value for key, value in found.items() if key != "labels"}  # PaliGemma's, of no suffix


def encode_text(tokenizer: Any, text: str, end: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text, and the characters of it that each is; refuse a text without tokens."""
    encoding = encode_caption(tokenizer, text)
    ids, offsets = [*encoding.ids], [*encoding.offsets]
    if end:
        ids.append(tokenizer.eos_token_id)
        offsets.append((len(text), len(text)))
    if not ids:
        raise ValueError("A text without tokens has no likelihood; give one that is not empty.")
    return ids, offsets


def with_offsets(values: list[list[list[float]]], encoded: Sequence[Sequence[Any]]) -> list[list[TokenLogprobs]]:
    """Join log-probabilities with the offsets of :func:`encode_text`."""
    return [
        [TokenLogprobs(one, offsets) for one, (_, offsets) in zip(scores, some, strict=True)]
        for scores, some in zip(values, encoded, strict=True)
    ]


def differing_weights(found: Mapping[str, Any], unexpected: bool = True) -> list[str]:
    """Return what transformers' ``output_loading_info`` calls missing, of another shape, or ``unexpected``."""
    names = {*found["missing_keys"], *map(str, found["mismatched_keys"])}
    return sorted(names | ({*found["unexpected_keys"]} if unexpected else set()))
