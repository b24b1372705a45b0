"""Image-caption pairs from mosaicml-streaming, as the batches of models."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from composer.core import DataSpec
from PIL import Image
from streaming import StreamingDataLoader
from streaming.base.format.mds import MDSReader
from torch import Tensor
from torchvision.datasets import VisionDataset
from transformers import PreTrainedTokenizerBase

from composer_prior.data.batch import (
    IGNORE_INDEX,
    IMAGES,
    PROCESSED,
    CaptionCollator,
    ImageInputs,
    count_tokens,
    split_packed_images,
)
from composer_prior.data.chat import ChatFormat, NoTemplateError, Written, characters, within
from composer_prior.data.conversations import ChatError, unpack_images
from composer_prior.data.download import ATTEMPTS
from composer_prior.data.images import ImageError, decode_rgb
from composer_prior.data.messages import OneLineError, one_line, visible
from composer_prior.data.opening import sample_captions
from composer_prior.data.processing import ProcessorInputs, image_placeholder, image_tokens
from composer_prior.data.rows import RowsDataset, RowsLoader, count_rows
from composer_prior.data.scores import KEYS, Scores, ScoresError, index_fingerprint, open_scores
from composer_prior.data.streams import CheckedDataset
from composer_prior.data.tokenizer import (
    CaptionFormat,
    bos_id,
    encode_caption,
    has_image_tokens,
    image_token_ids,
    placeholder,
    prompt_ids,
    reserved_ids,
)
from composer_prior.registry import Count

log = logging.getLogger(__name__)

SPANS_COLUMN = "image_related_spans"


class BadSampleError(OneLineError, ValueError):
    """A sample that cannot be used, as its image does not decode or its caption is empty."""


class StreamingCaptionDataset(RowsDataset, VisionDataset):
    """Captions, conversations and documents of an MDS data set, local or remote, tokenized and preprocessed.

    A caption has the columns ``image`` (bytes) and ``caption`` (str). An optional column ``image_related_spans`` (json,
    ``[[start, end], ...]`` in characters of the caption, null where they are unknown) marks the words that the image
    determines. Sample ``i`` is a dict of tensors: ``input_ids`` and ``labels`` ``[T]`` int64, ``image_related`` ``[T]``
    bool if there are spans, the image's tensors, and ``sample_id``; of several streams also ``stream``, its position
    in ``stream_names``.

    With the columns ``messages`` (json) and ``images`` (bytes) a sample is a conversation or a document with any number
    of images, see :mod:`composer_prior.data.conversations`. Its learned tokens have labels, and ``text_mask`` ``[T]``
    bool is False on images.

    With a column ``captions`` (json, a list) instead of ``caption``, and spans for each of them, every epoch of a
    shuffled data set draws one caption, which depends on ``shuffle_seed``, epoch and ``sample_id`` alone. A data set
    that is not shuffled, such as one for validation, always draws the same caption.

    Args:
        tokenizer: a fast Hugging Face tokenizer, with the image tokens (:func:`.add_image_tokens`) unless the image
            processor is a :class:`.ProcessorInputs`.
        image_processor: that of the model, a function from an image to :class:`.ImageInputs`; None reads only captions
            and decodes no image.
        transform: RGB image -> RGB image of any size, before the image processor; Composer's ``RandAugment``,
            ``AugMix`` and ``ColOut(batch=False)`` put theirs here.
        prompt: text between image and caption; its tokens have no label.
        max_caption_tokens: a longer caption is cut there, and then has no end-of-sequence token. Default: ``128``.
        max_tokens: a longer conversation or document, its images included, is cut there; one whose images would be cut,
            or of which nothing would be learned, is a bad sample; also the length of a packed row. Default: ``2048``.
        packing_ratio: the mean number of samples in a packed row, from which the length of an epoch follows; ``"auto"``
            measures it; None does not pack. See :mod:`composer_prior.data.rows`. Default: ``None``.
        on_bad_sample: ``"raise"``, or ``"skip"``: the sample stays in its batch without labels, and so without
            effect, and a warning names it. Default: ``"raise"``.
        scores: folder or URL of the stored reference log-probabilities; samples then have ``ref_logprobs``
            (``[T]`` float32, aligned with ``labels``, 0 where there is none).
        viewer_scores: likewise those of a viewer, a model that sees the images; samples then have ``viewer_logprobs``.
        kwargs: those of :class:`.CheckedDataset`, which are those of :class:`streaming.StreamingDataset`.

    Raises:
        DataError: for an index or a shard that cannot be read.
        ScoresError: for scores that are missing or belong to something else, naming what differs.
        BadSampleError: naming the sample and its shard.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Callable[[Image.Image], ImageInputs] | None = None,
        transform: Callable[[Image.Image], Image.Image] | None = None,
        prompt: str = "",
        max_caption_tokens: Count = 128,
        max_tokens: Count = 2048,
        packing_ratio: float | Literal["auto"] | None = None,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        scores: str | None = None,
        viewer_scores: str | None = None,
        **kwargs: Any,
    ):
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"on_bad_sample={on_bad_sample!r}: expected 'raise' or 'skip'.")
        if isinstance(packing_ratio, int | float) and packing_ratio < 1:
            raise ValueError(f"packing_ratio={packing_ratio}: expected at least 1 sample in a row, or auto.")
        CheckedDataset.__init__(self, **kwargs)
        VisionDataset.__init__(self, transform=transform)
        columns = [frozenset(cast(MDSReader, shard).column_names) for shard in self.shards]
        for shard_id, names in enumerate(columns):
            image = "images" if "messages" in names else "image"
            if not names & {"caption", "captions", "messages"} or (image_processor is not None and image not in names):
                listed = ", ".join(sorted(names))
                raise ValueError(
                    f"{self.shard_name(shard_id)} has the columns {listed}; expected image and caption, or images and "
                    "messages."
                )
        self.has_several_captions = any("captions" in names for names in columns)
        self.has_messages = any("messages" in names for names in columns)
        stored = {key: path for key, path in (("scores", scores), ("viewer_scores", viewer_scores)) if path}
        for key, path in stored.items():
            check_scorable(self, path, key)
        self.has_spans = all(SPANS_COLUMN in names for names in columns)
        self.epoch = 0
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.prompt = prompt
        if self.has_messages and isinstance(image_processor, ProcessorInputs) and image_processor.caption_type:
            raise ValueError("PaliGemma sees text before a caption both ways: it learns captions, no conversations.")
        theirs = image_tokens(image_processor.processor) if isinstance(image_processor, ProcessorInputs) else []
        self.prompt_ids = prompt_ids(tokenizer, prompt, theirs)
        self.reserved_ids = reserved_ids(tokenizer, theirs)
        if isinstance(image_processor, ProcessorInputs):
            self.image_processor = replace(image_processor, prompt=prompt, caption_tokens=max_caption_tokens)
        elif image_processor is not None:
            image_token_ids(tokenizer)  # or refuse it here
        self.max_caption_tokens = max_caption_tokens
        self.max_tokens = max_tokens
        self.packing_ratio = packing_ratio
        self.on_bad_sample = on_bad_sample
        self.bos_id = bos_id(tokenizer)
        patience = {"attempts": self.streams[0].download_retry, "seconds": self.streams[0].download_timeout}
        cache = Path(self.streams[0].local, ".scores")
        self.scores = {KEYS[key]: open_scores(path, self, cache, KEYS[key], **patience) for key, path in stored.items()}

    @cached_property
    def placeholder_ids(self) -> tuple[int, int]:
        """The ids of the image token and of the row separator."""
        return image_token_ids(self.tokenizer)

    @cached_property
    def chat(self) -> ChatFormat:
        """How conversations and documents become text."""
        processor = self.image_processor.processor if isinstance(self.image_processor, ProcessorInputs) else None
        return ChatFormat(self.tokenizer, image_placeholder(processor) if processor else placeholder(self.tokenizer))

    @property
    def chat_digest(self) -> str:
        """Return a digest of how conversations and documents become text; "" where there are none."""
        known = repr((self.tokenizer.chat_template, self.max_tokens, "a space belongs to the token behind it"))
        return hashlib.sha256(known.encode()).hexdigest()[:16] if self.has_messages else ""

    @property
    def identity(self) -> dict[str, Any]:
        """Return what else than the indices decides which samples an epoch has, and how conversations become text."""
        found: dict[str, Any] = {}
        if self.has_messages:
            template = hashlib.sha256(repr(self.tokenizer.chat_template).encode()).hexdigest()[:16]
            found |= {"chat_template": template, "max_tokens": self.max_tokens}
        if len(self.streams) > 1:
            drawn = zip(self.stream_names, self.streams, strict=True)
            found["samples_per_epoch"] = {name: int(stream.choose) for name, stream in drawn}
        elif self.epoch_size != self.num_samples:
            found["samples_per_epoch"] = int(self.epoch_size)
        if self.packing_ratio is not None:
            found |= {"packing_ratio": self.packing_ratio, "max_tokens": self.max_tokens}
        return found

    @property
    def format(self) -> CaptionFormat:
        """Return how captions become tokens."""
        return CaptionFormat(self.tokenizer, self.prompt, self.max_caption_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Return a digest of the indices of all streams, which hold the shards' sizes and hashes."""
        indices = [Path(stream.local, stream.split or "", "index.json") for stream in self.streams]
        return index_fingerprint(index.read_bytes() for index in indices)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        try:
            return self._encode(self._read(sample_id, retry), sample_id)
        except BadSampleError as error:
            message = f"{self.sample_name(sample_id)}: {error}"
            if self.on_bad_sample == "raise":
                raise BadSampleError(f"{message} (on_bad_sample=skip goes on without it)") from error
            log.warning("Skipped %s", visible(message))
            return self._without_labels(sample_id)

    def image_and_caption(self, sample_id: int) -> tuple[Image.Image, str]:
        """Return the image of a sample and its caption in this epoch.

        Raises:
            BadSampleError: naming the sample.
        """
        try:
            sample = self._read(sample_id, ATTEMPTS)
            return decode_image(sample["image"]), self._draw(sample, sample_id)[0]
        except BadSampleError as error:
            raise BadSampleError(f"{self.sample_name(sample_id)}: {error}") from error

    def _read(self, sample_id: int, retry: int) -> Mapping[str, Any]:
        try:
            return super().get_item(sample_id, retry)
        except (ValueError, IndexError) as error:
            raise BadSampleError(f"its bytes in the shard are damaged ({one_line(error)})") from error

    def _resume_incr_epoch(self) -> tuple[int, int]:
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self.epoch, sample_in_epoch

    def _encode(self, sample: Mapping[str, Any], sample_id: int) -> dict[str, Any]:
        if "messages" in sample:
            return self._encode_messages(sample, sample_id)
        caption, spans = self._draw(sample, sample_id)
        if not caption.strip():
            raise BadSampleError("the caption is empty")
        encoding = encode_caption(self.tokenizer, caption)
        if not self.reserved_ids.isdisjoint(encoding.ids):
            token = next(
                token for token, i in zip(encoding.tokens, encoding.ids, strict=True) if i in self.reserved_ids
            )
            raise BadSampleError(f"the caption spells {token}, which the tokenizer takes for its own")
        caption_ids = [*encoding.ids, self.tokenizer.eos_token_id][: self.max_caption_tokens]
        image = self._image_inputs(sample)
        item = self._item(image, caption_ids, sample_id)
        if self.has_spans:
            related = overlaps(encoding.offsets[: len(caption_ids)], _checked_spans(spans))
            item["image_related"] = torch.zeros(len(item["labels"]), dtype=torch.bool)
            start = len(item["labels"]) - len(caption_ids)
            item["image_related"][start : start + len(related)] = torch.tensor(related, dtype=torch.bool)
        return item

    def _encode_messages(self, sample: Mapping[str, Any], sample_id: int) -> dict[str, Any]:
        written = self._written(sample["messages"])
        try:
            pictures = unpack_images(sample["images"]) if self.image_processor is not None else []
        except ChatError as error:
            raise BadSampleError(str(error)) from error
        if self.image_processor is not None and len(pictures) != len(written.images):
            raise BadSampleError(f"the text names {len(written.images)} images and the sample has {len(pictures)}")
        if len(pictures) >= self.max_tokens:  # each takes a token or more: before any is decoded
            raise BadSampleError(f"its {len(pictures):,} images end behind max_tokens={self.max_tokens:,}")
        if isinstance(self.image_processor, ProcessorInputs):
            images = [self._prepared(data) for data in pictures]
            try:
                aligned, tensors = self.image_processor.read(images, written)
            except ValueError as error:
                raise BadSampleError(f"its {len(images)} images cannot be processed: {one_line(error)}") from error
            item: dict[str, Any] = {PROCESSED: tensors}
        else:
            processed = [self._image_inputs({"image": data}) for data in pictures]
            aligned = self._between(written, processed)
            item = {IMAGES: [image.tensors for image in processed]}
        last = max((place for place, is_text in enumerate(aligned["text_mask"], 1) if not is_text), default=0)
        if last > self.max_tokens:
            raise BadSampleError(f"its images end at token {last:,}, behind max_tokens={self.max_tokens:,}")
        aligned.pop("characters", None)
        whole = aligned.pop("learned")
        learned = torch.tensor(whole[: self.max_tokens])
        item |= {key: torch.tensor(values[: self.max_tokens]) for key, values in aligned.items()}
        if not learned.any():
            raise BadSampleError(f"none of its first {self.max_tokens:,} tokens is learned: raise max_tokens")
        item |= {"labels": item["input_ids"].where(learned, IGNORE_INDEX), **self._numbers(sample_id)}
        for column, scores in self.scores.items():
            values = self._logprobs(scores, sample_id, int(learned.sum()), sum(whole))
            item[column] = torch.zeros(len(learned)).masked_scatter(learned, values)
        return item

    def text_of(self, messages: Any) -> tuple[Written, dict[str, list[Any]]]:
        """Return a conversation or document as text, and its tokens without its images, however many.

        Each token has an entry in ``input_ids``, ``learned`` (bool) and ``characters``, its start and end in the text.

        Raises:
            BadSampleError: for one that cannot be used.
        """
        written = self._written(messages)
        return written, self._between(written, ())

    def check_template(self) -> None:
        """Read the first sample of each stream, and raise NoTemplateError if it needs a template that is missing."""
        if self.has_messages and self.tokenizer.chat_template is None:
            for first in self.sample_offset_per_shard[self.shard_offset_per_stream]:
                try:
                    self.chat.write(self._read(int(first), ATTEMPTS).get("messages", []))
                except NoTemplateError:
                    raise
                except (ChatError, BadSampleError):
                    continue  # the sample is told of when it is read in training

    def _written(self, messages: Any) -> Written:
        """Return a conversation or document as text; raise BadSampleError for one that cannot be used."""
        if isinstance(messages, list) and len(messages) > self.max_tokens:  # the time grows with the square of turns
            raise BadSampleError(f"its {len(messages):,} messages take more than max_tokens={self.max_tokens:,}")
        try:
            return self.chat.write(messages)
        except ChatError as error:
            raise BadSampleError(str(error)) from error

    def _between(self, written: Written, images: Sequence[ImageInputs]) -> dict[str, list[Any]]:
        """Return the tokens of a text with its images between, or without any; see :meth:`.ProcessorInputs.read`."""
        tokens = [(self.bos_id, False, True, (0, 0))]  # id, learned, text, characters
        layouts = iter([image.layout for image in images])
        starts = [0, *(end for _, end in written.images)] if has_image_tokens(self.tokenizer) else [0]
        ends = [*(start for start, _ in written.images), len(written.text)][-len(starts) :]
        for start, end in zip(starts, ends, strict=True):  # each piece is read on its own, as our processor does
            layout = next(layouts, []) if start else []
            tokens += [(self.placeholder_ids[kind], False, False, (start, start)) for kind in layout]
            text = written.text[start:end]
            encoding = self.tokenizer(text, add_special_tokens=False).encodings[0]
            offsets = [(first + start, last + start) for first, last in characters(encoding, text)]
            kinds = zip(*(within(offsets, spans) for spans in (written.learned, written.images)), strict=True)
            known = zip(encoding.ids, kinds, offsets, strict=True)
            read = [(i, learned, True, place) for i, (learned, is_image), place in known if not is_image]
            tokens += read[start == 0 and encoding.ids[:1] == [self.bos_id] :]
        names = ("input_ids", "learned", "text_mask", "characters")
        return {name: [*values] for name, values in zip(names, zip(*tokens, strict=True), strict=True)}

    def _draw(self, sample: Mapping[str, Any], sample_id: int) -> tuple[str, Any]:
        """Return the caption of a sample in this epoch, and its spans."""
        if "captions" not in sample:
            return sample["caption"], sample.get(SPANS_COLUMN)
        captions, spans = sample["captions"], sample.get(SPANS_COLUMN)
        if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
            raise BadSampleError("captions is not a list of texts")
        if not (spans is None or (isinstance(spans, list) and len(spans) == len(captions))):
            raise BadSampleError(f"{SPANS_COLUMN} is not a list with spans for each of the {len(captions)} captions")
        key = (self.shuffle_seed, self.epoch if self.shuffle else 0, sample_id)
        chosen = draw(len(captions), *key)
        return captions[chosen], None if spans is None else spans[chosen]

    def _image_inputs(self, sample: Mapping[str, Any]) -> ImageInputs:
        if self.image_processor is None:
            return ImageInputs({}, [])
        return self._prepared(sample["image"], self.image_processor)

    def _prepared(self, data: bytes, process: Callable[[Image.Image], Any] = lambda image: image) -> Any:
        """Return an image, transformed and processed."""
        image = decode_image(data)
        try:
            if self.transform is not None:
                image = self.transform(image.copy())  # a plain Image: Composer's transforms refuse a PngImageFile
            return process(image)
        except (ValueError, OSError) as error:  # of Pillow and torchvision
            raise BadSampleError(
                f"the image of {image.width} x {image.height} pixels cannot be processed: {one_line(error)}"
            ) from error

    def _item(self, image: ImageInputs, caption_ids: list[int], sample_id: int) -> dict[str, Any]:
        aligned = image.prefix
        if aligned is None:
            layout = [self.placeholder_ids[kind] for kind in image.layout]
            aligned = {"input_ids": [self.bos_id, *layout, *self.prompt_ids]}
            if self.has_messages:  # a batch may have both
                aligned["text_mask"] = [True, *[False] * len(layout), *[True] * len(self.prompt_ids)]
        prefix = aligned["input_ids"]
        item = caption_item(image, aligned, caption_ids, self._numbers(sample_id))
        for column, scores in self.scores.items():
            item[column] = torch.zeros(len(prefix) + len(caption_ids))
            if caption_ids:
                item[column][len(prefix) :] = self._logprobs(scores, sample_id, len(caption_ids))
        return item

    def _numbers(self, sample_id: int) -> dict[str, int]:
        stream = {"stream": self.stream_of(sample_id)} if len(self.stream_names) > 1 else {}
        return {"sample_id": sample_id, **stream}

    def _logprobs(self, scores: Scores, sample_id: int, tokens: int, uncut: int | None = None) -> Tensor:
        try:
            return torch.from_numpy(scores.read(sample_id, tokens, uncut))
        except ScoresError as error:
            raise BadSampleError(str(error)) from error

    def _without_labels(self, sample_id: int) -> dict[str, Any]:
        """Return a blank image without a caption, instead of a sample that cannot be used."""
        blank = Image.new("RGB", (64, 64))
        image = self.image_processor(blank) if self.image_processor else ImageInputs({}, [])
        item = self._item(image, [], sample_id)
        if self.has_spans:
            item["image_related"] = torch.zeros(len(item["labels"]), dtype=torch.bool)
        return item

    def sample_name(self, sample_id: int) -> str:
        """Return the number of a sample, its stream where there are several, and its shard and position there."""
        shard_id, index = self.spanner[sample_id]
        shard = cast(MDSReader, self.shards[shard_id])
        stream = f" of {self.stream_names[self.stream_of(sample_id)]}" if len(self.stream_names) > 1 else ""
        return f"sample {sample_id}{stream} (number {index} of {shard.split or '.'}/{shard.raw_data.basename})"


def caption_item(
    image: ImageInputs, before: Mapping[str, list[Any]], caption_ids: list[int], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """Return a sample as :class:`.CaptionCollator` takes it, of an image, what is before its caption, and the caption.

    Args:
        image: with the tensors.
        before: ``input_ids`` before the caption, and what is aligned with them.
        caption_ids: tokens of the caption, which are the labels.
        numbers: ``sample_id``, and what else says which sample it is.
    """
    prefix = before["input_ids"]
    item: dict[str, Any] = {
        "input_ids": torch.tensor(prefix + caption_ids),
        "labels": torch.tensor([IGNORE_INDEX] * len(prefix) + caption_ids),
        **image.tensors,
        **numbers,
    }
    for key in before.keys() - {"input_ids"}:
        following = image.following.get(key, key == "text_mask")
        item[key] = torch.tensor(before[key] + [following] * len(caption_ids))
    return item


def check_scorable(data: StreamingCaptionDataset, scores: str, key: str = "scores") -> None:
    """Refuse to store scores of samples that draw one of several captions, and a viewer's of conversations.

    Raises:
        ValueError: naming the key of the recipe.
    """
    if data.has_messages and key == "viewer_scores":
        raise ValueError(
            f"dataset.{key}={scores!r}: there are no stored viewer's scores of conversations: give the algorithm "
            "a live viewer."
        )
    if data.has_several_captions:
        raise ValueError(
            f"dataset.{key}={scores!r}: there are no stored scores of samples with several captions each. Convert "
            "them with captions=all, or give the algorithm a live reference."
        )


def decode_image(data: bytes) -> Image.Image:
    """Decode an RGB image from the bytes of a file, see :mod:`composer_prior.data.images`.

    Raises:
        BadSampleError: if its format is not supported, or it is damaged or larger than the limit.
    """
    try:
        return decode_rgb(data)
    except ImageError as error:
        raise BadSampleError(f"the image cannot be decoded: {one_line(error)}") from error


def draw(count: int, *key: int) -> int:
    """Draw a number below ``count``; the same key always draws the same one."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def _checked_spans(spans: Any) -> Sequence[Sequence[int]]:
    """Return the spans of a caption; none where they are unknown."""
    try:
        return [(int(start), int(end)) for start, end in spans or () if start < end]
    except (TypeError, ValueError) as error:
        raise BadSampleError(f"{SPANS_COLUMN} is not a list of [start, end) characters") from error


def overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[Sequence[int]]) -> list[bool]:
    """Return for each token, given by its characters, whether it shares one with a span."""
    return [any(start < span_end and span_start < end for span_start, span_end in spans) for start, end in offsets]


def read_captions(config: Mapping[str, Any]) -> Iterator[str]:
    """Return all captions of a data set, in order; every rank must call this, but only some need to iterate.

    Args:
        config: arguments of :class:`StreamingCaptionDataset`; only those that locate the data are used.
    """
    keys = (
        "local",
        "remote",
        "split",
        "streams",
        "cache_limit",
        "download_retry",
        "download_timeout",
        "validate_hash",
    )
    data = CheckedDataset(batch_size=1, **{key: config[key] for key in keys if key in config})
    samples = (data[index] for index in range(data.num_samples))
    return (caption for sample in samples for caption in sample_captions(sample))


def caption_data_spec(dataset: StreamingCaptionDataset, batch_size: int, **kwargs: Any) -> DataSpec:
    """Return a resumable loader of a caption data set, with its token counts.

    Args:
        dataset: built with the same ``batch_size``.
        batch_size: samples per rank, or rows where they are packed.
        kwargs: those of :class:`torch.utils.data.DataLoader`.
    """
    tokenizer = dataset.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    kind = StreamingDataLoader if dataset.packing_ratio is None else RowsLoader
    loader = kind(dataset, batch_size=batch_size, collate_fn=CaptionCollator(pad), **kwargs)
    return DataSpec(
        loader,
        split_batch=split_packed_images,
        get_num_samples_in_batch=count_rows,
        get_num_tokens_in_batch=cast(Any, count_tokens),
    )
