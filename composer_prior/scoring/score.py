"""Compute the reference log-probabilities of a data set's captions, once, beside the data.

The data set is cut into units of consecutive samples, and each rank scores a run of them. A unit is written when it is
complete, and the index is written last. A killed job continues with the missing units, on any number of ranks.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from composer.utils import dist, get_device
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import cached_file

from composer_prior.data.captions import BadSampleError, StreamingCaptionDataset
from composer_prior.data.hub import find_model, load_pretrained
from composer_prior.data.locks import locked
from composer_prior.data.mds import read_column
from composer_prior.data.messages import announce
from composer_prior.data.nodes import check_shared, on_first_rank
from composer_prior.data.remote import Remote
from composer_prior.data.scores import INDEX, Scores, ScoresError, ScoresMetadata
from composer_prior.data.storage import StorageError, full_disk_told, is_remote
from composer_prior.data.stores import is_denied
from composer_prior.data.tokenizer import CaptionFormat, build_tokenizer, tokenizer_fingerprint
from composer_prior.models.reference import ReferenceLM
from composer_prior.scoring.align import align_logprobs, token_edges
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.writer import ScoresWriter


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
        ValueError: if the reference cannot score these captions.
    """
    try:
        with full_disk_told(job.out):
            return _score_captions(job)
    except (StorageError, OSError) as error:
        raise ScoresError(f"{job.out}: the scores cannot be made: {error}") from error


def _score_captions(job: ScoreJob) -> ScoreSummary:
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    check_shared(_shared_paths(job))
    arguments = {key: value for key, value in job.dataset.items() if key != "scores"}
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
    """Return the paths that all nodes must see; a reference or tokenizer that does not exist is a hub id."""
    named = {"reference": job.reference, "tokenizer.name": job.tokenizer["name"]}
    there = on_first_rank(lambda: [key for key, path in named.items() if Path(path).expanduser().exists()])
    paths = {"scores": os.path.join(job.out, INDEX), **{key: named[key] for key in there}}
    if not job.dataset.get("remote") and job.dataset.get("local"):
        paths["dataset.local"] = job.dataset["local"]
    return paths


def _look(job: ScoreJob, data: StreamingCaptionDataset) -> tuple[ScoresMetadata, bool]:
    """Return the metadata of the scores that a job makes, and whether they exist already."""
    metadata = ScoresMetadata.of(data, reference_identity(job.reference, job.trust_remote_code))
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
    reference = ReferenceLM.from_pretrained(job.reference, job.trust_remote_code, cast(Any, job.dtype))
    reference.to(cast(torch.device, get_device(None)._device))
    total = sum(len(writer.units[unit]) for unit in units)
    disable = not job.progress_bar or dist.get_global_rank() != 0
    with tqdm(total=total, unit=" samples", desc="Scoring", disable=disable, dynamic_ncols=True) as bar:
        for unit in units:
            samples = writer.units[unit]
            captions = read_column(data, "caption", samples)
            scores = _without_bad(
                score_texts(captions, data.format, reference, job.batch_tokens), captions, samples, data
            )
            entries[unit] = writer.write(unit, scores)
            summary.samples += len(samples)
            summary.tokens += sum(map(len, scores))
            summary.skipped += sum(not len(values) for values in scores)
            bar.update(len(samples))
            bar.set_postfix_str(f"{summary.tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
    return entries, summary


def _without_bad(
    scores: list[NDArray[np.float32]], captions: Sequence[str], samples: range, data: StreamingCaptionDataset
) -> list[NDArray[np.float32]]:
    """Replace the scores of bad samples by empty ones, by which the loader recognises them.

    Raises:
        BadSampleError: if the data set does not skip bad samples.
    """
    for index, (values, caption) in enumerate(zip(scores, captions, strict=True)):
        good = caption.strip() and (values <= 0).all()
        if not good:
            problem = "its scores are NaN or positive" if caption.strip() else "the caption is empty"
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
    distinct = list(dict.fromkeys(captions))
    score = _score_tokens if reference.reads(format.tokenizer) else _score_characters
    scores = dict(zip(distinct, score(distinct, format, reference, batch_tokens), strict=True))
    return [scores[caption] for caption in captions]


def _score_tokens(
    captions: list[str], format: CaptionFormat, reference: ReferenceLM, batch_tokens: int | None
) -> list[NDArray[np.float32]]:
    """Score captions as the model's tokens."""
    prefix, eos = format.prefix_ids(), format.tokenizer.eos_token_id
    encoded = format.tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    texts = [[*prefix, *[*ids, eos][: format.max_caption_tokens]] for ids in encoded]
    return [values.numpy() for values in reference.score_texts(texts, len(prefix), batch_tokens)]


def _score_characters(
    captions: list[str], format: CaptionFormat, reference: ReferenceLM, batch_tokens: int | None
) -> list[NDArray[np.float32]]:
    """Score captions as the reference's tokens, and carry the scores over to the model's."""
    theirs: Any = reference.tokenizer
    if not theirs.is_fast or theirs.eos_token_id is None:
        raise ValueError(
            "The reference has another tokenizer than the model; it must be a fast one with an end-of-sequence token."
        )
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    prefix, read = format.prefix_ids(theirs), theirs(captions, **options)
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
    scores = reference.score_texts([[*prefix, *ids] for ids, _, _ in readings], len(prefix), batch_tokens)
    return [
        _carry_over(values.numpy(), edges, to_edges)
        for values, (_, edges, to_edges) in zip(scores, readings, strict=True)
    ]


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


def reference_identity(path: str, trust_remote_code: bool = False) -> dict[str, str]:
    """Return the path of a language model, and fingerprints of its configuration, weights and tokenizer.

    Raises:
        ScoresError: if there is no such model.
    """
    try:
        found = find_model(path)
        folder = found if isinstance(found, Path) else Path(cached_file(found, "config.json") or "").parent
        config = json.loads(Path(folder, "config.json").read_text())
    except OSError as error:
        raise ScoresError(f"The reference {path} is neither a folder with a language model nor a hub id.") from error
    digest = xxhash.xxh3_128()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ScoresError(f"The reference {path} has no weights (*.safetensors or *.bin) in {folder}.")
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    config = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    return {
        "path": path,
        "config": xxhash.xxh3_128(json.dumps(config, sort_keys=True)).hexdigest()[:16],
        "weights": digest.hexdigest()[:16],
        "tokenizer": tokenizer_fingerprint(load_pretrained(AutoTokenizer, path, trust_remote_code)),
    }
