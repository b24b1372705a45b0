"""A run planned without its GPUs: the memory, operations, time and storage that a recipe takes."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed
from composer.core import Precision, Time, TimeUnit
from composer.utils import dist
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from composer_prior.data.batch import CaptionCollator, ImageInputs
from composer_prior.data.captions import caption_item, read_captions
from composer_prior.data.hub import load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.data.processing import ProcessorInputs
from composer_prior.data.storage import write_whole
from composer_prior.data.tokenizer import (
    VOCAB_SIZES,
    bos_id,
    build_tokenizer,
    encode_caption,
    image_token_ids,
    prompt_ids,
    train_tokenizer,
)
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.hugging_face import unused_weights
from composer_prior.models.reference import ReferenceLM
from composer_prior.training.builders import build_precision, per_rank_batch_size
from composer_prior.training.config import TrainConfig
from composer_prior.training.fake import FakeRun, fake_numbers, reference_costs
from composer_prior.training.validate import check_parts, check_whole, skeleton_of

GIB, GB = 2**30, 1e9


class GPU(NamedTuple):
    """A GPU: its peak in bfloat16 with dense matrices, TFLOP/s, and its memory, GiB."""

    tflops: float
    memory: float


GPUS = {  # of NVIDIA's data sheets
    "a100-40": GPU(312, 40),
    "a100-80": GPU(312, 80),
    "h100": GPU(989, 80),
    "h200": GPU(989, 140),
    "b200": GPU(2250, 179),
    "l40s": GPU(362, 45),
    "4090": GPU(165, 24),
}


@dataclass
class Plan:
    """The costs of a run; sizes are in bytes and for one GPU unless the name says otherwise."""

    run_name: str
    gpu: str
    world_size: int
    assumed: list[str]
    refused: list[str]
    memory: dict[str, int]  # at the peak, by part
    usable: int
    microbatch: int
    fits: bool
    largest_microbatch: int
    other_checkpointing: dict[str, Any] | None  # the peak with the other choice of activation checkpointing
    flops: dict[str, float]  # of a sample: the model's and the reference's; of a step, over all GPUs
    steps: int | None
    samples_per_second: float
    seconds: float | None
    gpu_hours: float | None
    checkpoint: int
    checkpoint_seconds: float
    model: int
    bucket_bytes_per_second: float | None  # of a node
    cache_limit: float | None  # of a node

    def __str__(self) -> str:
        parts = [(name, f"{size / GIB:.2f} GiB") for name, size in self.memory.items() if size]
        verdict = "fits" if self.fits else "does NOT fit"
        lines = [
            f"{self.run_name} on {self.world_size} x {self.gpu}",
            *_table(("memory of a GPU at the peak", ""), [*parts, ("together", self._gib(sum(self.memory.values())))]),
            f"A microbatch of {self.microbatch} {verdict} in {self._gib(self.usable)}; "
            f"the largest that fits: {self.largest_microbatch or 'none'}.",
        ]
        if (other := self.other_checkpointing) is not None:
            state = "true" if other["activation_checkpointing"] else "false"
            fits = "fits" if other["peak"] <= self.usable else "does not fit"
            lines.append(f"With activation_checkpointing={state}: {self._gib(other['peak'])}, which {fits}.")
        work = [(f"TFLOP, {name}", f"{value / 1e12:,.2f}") for name, value in self.flops.items()]
        rows = [*work, ("samples a second", f"{self.samples_per_second:,.0f}")]
        if self.seconds is not None:
            rows += [("steps", f"{self.steps:,}"), ("hours", f"{self.seconds / 3600:,.2f}")]
            rows += [("GPU hours", f"{self.gpu_hours:,.1f}")]
        rows += [("a checkpoint", f"{self.checkpoint / GB:.1f} GB, {self.checkpoint_seconds:.0f} s")]
        rows += [("the saved model", f"{self.model / GB:.1f} GB")]
        if self.bucket_bytes_per_second is not None:
            rows += [("from the bucket, each node", f"{self.bucket_bytes_per_second / 1e6:,.1f} MB/s")]
            rows += [("cache_limit, at least", f"{(self.cache_limit or 0) / GB:,.1f} GB")]
        lines += ["", *_table(("operations, time and storage", ""), rows), "", "Assumed:"]
        lines += [f"- {line}" for line in self.assumed]
        lines += ["", "A start here would be refused:"] if self.refused else []
        lines += [f"- {line}" for line in self.refused]
        return "\n".join(lines)

    @staticmethod
    def _gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)]


def plan(
    recipe: TrainConfig,
    *,
    world_size: int = 8,
    gpu: str = "h100",
    nproc: int = 8,
    mfu: float = 0.4,
    labels: float | None = None,
    samples: int | None = None,
    sample_bytes: float | None = None,
    write: float = 2.0,
    reserve: float = 0.06,
    out: str | None = None,
) -> Plan:
    """Plan a run; no weight is made or loaded, and no GPU is needed.

    Args:
        recipe: of the run.
        world_size: GPUs of all nodes.
        gpu: a100-40, a100-80, h100, h200, b200, l40s, 4090; or cpu, to compare with a measurement there.
        nproc: GPUs of a node.
        mfu: share of the GPU's peak that the model's operations reach, without recomputation.
        labels: mean number of labelled tokens of a sample, for operations and time. Default: the mean of the first
            1,000 samples of the data where they are here, else max_caption_tokens.
        samples: of the data. Default: what its index says where it is here.
        sample_bytes: mean size of a sample. Default: what its index says where it is here.
        write: GB/s at which a node writes a checkpoint.
        reserve: share of the memory that CUDA, NCCL and fragmentation take.
        out: JSON file for the plan. Default: none is written.

    Raises:
        ValueError: for a recipe or an option that cannot be planned.
    """
    if gpu not in (*GPUS, "cpu"):
        raise ValueError(f"gpu={gpu}: expected {', '.join(GPUS)} or cpu.")
    given = {"world_size": world_size, "nproc": nproc, "mfu": mfu, "labels": labels, "samples": samples}
    for name, value in {**given, "sample_bytes": sample_bytes, "write": write}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}: expected more than 0.")
    on_gpu, device = gpu != "cpu", GPUS.get(gpu, GPU(0.1, 2**20))
    assumed = [f"{mfu:.0%} of {device.tflops:,.0f} TFLOP/s (mfu=); checkpoints at {write:g} GB/s a node (write=)."]
    refused = _refused(recipe, assumed)
    data = recipe.train_loader["dataset"]
    longest = data.get("max_caption_tokens", 128)
    samples, sample_bytes, mean = _measure(recipe, samples, sample_bytes, labels)
    if mean is None:
        assumed.append(f"Captions of {longest} tokens, max_caption_tokens (labels=).")
    else:
        assumed.append(f"Captions of {mean:.1f} tokens on average (labels=), of {longest} where memory is at its peak.")
    tokens = max(1, round(mean or longest))
    if data.get("packing_ratio") is not None:
        assumed.append("Batches of samples and not of packed rows (train_loader.dataset.packing_ratio).")
    for name, arguments in recipe.algorithms.items():
        if (arguments or {}).get("viewer") and not data.get("viewer_scores"):
            assumed.append(
                f"Nothing of the live viewer of algorithms.{name}, which adds its weights, and a third of the model's "
                "operations if it is as large."
            )
    precision = Precision.AMP_BF16 if on_gpu and recipe.precision == "auto" else build_precision(recipe.precision)
    unused = unused_weights(_model(recipe))
    with fake_ranks(world_size):
        of_rank = per_rank_batch_size(recipe.global_train_batch_size)
        size = recipe.device_train_microbatch_size
        microbatch = of_rank if not isinstance(size, int) else min(size, of_rank)
        run = FakeRun(_model(recipe, unused), recipe.optimizer, recipe.parallelism_config, precision, on_gpu)
        live = _live_reference(recipe, run, tokens)
        usable = int(device.memory * GIB * (1 - reserve))

        def peak(run: FakeRun, size: int) -> dict[str, int]:
            parts = run.peak(planned_batch(run, data, size, longest), again=size < of_rank)
            return {**parts, "live reference": live.get("memory", 0)}

        memory = peak(run, microbatch)
        total = sum(memory.values())
        largest = _largest(usable, of_rank, (microbatch, total), lambda size: sum(peak(run, size).values()))
        other = None
        if (fsdp2 := (recipe.parallelism_config or {}).get("fsdp2")) is not None:
            changed = not fsdp2.get("activation_checkpointing", False)
            sharded = {"fsdp2": {**fsdp2, "activation_checkpointing": changed}}
            second = FakeRun(_model(recipe, unused), recipe.optimizer, sharded, precision, on_gpu)
            other = {"activation_checkpointing": changed, "peak": sum(peak(second, microbatch).values())}
    whole = FakeRun(_model(recipe, unused), recipe.optimizer, None, precision, on_gpu)
    flops = {"model, a sample": float(whole.flops(planned_batch(whole, data, 1, tokens)))}
    if "flops" in live:
        flops["reference, a sample"] = live["flops"]
    flops["a step, all GPUs"] = sum(flops.values()) * recipe.global_train_batch_size
    rate = world_size * device.tflops * 1e12 * mfu / sum(list(flops.values())[:-1])
    steps = _steps(recipe, samples)
    seconds = None if steps is None else steps * recipe.global_train_batch_size / rate
    nodes = max(1, world_size // nproc)
    checkpoint = whole.weights + whole.state
    found = Plan(
        run_name=recipe.run_name,
        gpu=gpu,
        world_size=world_size,
        assumed=assumed,
        refused=refused,
        memory=memory,
        usable=usable,
        microbatch=microbatch,
        fits=total <= usable,
        largest_microbatch=largest,
        other_checkpointing=other,
        flops=flops,
        steps=steps,
        samples_per_second=rate,
        seconds=seconds,
        gpu_hours=None if seconds is None else seconds * world_size / 3600,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint / (nodes * write * GB),
        model=whole.weights,
        bucket_bytes_per_second=None if sample_bytes is None else rate / nodes * sample_bytes,
        cache_limit=None if sample_bytes is None else _cache_limit(data, nodes, samples, sample_bytes),
    )
    if out is not None:
        write_whole(Path(out), json.dumps(asdict(found), indent=1).encode())
    return found


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Start a fake process group, in which this process is the first rank and collectives do nothing."""
    if torch.distributed.is_initialized():
        raise ValueError("A plan is made by one process alone, outside of a distributed run.")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _refused(recipe: TrainConfig, assumed: list[str]) -> list[str]:
    """Return the errors with which a start on this machine would end, but for the lack of GPUs."""
    here = replace(recipe, precision="fp32", parallelism_config=None)
    if recipe.device_train_microbatch_size == "auto":
        here.device_train_microbatch_size = None
    checks = [check_parts, check_whole]
    if _trains_tokenizer(recipe) or (recipe.data is not None and not Path(recipe.data["out"]).exists()):
        assumed.append("Data or tokenizer are made first, so that what depends on them is not checked here.")
        checks = [check_parts]
    found = []
    for check in checks:
        try:
            check(here)
        except (ValueError, OSError, RuntimeError) as error:
            found.append(one_line(error))
    return found


def _measure(
    recipe: TrainConfig, samples: int | None, sample_bytes: float | None, labels: float | None
) -> tuple[int | None, float | None, float | None]:
    """Return the number of samples, their mean bytes and labelled tokens, given or of data that are here."""
    config = recipe.train_loader["dataset"]
    places = [*(config.get("streams") or {"": config}).values()]
    files = [Path(p.get("local") or "", p.get("split") or config.get("split") or "", "index.json") for p in places]
    if not all(file.is_file() for file in files):
        return samples, sample_bytes, labels
    shards = [shard for file in files for shard in json.loads(file.read_bytes())["shards"]]
    count = sum(shard["samples"] for shard in shards)
    size = sum((shard.get("zip_data") or shard["raw_data"])["bytes"] for shard in shards)
    if labels is None and count and not any(place.get("remote") for place in places):
        tokenizer = build_tokenizer(recipe.tokenizer) if not _trains_tokenizer(recipe) else None
        if tokenizer is not None:
            longest, captions = config.get("max_caption_tokens", 128), [*islice(read_captions(config), 1000)]
            lengths = [min(longest, 1 + len(encode_caption(tokenizer, caption).ids)) for caption in captions]
            labels = sum(lengths) / len(lengths)
    return samples or count, sample_bytes or size / max(count, 1), labels


def _trains_tokenizer(recipe: TrainConfig) -> bool:
    """Return True if a run would train its tokenizer first."""
    return recipe.tokenizer.get("train") is not None and not Path(recipe.tokenizer["name"]).exists()


def _tokenizer(recipe: TrainConfig) -> Any:
    """Return the recipe's tokenizer, or one of the same size where it is yet to be trained."""
    if not _trains_tokenizer(recipe):
        return build_tokenizer(recipe.tokenizer)
    size, tokenizer = recipe.tokenizer["train"]["vocab_size"], train_tokenizer([], VOCAB_SIZES.start)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), size)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return tokenizer


def _model(recipe: TrainConfig, unused: Sequence[str] = ()) -> ComposerLVLM:
    """Return the model without weights, the unused ones frozen as in a run."""
    model = skeleton_of(recipe, _tokenizer(recipe), "")
    if not isinstance(model, ComposerLVLM):
        raise ValueError(f"model.name={recipe.model['name']} cannot be planned: it cannot be built without weights.")
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    return model


def planned_batch(run: FakeRun, data: Mapping[str, Any], samples: int, tokens: int) -> dict[str, Tensor]:
    """Return a microbatch of images of 1024 x 1024 pixels, with captions of ``tokens`` tokens.

    Args:
        run: whose model reads it.
        data: arguments of the recipe's data set.
        samples: of the microbatch.
        tokens: of each caption.
    """
    model, tokenizer, prompt = run.model, run.model.tokenizer, data.get("prompt", "")
    processor = model.image_processor
    if isinstance(processor, ProcessorInputs):
        processor = replace(processor, prompt=prompt, caption_tokens=tokens)
    image = ImageInputs({}, []) if processor is None else processor(Image.new("RGB", (1024, 1024)))
    before = image.prefix
    if before is None:
        layout = [image_token_ids(tokenizer)[kind] for kind in image.layout]
        before = {"input_ids": [bos_id(tokenizer), *layout, *prompt_ids(tokenizer, prompt)]}
    item = caption_item(image, before, [tokenizer.eos_token_id] * tokens, {"sample_id": 0})
    with run.mode:
        return CaptionCollator(0)([fake_numbers(item)] * samples)


def _live_reference(recipe: TrainConfig, run: FakeRun, tokens: int) -> dict[str, Any]:
    """Return memory and operations of a live reference for captions of ``tokens`` tokens, {} if scores are stored."""
    data = recipe.train_loader["dataset"]
    for given in recipe.algorithms.values():
        if not (given or {}).get("reference") or data.get("scores"):
            continue
        own, dtype = recipe.reference_recipe, given.get("reference_dtype")
        if own is not None:
            reference = ReferenceLM(skeleton_of(own, run.model.tokenizer, "reference.").model)
            reference.model.to(getattr(torch, dtype or "float32"))
        else:
            if dtype is None and run.gpu:  # that of its files, where a machine without a GPU would take float32
                dtype = load_pretrained(AutoConfig, given["reference"]).dtype
            reference = ReferenceLM.from_pretrained(given["reference"], dtype=dtype, weights=False)
        memory, flops = reference_costs(reference, run, tokens)
        return {"memory": memory // (dist.get_world_size() if given.get("shard_reference") else 1), "flops": flops}
    return {}


def _largest(usable: int, most: int, known: tuple[int, int], peak: Any) -> int:
    """Return the largest microbatch whose peak is usable: by a line through two, checked at its result."""
    size, total = known
    second = size // 2 or 2
    if second > most:
        return size if total <= usable else 0
    points = {size: total, second: peak(second)}
    for _ in range(3):
        (low, small), (high, large) = sorted(points.items())[:: len(points) - 1][:2]
        slope = max(1.0, (large - small) / (high - low))
        found = min(most, max(0, int(high + (usable - large) / slope)))
        if found < 1 or found in points:
            break
        points[found] = peak(found)
        if points[found] <= usable:
            break
    return max((number for number, taken in points.items() if taken <= usable), default=0)


def _steps(recipe: TrainConfig, samples: int | None) -> int | None:
    """Return the steps of a run, or None if they depend on data that are not known."""
    length, size = Time.from_timestring(recipe.max_duration), recipe.global_train_batch_size
    if length.unit == TimeUnit.BATCH:
        return int(length.value)
    if length.unit == TimeUnit.SAMPLE:
        return int(length.value // size)
    return int(length.value * (samples // size)) if length.unit == TimeUnit.EPOCH and samples else None


def _cache_limit(data: Mapping[str, Any], nodes: int, samples: int | None, sample_bytes: float) -> float:
    """Return 1.5 times the bytes of the shuffle blocks that a node works on, at most all, see docs/scale.md."""
    canonical = data.get("num_canonical_nodes") or nodes
    block = data.get("shuffle_block_size") or max(4_000_000 // canonical, 2**18)
    return min(1.5 * block * canonical / nodes, samples or math.inf) * sample_bytes
