"""Scores the captions of a data set with the text-only reference, once, beside the data.

The data set is cut into units of consecutive samples, and each rank scores a run of them. A unit is put in place when
it is whole, and the index is written last: a job that was killed goes on where it was, with any number of ranks.
"""

import fcntl
import json
import mmap
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import xxhash
from composer.core import Precision, get_precision_context
from composer.utils import dist, get_device
from numpy.typing import NDArray
from omegaconf import OmegaConf
from streaming import StreamingDataset
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import mds_decode
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import cached_file

from composer_prior.data.captions import BadSampleError, StreamingCaptionDataset
from composer_prior.data.convert import ConversionError
from composer_prior.data.scores import Scores, ScoresCard, ScoresError, ScoresWriter
from composer_prior.data.sources import is_remote
from composer_prior.data.tokenizer import tokenizer_fingerprint
from composer_prior.models.align import align_logprobs, token_edges
from composer_prior.models.language import bos_id, prompt_ids
from composer_prior.models.reference import ReferenceLM
from composer_prior.registry import did_you_mean
from composer_prior.training.builders import build_tokenizer
from composer_prior.training.config import TrainConfig, check_recipe, load_recipe
from composer_prior.training.preflight import trained_recipes
from composer_prior.training.prepare import announce, model_folder

UNIT_SAMPLES = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreJob:
    """What to score with what.

    Args:
        out: folder, which may begin with ``~``, or remote for the scores.
        reference: folder or hub id of a causal LM in Hugging Face form.
        tokenizer: of the model to be trained, ``name`` and ``kwargs`` as in a recipe.
        dataset: arguments of :class:`.StreamingCaptionDataset`, as in a recipe's ``train_loader.dataset``.
        batch_tokens: tokens of one forward pass, padding included; default: what suits the device.
        unit_samples: samples that are sorted by length, scored and put in place together.
        amp: compute in bfloat16 where the device can; several digits of the scores are lost.
        trust_remote_code: run code that comes with the reference.
        progress_bar: show one, of the first rank.
    """

    out: str
    reference: str
    tokenizer: dict[str, Any]
    dataset: dict[str, Any]
    batch_tokens: int | None = None
    unit_samples: int = UNIT_SAMPLES
    amp: bool = False
    trust_remote_code: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "unit_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        object.__setattr__(self, "out", os.path.expanduser(self.out))


@dataclass
class ScoreSummary:
    """What a job did: samples, tokens and samples without scores, over all ranks, in this call."""

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
    """Run a job to its end, on all ranks together; returns at once if its scores are there already.

    Raises:
        ScoresError: if ``out`` holds something else, or scores of something else, naming what differs.
        BadSampleError: for a caption that cannot be scored, unless ``dataset.on_bad_sample`` is ``"skip"``.
        ValueError: if the reference cannot score these captions at all.
    """
    try:
        return _score_captions(job)
    except (ConversionError, OSError) as error:  # of the place that they go to
        raise ScoresError(f"{job.out}: the scores cannot be made: {error}") from error


def _score_captions(job: ScoreJob) -> ScoreSummary:
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    arguments = {key: value for key, value in job.dataset.items() if key != "scores"}
    data = StreamingCaptionDataset(tokenizer=build_tokenizer(job.tokenizer), batch_size=1, **arguments)
    card, whole = _from_first_rank(lambda: _look(job, data))
    summary = ScoreSummary(job.out, reused=whole)
    if whole:
        return summary
    with _locked(job.out) if rank == 0 else nullcontext():
        writer = ScoresWriter(job.out, card, job.unit_samples, worker=rank)
        entries = _from_first_rank(writer.begin)
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


def _look(job: ScoreJob, data: StreamingCaptionDataset) -> tuple[ScoresCard, bool]:
    """The card of the scores that a job makes, and whether they are there already."""
    card = ScoresCard.of(data, reference_identity(job.reference, job.trust_remote_code))
    try:
        there = Scores(job.out, Path(job.out)).card
    except ScoresError:
        return card, False
    there.check(card, job.out)
    return card, True


def _from_first_rank(function: Callable[[], T]) -> T:
    """What a function returns, or raises, on the first rank."""
    found: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            found[0] = function()
        except (ValueError, OSError, ConversionError) as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


@contextmanager
def _locked(out: str) -> Iterator[None]:
    """Lets one job at a time write to a folder; the others wait, and then find its scores."""
    if is_remote(out):
        yield
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"Scores: waiting for another job that writes to {out}")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # the system does it for a process that is killed, and so gives the lock back


def _score_units(
    job: ScoreJob, data: StreamingCaptionDataset, writer: ScoresWriter, units: Sequence[int]
) -> tuple[dict[int, dict[str, Any]], ScoreSummary]:
    """Score units and put them in place; their index entries, and what was done."""
    entries: dict[int, dict[str, Any]] = {}
    summary = ScoreSummary(job.out)
    if not units:
        return entries, summary
    reference = ReferenceLM.from_pretrained(job.reference, job.trust_remote_code)
    reference.to(cast(torch.device, get_device(None)._device))
    precision = get_precision_context(Precision.AMP_BF16 if job.amp else Precision.FP32)
    total = sum(len(writer.units[unit]) for unit in units)
    disable = not job.progress_bar or dist.get_global_rank() != 0
    with precision, tqdm(total=total, unit=" samples", desc="Scoring", disable=disable, dynamic_ncols=True) as bar:
        for unit in units:
            samples = writer.units[unit]
            captions = read_column(data, "caption", samples)
            scores = _without_bad(score_texts(captions, data, reference, job.batch_tokens), captions, samples, data)
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
    """Empties the scores of samples that cannot be used; the loader knows them by that.

    Raises:
        BadSampleError: instead of skipping, if the data set says so.
    """
    for place, (values, caption) in enumerate(zip(scores, captions, strict=True)):
        good = caption.strip() and (values <= 0).all()
        if not good:
            problem = "its scores are NaN or positive" if caption.strip() else "the caption is empty"
            if data.on_bad_sample == "raise":
                raise BadSampleError(
                    f"{data._place(samples[place])}: {problem} (on_bad_sample=skip goes on without it)"
                )
            scores[place] = values[:0]
    return scores


def score_texts(
    captions: Sequence[str], data: StreamingCaptionDataset, reference: ReferenceLM, batch_tokens: int | None = None
) -> list[NDArray[np.float32]]:
    """Log-probabilities of the tokens that a data set makes of captions, ``[tokens]`` float32 for each.

    A reference with another tokenizer reads the captions in its own tokens, and its scores are carried over by
    characters (:mod:`composer_prior.models.align`); its end-of-sequence token is the model's.

    Args:
        captions: equal ones are scored once.
        data: its tokenizer, prompt and longest caption.
        reference: the language model.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        ValueError: if the reference has too few positions, no end-of-sequence token, or no fast tokenizer.
    """
    distinct = list(dict.fromkeys(captions))
    score = _score_tokens if reference.reads(data.tokenizer) else _score_characters
    scores = dict(zip(distinct, score(distinct, data, reference, batch_tokens), strict=True))
    return [scores[caption] for caption in captions]


def _score_tokens(
    captions: list[str], data: StreamingCaptionDataset, reference: ReferenceLM, batch_tokens: int | None
) -> list[NDArray[np.float32]]:
    """With the model's own tokens."""
    prefix = [data.bos_id, *data.prompt_ids]
    encoded = data.tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    texts = [[*prefix, *[*ids, data.tokenizer.eos_token_id][: data.max_caption_tokens]] for ids in encoded]
    return [values.numpy() for values in reference.score_texts(texts, len(prefix), batch_tokens)]


def _score_characters(
    captions: list[str], data: StreamingCaptionDataset, reference: ReferenceLM, batch_tokens: int | None
) -> list[NDArray[np.float32]]:
    """With the reference's tokens, carried over to the model's."""
    theirs: Any = reference.tokenizer
    if not theirs.is_fast or theirs.eos_token_id is None:
        raise ValueError(
            "The reference has another tokenizer than the model; it must be a fast one with an end-of-sequence token."
        )
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    prefix = [bos_id(theirs), *prompt_ids(theirs, data.prompt)]
    read, encoded = theirs(captions, **options), data.tokenizer(captions, **options)
    texts, cuts = [], []
    for i, caption in enumerate(captions):
        edges, to_edges = (token_edges(tokens["offset_mapping"][i], len(caption)) for tokens in (read, encoded))
        whole = len(to_edges) <= data.max_caption_tokens  # with the end of sequence
        to_edges = to_edges[: data.max_caption_tokens + 1]
        needed = len(edges) - 1 if whole else int(np.searchsorted(edges, to_edges[-1]))
        texts.append([*prefix, *read["input_ids"][i][:needed], *[theirs.eos_token_id] * whole])
        cuts.append((edges[: needed + 1], to_edges))
    scores = []
    for values, (edges, to_edges) in zip(reference.score_texts(texts, len(prefix), batch_tokens), cuts, strict=True):
        body, end = np.split(values.numpy(), [len(edges) - 1])
        if len(body) == 0 < len(to_edges) - 1:  # a caption of which the reference reads nothing
            body, edges = np.array([np.nan], dtype=np.float32), to_edges[[0, -1]]
        scores.append(np.append(align_logprobs(body, edges, to_edges), end))
    return scores


def read_column(data: StreamingDataset, column: str, samples: range) -> list[Any]:
    """One column of consecutive samples; the others, images for one, are not read.

    Raises:
        ValueError: if the data set has no such column.
    """
    values: list[Any] = []
    while len(values) < len(samples):
        shard_id, first = data.spanner[samples[len(values)]]
        shard = cast(MDSReader, data.shards[shard_id])
        if column not in shard.column_names:
            raise ValueError(
                f"The data set has no column {column!r}, it has {', '.join(shard.column_names)}; samples with several "
                "captions each cannot be scored."
            )
        count = min(shard.samples - first, len(samples) - len(values))
        with _shard_bytes(data, shard_id) as content:
            values += (_cell(content, shard, column, first + i) for i in range(count))
    return values


def _shard_bytes(data: StreamingDataset, shard_id: int, retry: int = 7) -> mmap.mmap:
    """A shard's file, downloaded if need be; the cache may evict it, but not while it is open."""
    shard = cast(MDSReader, data.shards[shard_id])
    file = Path(shard.dirname, shard.split or "", shard.raw_data.basename)
    for _ in range(retry):
        data.prepare_shard(shard_id)
        try:
            with open(file, "rb") as opened:
                content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            content.madvise(mmap.MADV_RANDOM)
            return content
        except FileNotFoundError:
            continue
    raise FileNotFoundError(f"{file} is missing from the data set.")


def _cell(content: mmap.mmap, shard: MDSReader, column: str, index: int) -> Any:
    """One column of one sample: the sizes of those of no fixed size come first, then all of them in order."""
    begin, _ = np.frombuffer(content[4 * (1 + index) : 4 * (3 + index)], np.uint32).tolist()
    variable = sum(not size for size in shard.column_sizes)
    given = iter(np.frombuffer(content[begin : begin + 4 * variable], np.uint32).tolist())
    sizes = [size or next(given) for size in shard.column_sizes]
    place = shard.column_names.index(column)
    start = begin + 4 * variable + sum(sizes[:place])
    return mds_decode(shard.column_encodings[place], content[start : start + sizes[place]])


def reference_identity(path: str, trust_remote_code: bool = False) -> dict[str, str]:
    """Path of a language model, and fingerprints of its configuration, weights and tokenizer; nothing is loaded.

    Raises:
        ScoresError: if there is no such model.
    """
    try:
        folder = Path(path) if Path(path).is_dir() else Path(cached_file(path, "config.json") or "").parent
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
        "tokenizer": tokenizer_fingerprint(AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)),
    }


# recipes --------------------------------------------------------------------------------------------------------------


def ensure_scores(recipe: TrainConfig) -> None:
    """Make the scores that a recipe's loaders name (``dataset.scores``), unless they are there; its reference must be.

    Scores that are there are checked against the recipe's reference; without one in the recipe, only the loader checks
    them.

    Raises:
        ScoresError: if they belong to something else, naming what differs.
    """
    for loader in (recipe.train_loader, recipe.eval_loader):
        if recipe.reference is not None and loader is not None and loader["dataset"].get("scores"):
            announce(str(score_captions(job_of(recipe, loader["dataset"]))))


def job_of(recipe: TrainConfig, dataset: Mapping[str, Any], **changes: Any) -> ScoreJob:
    """The job that makes the scores of one of a recipe's data sets.

    Args:
        recipe: with a reference.
        dataset: of its ``train_loader`` or ``eval_loader``.
        changes: fields of :class:`ScoreJob`.

    Raises:
        ValueError: if the recipe has no reference, or nothing says where the scores go.
    """
    if recipe.reference is None:
        raise ValueError("The recipe has no reference. Score without a recipe: dataset.local=... reference=... out=...")
    out = changes.pop("out", None) or dataset.get("scores")
    if not out:
        raise ValueError("Where do the scores go? Give out=..., or dataset.scores in the recipe.")
    folder = model_folder(TrainConfig(**recipe.reference))
    given = {"tokenizer": recipe.tokenizer, "dataset": dict(dataset), "progress_bar": recipe.progress_bar, **changes}
    return ScoreJob(out=str(out), reference=str(folder), **given)


_OPTIONS = ("out", "loader", "batch_tokens", "unit_samples", "amp")
_USAGE = (
    "usage: [composer] scripts/score_captions.py RECIPE.yaml [out=...] [loader=train|eval] [batch_tokens=...] "
    "[unit_samples=...] [amp=true] [key=value of the recipe ...]\n"
    "   or: [composer] scripts/score_captions.py out=... reference=... tokenizer.name=... dataset.local=... [...]"
)


def main(arguments: Sequence[str]) -> None:
    """``score_captions.py RECIPE [key=value ...]``, or the keys of a :class:`ScoreJob` without a recipe."""
    if not arguments:
        sys.exit(_USAGE)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        recipe_given = "=" not in arguments[0]
        announce(str(score_captions(_recipe_job(arguments) if recipe_given else _explicit_job(arguments))))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _recipe_job(arguments: Sequence[str]) -> ScoreJob:
    """The job of a recipe, after what it needs and does not find has been made."""
    from composer_prior.training import run  # it makes scores in its turn

    own = [word for word in arguments[1:] if word.split("=")[0] in _OPTIONS]
    options = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(own)))
    loader = options.pop("loader", "train")
    if loader not in ("train", "eval"):
        raise ValueError(f"loader={loader!r}: expected train or eval.")
    recipe = load_recipe(arguments[0], [word for word in arguments[1:] if word not in own])
    for path in recipe.code_paths:
        runpy.run_path(path)
    check_recipe(recipe)
    config = getattr(recipe, f"{loader}_loader")
    if config is None:
        raise ValueError(f"The recipe has no {loader}_loader.")
    job = job_of(recipe, config["dataset"], **options)
    run.prepare(recipe, [(stage, where) for stage, where in trained_recipes(recipe) if stage is not recipe])
    return job


@dataclass
class _ExplicitJob:
    """The schema of the command line: that of :class:`ScoreJob`, with its defaults."""

    out: str = "???"
    reference: str = "???"
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None
    unit_samples: int = UNIT_SAMPLES
    amp: bool = False
    trust_remote_code: bool = False
    progress_bar: bool = True


def _explicit_job(arguments: Sequence[str]) -> ScoreJob:
    names = [f.name for f in fields(ScoreJob)]
    given = OmegaConf.from_dotlist(list(arguments))
    for key in map(str, given):
        if key not in names:
            raise ValueError(f"{key} is not a key. {did_you_mean(key, names)}")
    job = OmegaConf.merge(OmegaConf.structured(_ExplicitJob), given)
    missing = sorted(OmegaConf.missing_keys(job))
    if missing or "name" not in job.tokenizer or not job.dataset:
        raise ValueError("Without a recipe, give out=..., reference=..., tokenizer.name=... and dataset.local=...")
    dist.initialize_dist(get_device(None), timeout=3600)
    return ScoreJob(**cast(dict[str, Any], OmegaConf.to_container(job)))
