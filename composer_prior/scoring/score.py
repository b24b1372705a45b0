"""Compute the log-probabilities of a data set's captions under a reference or a viewer, once, beside the data.

The data set is cut into units of consecutive samples, and each rank scores a run of them. A unit is written when it is
complete, and the index is written last. A killed job continues with the missing units, on any number of ranks.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from composer.utils import dist, get_device
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import cached_file

from composer_prior.data.captions import BadSampleError, StreamingCaptionDataset, decode_image
from composer_prior.data.chat import OWN, ChatFormat, NoTemplateError, Written, characters, use_template, within
from composer_prior.data.conversations import ChatError
from composer_prior.data.hub import check_push, find_model, load_pretrained, push
from composer_prior.data.locks import locked
from composer_prior.data.mds import read_column
from composer_prior.data.messages import announce
from composer_prior.data.nodes import check_shared, on_first_rank
from composer_prior.data.remote import Remote
from composer_prior.data.scores import COLUMN, INDEX, KEYS, METADATA, VIEWER_COLUMN, Scores, ScoresError, ScoresMetadata
from composer_prior.data.storage import StorageError, full_disk_told, is_remote
from composer_prior.data.stores import is_denied
from composer_prior.data.tokenizer import CaptionFormat, bos_id, build_tokenizer, tokenizer_fingerprint
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.model_folder import PROMPT
from composer_prior.models.reference import ReferenceLM, same_ids
from composer_prior.scoring.align import align_logprobs, token_edges
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.writer import ScoresWriter

_IMAGES = 64  # that a viewer holds at once, unless batch_tokens asks for fewer
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", PROMPT)  # of a viewer
_Score = Callable[[list[list[int]]], list[NDArray[np.float32]]]  # ids of texts -> log-probabilities of their tokens


@dataclass
class ScoreSummary:
    """The numbers of samples, tokens and skipped samples of one call, over all ranks."""

    out: str
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    reused: bool = False

    def __str__(self) -> str:
        if self.reused:
            return f"Scores: reusing {self.out}"
        skipped = f", {self.skipped:,} samples skipped" if self.skipped else ""
        return f"Scores: {self.tokens:,} tokens of {self.samples:,} samples in {self.out}{skipped}"


def score_captions(job: ScoreJob) -> ScoreSummary:
    """Run a job on all ranks; return at once if its scores exist already.

    Raises:
        ScoresError: if ``out`` holds other files, or other scores, naming what differs.
        BadSampleError: for a caption that cannot be scored, unless ``dataset.on_bad_sample`` is ``"skip"``.
        ValueError: if the model cannot score these captions, or nothing can be pushed to ``push_to_hub``.
    """
    try:
        on_first_rank(lambda: check_push(job.push_to_hub, "dataset", job.out, METADATA))
        with full_disk_told(job.out):
            summary = _score_captions(job)
    except (StorageError, OSError) as error:
        raise ScoresError(f"{job.out}: the scores cannot be made: {error}") from error
    push(job.out, job.push_to_hub, "dataset", partial(_card, job))
    return summary


def _card(job: ScoreJob, folder: Path) -> str:
    return ScoresMetadata.from_json((folder / METADATA).read_bytes(), job.out).card()


def _score_captions(job: ScoreJob) -> ScoreSummary:
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    check_shared(_shared_paths(job))
    arguments = {key: value for key, value in job.dataset.items() if key not in KEYS}
    data = StreamingCaptionDataset(tokenizer=build_tokenizer(job.tokenizer), batch_size=1, **arguments)
    metadata, whole = on_first_rank(lambda: _look(job, data))
    summary = ScoreSummary(job.out, reused=whole)
    if whole:
        return summary
    with _sole_writer(job.out) if rank == 0 else nullcontext():
        writer = ScoresWriter(job.out, metadata, job.unit_samples, worker=rank)
        entries = on_first_rank(writer.begin)
        summary.reused = entries is None  # another job has made them meanwhile
        if entries is not None:
            missing = [unit for unit in range(len(writer.units)) if unit not in entries]
            mine = missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]
            for done, part in dist.all_gather_object(_score_units(job, data, writer, mine)):
                entries.update(done)
                summary.samples += part.samples
                summary.tokens += part.tokens
                summary.skipped += part.skipped
            if rank == 0:
                writer.finish(entries)
        if rank == 0 and not is_remote(job.out):
            shutil.rmtree(Path(job.out, ".scoring"), ignore_errors=True)
        dist.barrier()
    return summary


def _shared_paths(job: ScoreJob) -> dict[str, str]:
    """Return the paths that all nodes must see; a model or tokenizer that does not exist is a hub id."""
    named = {"viewer" if job.viewer else "reference": job.model, "tokenizer.name": job.tokenizer["name"]}
    there = on_first_rank(lambda: [key for key, path in named.items() if Path(path).expanduser().exists()])
    paths = {"scores": os.path.join(job.out, INDEX), **{key: named[key] for key in there}}
    if not job.dataset.get("remote") and job.dataset.get("local"):
        paths["dataset.local"] = job.dataset["local"]
    return paths


def _look(job: ScoreJob, data: StreamingCaptionDataset) -> tuple[ScoresMetadata, bool]:
    """Return the metadata of the scores that a job makes, and whether they exist already."""
    column = COLUMN if job.viewer is None else VIEWER_COLUMN
    identity = model_identity(job.model, job.trust_remote_code, () if job.viewer is None else _PROCESSOR)
    metadata = ScoresMetadata.of(data, identity, column)
    try:
        found = Scores(job.out, Path(job.out)).metadata
    except ScoresError as error:
        if is_denied(error):
            raise
        if is_remote(job.out):
            Remote(job.out).check_writable()
        return metadata, False
    found.check(metadata, job.out)
    return metadata, True


def _sole_writer(out: str) -> AbstractContextManager[None]:
    """Let one job at a time write to a folder; the others wait, and then reuse its scores."""
    if is_remote(out):
        return nullcontext()
    waiting = f"Scores: waiting for another job that writes to {out}"
    return locked(Path(out, ".scoring", "lock"), waiting=lambda: announce(waiting))


def _score_units(
    job: ScoreJob, data: StreamingCaptionDataset, writer: ScoresWriter, units: Sequence[int]
) -> tuple[dict[int, dict[str, Any]], ScoreSummary]:
    """Score and write units; return their index entries and a summary."""
    entries: dict[int, dict[str, Any]] = {}
    summary = ScoreSummary(job.out)
    if not units:
        return entries, summary
    score = _scorer(job, data)
    total = sum(len(writer.units[unit]) for unit in units)
    disable = not job.progress_bar or dist.get_global_rank() != 0
    with tqdm(total=total, unit=" samples", desc="Scoring", disable=disable, dynamic_ncols=True) as bar:
        for unit in units:
            samples = writer.units[unit]
            scores = score(samples)
            entries[unit] = writer.write(unit, scores)
            summary.samples += len(samples)
            summary.tokens += sum(map(len, scores))
            summary.skipped += sum(not len(values) for values in scores)
            bar.update(len(samples))
            bar.set_postfix_str(f"{summary.tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
    return entries, summary


def _scorer(job: ScoreJob, data: StreamingCaptionDataset) -> Callable[[range], list[NDArray[np.float32]]]:
    """Load the model of a job, and return a function from samples to their log-probabilities."""
    device = cast(torch.device, get_device(None)._device)
    if job.viewer is None:
        reference = ReferenceLM.from_pretrained(job.model, job.trust_remote_code, cast(Any, job.dtype)).to(device)

        def score(samples: range) -> list[NDArray[np.float32]]:
            texts = read_column(data, "caption", samples, "messages")
            captions = [text for text in texts if isinstance(text, str)]
            scores = iter(score_texts(captions, data.format, reference, job.batch_tokens) if captions else ())
            chats, problems = _score_chats(texts, data, reference, job.batch_tokens)
            found = [next(scores) if isinstance(text, str) else next(chats) for text in texts]
            return _without_bad(found, texts, problems, samples, data)

        return score
    if data.has_messages:
        raise ValueError("There are no stored viewer's scores of conversations: give the algorithm a live viewer.")
    viewer = ImageTextModel.from_pretrained(job.viewer, job.trust_remote_code)
    default = torch.float32 if device.type == "cpu" else viewer.model.dtype
    dtype = getattr(torch, job.dtype) if job.dtype else default
    viewer.model.to(device, dtype)

    def score_parts(samples: range) -> list[NDArray[np.float32]]:
        scores: list[NDArray[np.float32]] = []
        size = _IMAGES
        if job.batch_tokens is not None:
            (image, *_), _ = _read_images(data, samples[:1])
            size = max(1, job.batch_tokens // (viewer.inputs([image])["input_ids"].shape[1] + data.max_caption_tokens))
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            captions, (images, problems) = read_column(data, "caption", part), _read_images(data, part)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = score_beside_images(images, captions, data.format, viewer)
            scores += _without_bad(found, captions, problems, part, data)
        return scores

    return score_parts


def _score_chats(
    texts: Sequence[Any], data: StreamingCaptionDataset, reference: ReferenceLM, batch_tokens: int | None
) -> tuple[Iterator[NDArray[np.float32]], dict[int, str]]:
    """Return the log-probabilities of the learned tokens of each conversation among texts, and why some have none.

    A reference with another tokenizer reads them as its own chat template writes them, see :func:`_carry_answers`.
    """
    theirs = None if reference.reads(data.tokenizer) else _chat_of(reference)
    positions = getattr(reference.model.config, "max_position_embeddings", None)
    # One more than a sample has: a processor of transformers may write no beginning of sequence.
    most = data.max_tokens + (positions != data.max_tokens)
    read, ids, problems = list[Any](), list[list[int]](), dict[int, str]()
    for number, messages in enumerate(texts):
        if isinstance(messages, str):
            continue
        try:
            written, tokens = data.text_of(messages)
            again = None if theirs is None else _written(theirs, messages)
        except BadSampleError as error:
            problems[number] = str(error)
            read.append(None)
            ids.append([data.bos_id])
            continue
        if again is None or theirs is None:
            read.append(np.array(tokens["learned"][1:most], bool))
            ids.append(tokens["input_ids"][:most])
            continue
        encoding = theirs.tokenizer(again.text, add_special_tokens=False).encodings[0]
        begun = encoding.ids[:1] == [bos_id(theirs.tokenizer)]
        read.append((characters(encoding, again.text)[begun:], again, tokens["characters"], written))
        ids.append([bos_id(theirs.tokenizer), *encoding.ids[begun:]][:positions])
    found = (values.numpy() for values in reference.score_texts(ids, 1, batch_tokens))
    chosen = (
        values[:0] if known is None else values[known] if theirs is None else _carry_answers(values, *known)
        for values, known in zip(found, read, strict=True)
    )
    return iter([*chosen]), problems


def _chat_of(reference: ReferenceLM) -> ChatFormat:
    """Return how a reference with a tokenizer of its own writes conversations."""
    tokenizer = deepcopy(cast(Any, reference.tokenizer))
    if not tokenizer.is_fast:
        raise ValueError("The reference has another tokenizer than the model; it must be fast.")
    if tokenizer.chat_template is not None:  # documents need none
        use_template(tokenizer, OWN, "")
    return ChatFormat(tokenizer, "")


def _written(chat: ChatFormat, messages: Any) -> Written:
    try:
        return chat.write(messages)
    except NoTemplateError as error:
        raise ValueError("The reference has another tokenizer, and no chat template of its own.") from error
    except ChatError as error:
        raise BadSampleError(f"the reference has another tokenizer: {error}") from error


def _carry_answers(
    logprobs: NDArray[np.float32],
    offsets: Sequence[tuple[int, int]],
    theirs: Written,
    places: Sequence[tuple[int, int]],
    ours: Written,
) -> NDArray[np.float32]:
    """Return log-probabilities of the model's learned tokens from those of a reference's tokens ``[n]``.

    The part of an answer that both texts have is aligned by characters (:mod:`.align`). The tokens of the end of turn
    share the sum of the reference's evenly.

    Args:
        logprobs: of the reference's tokens, or of the first of them: answers behind those are left out.
        offsets: their characters in the reference's text.
        theirs: the reference's text.
        places: the characters of the model's tokens in its text.
        ours: the model's text.
    """
    found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
    for (first, last), (start, end) in zip(ours.learned, theirs.learned, strict=True):
        parts = []  # of the model, then of the reference: numbers of tokens, their characters in the answer
        for text, some, begin, stop in ((ours.text, places, first, last), (theirs.text, offsets, start, end)):
            numbers = [number for number, inside in enumerate(within(some, [(begin, stop)])) if inside]
            origin = begin + len(text[begin:stop]) - len(text[begin:stop].lstrip())
            parts.append((numbers, [(max(0, a - origin), max(0, b - origin)) for a, b in (some[n] for n in numbers)]))
        pairs = zip(ours.text[first:last].lstrip(), theirs.text[start:end].lstrip(), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for _, some in parts * 2:  # no token begins before its end and ends behind
            same = min([same, *(a for a, b in some if a < same < b)])
        (mine, to), (known, of) = parts
        if known[-1] >= len(logprobs):
            break
        inner, outer = (sum(a < same for a, _ in some) for some in (to, of))
        edges, to_edges = (token_edges(some[:count], same) for some, count in ((of, outer), (to, inner)))
        rest = len(mine) - inner
        if inner:
            found.append(align_logprobs(logprobs[known[:outer]], edges, to_edges))
        found.append(np.full(rest, logprobs[known[outer:]].sum() / max(1, rest), np.float32))
    return np.concatenate(found)


def _read_images(data: StreamingCaptionDataset, samples: range) -> tuple[list[Image.Image], dict[int, str]]:
    """Return the images of samples, a blank one in the place of one that cannot be decoded, and why it cannot."""
    images, problems = list[Image.Image](), dict[int, str]()
    for index, encoded in enumerate(read_column(data, "image", samples)):
        try:
            images.append(decode_image(encoded))
        except BadSampleError as error:
            problems[index] = str(error)
            images.append(Image.new("RGB", (64, 64)))
    return images, problems


def _without_bad(
    scores: list[NDArray[np.float32]],
    captions: Sequence[Any],
    problems: Mapping[int, str],
    samples: range,
    data: StreamingCaptionDataset,
) -> list[NDArray[np.float32]]:
    """Replace the scores of bad samples by empty ones, by which the loader recognises them.

    Raises:
        BadSampleError: if the data set does not skip bad samples.
    """
    for index, (values, caption) in enumerate(zip(scores, captions, strict=True)):
        empty = isinstance(caption, str) and not caption.strip()
        problem = problems.get(index) or ("the caption is empty" if empty else "")
        if not problem and not (values <= 0).all():
            problem = "its scores are NaN or positive"
        if problem:
            if data.on_bad_sample == "raise":
                name = data.sample_name(samples[index])
                raise BadSampleError(f"{name}: {problem} (on_bad_sample=skip goes on without it)")
            scores[index] = values[:0]
    return scores


def score_texts(
    captions: Sequence[str], format: CaptionFormat, reference: ReferenceLM, batch_tokens: int | None = None
) -> list[NDArray[np.float32]]:
    """Return the log-probabilities of captions' tokens, ``[tokens]`` float32 for each caption.

    A reference with another tokenizer reads the captions as its tokens, and its scores are carried over by characters
    (:mod:`composer_prior.scoring.align`); its end-of-sequence token stands for the model's.

    Args:
        captions: the texts; equal ones are scored once.
        format: the model's tokenizer, prompt and longest caption.
        reference: the language model.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        ValueError: if the reference has too few positions, no end-of-sequence token, or no fast tokenizer.
    """
    theirs = None if reference.reads(format.tokenizer) else reference.tokenizer
    prefix = format.prefix_ids(theirs)

    def score(texts: list[list[int]]) -> list[NDArray[np.float32]]:
        found = reference.score_texts([[*prefix, *ids] for ids in texts], len(prefix), batch_tokens)
        return [values.numpy() for values in found]

    distinct = list(dict.fromkeys(captions))
    scores = dict(zip(distinct, _score_captions_as(theirs, distinct, format, score), strict=True))
    return [scores[caption] for caption in captions]


def score_beside_images(
    images: Sequence[Image.Image], captions: Sequence[str], format: CaptionFormat, viewer: ImageTextModel
) -> list[NDArray[np.float32]]:
    """Return the log-probabilities of captions' tokens beside their images, ``[tokens]`` float32 for each caption.

    The viewer's prompt is that of its own training where it is known, or else that of the captions. One with another
    tokenizer reads the captions as :func:`score_texts` says.

    Args:
        images: one for each caption.
        captions: the texts.
        format: the trained model's tokenizer, prompt and longest caption.
        viewer: the model that sees the images.

    Raises:
        ValueError: if the viewer has no end-of-sequence token, or no fast tokenizer.
    """
    theirs = None if same_ids(viewer.tokenizer, format.tokenizer) else viewer.tokenizer
    prompt = getattr(viewer.processor, "prompt", format.prompt)

    def score(texts: list[list[int]]) -> list[NDArray[np.float32]]:
        found = viewer.text_logprobs(images, [[ids] for ids in texts], prompt)
        return [np.array(values, np.float32) for (values,) in found]

    return _score_captions_as(theirs, list(captions), format, score)


def _score_captions_as(
    theirs: Any, captions: list[str], format: CaptionFormat, score: _Score
) -> list[NDArray[np.float32]]:
    """Score captions as tokens of another tokenizer and carry the scores over to the model's, or as the model's."""
    if theirs is None:
        encoded = format.tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return score([[*ids, format.tokenizer.eos_token_id][: format.max_caption_tokens] for ids in encoded])
    if not theirs.is_fast or theirs.eos_token_id is None:
        raise ValueError(
            "Reference or viewer has another tokenizer than the model; it must be fast, with an end-of-sequence token."
        )
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    read = theirs(captions, **options)
    encoded = format.tokenizer(captions, **options)
    most = format.max_caption_tokens
    readings = [
        _cut(
            [*ids, theirs.eos_token_id], token_edges(offsets, len(caption)), token_edges(to_offsets, len(caption)), most
        )
        for caption, ids, offsets, to_offsets in zip(
            captions, read["input_ids"], read["offset_mapping"], encoded["offset_mapping"], strict=True
        )
    ]
    scores = score([ids for ids, _, _ in readings])
    return [_carry_over(values, edges, to_edges) for values, (_, edges, to_edges) in zip(scores, readings, strict=True)]


def _carry_over(
    logprobs: NDArray[np.float32], edges: NDArray[np.float64], to_edges: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return log-probabilities of the model's tokens from the reference's; that of the end of sequence is unchanged."""
    body, end = np.split(logprobs, [len(edges) - 1])
    if len(body) == 0 and len(to_edges) > 1:  # the reference has no tokens for the text
        body, edges = np.array([np.nan], dtype=np.float32), to_edges[[0, -1]]
    return np.append(align_logprobs(body, edges, to_edges), end)


def _cut(
    ids: list[int], edges: NDArray[np.float64], to_edges: NDArray[np.float64], most: int
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Return the reference's tokens of a caption, cut where ``most`` tokens of the model end, and both edges."""
    if len(to_edges) <= most:  # as many edges as tokens and end of sequence
        return ids, edges, to_edges
    to_edges = to_edges[: most + 1]
    needed = int(np.searchsorted(edges, to_edges[-1]))
    return ids[:needed], edges[: needed + 1], to_edges


def blind_viewer(viewer: str, reference: str) -> str:
    """Return a warning if a viewer predicts the first 1,000 captions no better than the reference; "" if it does.

    Args:
        viewer: folder or URL of its scores.
        reference: folder or URL of the reference's, of the same captions. Without whole scores there is no warning.
    """
    try:
        with tempfile.TemporaryDirectory() as cache:
            both = [Scores(path, Path(cache)) for path in (viewer, reference)]
            pairs = [[scores[number] for scores in both] for number in range(min(1000, *map(len, both)))]
    except ScoresError:
        return ""
    pairs = [pair for pair in pairs if 0 < len(pair[0]) == len(pair[1])]  # one of the two may have skipped a sample
    if not pairs:
        return ""
    sees, reads = (np.concatenate(values) for values in zip(*pairs, strict=True))
    if sees.mean() > reads.mean():
        return ""
    return (
        f"Warning: the viewer predicts captions no better than the text-only reference ({-sees.mean():.3f} and "
        f"{-reads.mean():.3f} nats per token, {len(pairs):,} captions): {(sees <= reads).mean():.0%} of the tokens "
        "gain nothing by the image. Train it longer, or name another viewer."
    )


def model_identity(path: str, trust_remote_code: bool = False, further: Sequence[str] = ()) -> dict[str, str]:
    """Return the path of a model that scores, and fingerprints of its configuration, weights and tokenizer.

    Args:
        path: folder or hub id.
        trust_remote_code: run code that comes with the model.
        further: names of files of its configuration, of which those that exist count.

    Raises:
        ScoresError: if there is no such model.
    """
    try:
        found = find_model(path)
        folder = found if isinstance(found, Path) else Path(cached_file(found, "config.json") or "").parent
        config = json.loads(Path(folder, "config.json").read_text())
    except OSError as error:
        raise ScoresError(f"The model {path} is neither a folder with a model nor a hub id.") from error
    digest = xxhash.xxh3_128()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ScoresError(f"The model {path} has no weights (*.safetensors or *.bin) in {folder}.")
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    config = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    config |= {name: (folder / name).read_text() for name in further if (folder / name).is_file()}
    return {
        "path": path,
        "config": xxhash.xxh3_128(json.dumps(config, sort_keys=True)).hexdigest()[:16],
        "weights": digest.hexdigest()[:16],
        "tokenizer": tokenizer_fingerprint(load_pretrained(AutoTokenizer, path, trust_remote_code)),
    }
