"""Measure sharding: ``python -m benchmarks.memory [hidden=768] [layers=12] [batch=8] [only=...] [out=...]``.

A language model of some 130 million weights, a seventh of them embeddings as in one of 8 billion, and a small tower
train in float32 with AdamW on the CPU, on one rank and on two (FSDP2 over gloo), each case in new processes. The table
shows the peak memory of the first and the second rank above the level before they build the model, as a multiple of the
language model in float32; beside a step the peak that ``composer-prior plan`` predicts for it. Pages of mapped files,
which the system can take back, do not count. ``only`` selects cases by a part of their name; ``out`` names a file for
the numbers. With ``nanovlm``, a checkout of version v0.1 of huggingface/nanoVLM, the table has peaks on an H100 as its
README has them and as planned.
"""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec, Precision
from composer.utils import dist
from composer.utils.misc import get_free_tcp_port
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import anonymous_bytes, prepare_process
from benchmarks.setup import adamw, build_tokenizer, training_batches
from composer_prior.data.batch import count_tokens
from composer_prior.models.build import lvlm_skeleton
from composer_prior.models.reference import ReferenceLM
from composer_prior.models.sharding import ON_CPU, build_parallelism, prepare_sharded
from composer_prior.training.builders import build_model
from composer_prior.training.fake import FakeRun, fake_numbers
from composer_prior.training.plan import fake_ranks

DEFAULTS = {"hidden": 768, "layers": 12, "vocabulary": 24576, "batch": 8, "only": "", "out": None, "nanovlm": None}
FSDP2: dict[str, Any] = {"fsdp2": {}}
CHECKPOINTED: dict[str, Any] = {"fsdp2": {"activation_checkpointing": True}}
FULL: dict[str, Any] = {"fsdp2": {"state_dict_type": "full"}}
STEPS = "three steps"
PUBLISHED = {  # MiB at the peak by batch size, of nanoVLM v0.1's README
    1: 4439.02,
    8: 5062.60,
    16: 6989.32,
    32: 10880.09,
    64: 18584.00,
    128: 34043.34,
    256: 64944.37,
}
Peaks = dict[str, int]


class Memory:
    """Peak anonymous memory of this process in each phase, above the level at the start."""

    def __init__(self) -> None:
        self.peaks: Peaks = {}
        self._before = anonymous_bytes()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak memory of the enclosed statements."""
        over = threading.Event()

        def watch() -> None:
            while True:
                self.peaks[name] = max(self.peaks.get(name, 0), anonymous_bytes() - self._before)
                if over.wait(0.003):
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def write_language_model(folder: Path, settings: dict[str, Any]) -> int:
    """Write a Llama with random bfloat16 weights to a folder, and return its size in float32 in bytes."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=4 * settings["hidden"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["hidden"] // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.bfloat16().save_pretrained(folder, max_shard_size="100MB")
    build_tokenizer().save_pretrained(folder)
    return sum(4 * parameter.numel() for parameter in model.parameters())


class _Batches(torch.utils.data.IterableDataset):
    def __init__(self, batches: list[dict[str, torch.Tensor]]):
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def _model(folder: Path) -> dict[str, Any]:
    vision = {"name": "open_clip", "architecture": "prior-vit-tiny", "layer": -1}
    return {"language": {"pretrained": str(folder)}, "vision": vision, "projector": {"name": "mlp"}}


def planned(ranks: int, folder: Path, settings: dict[str, Any], parallelism: Any, by_block: bool = True) -> int:
    """Return the peak in bytes of a step of :func:`training` as a plan predicts it."""
    with fake_ranks(ranks):
        model = lvlm_skeleton(build_tokenizer(), **_model(folder))
        if not by_block:
            model.model.fsdp_wrap_fn = lambda module: False
        run = FakeRun(model, {"name": "adamw", "fused": True}, parallelism, Precision.FP32, gpu=False)
        batch = training_batches(1, settings["batch"], vocabulary=settings["vocabulary"])[0]
        with run.mode:
            batch = fake_numbers(batch)
        return sum(run.peak(batch).values())


class _NanoVLM(torch.nn.Module):
    """The interface that a plan asks of a model; the logits stay, as in nanoVLM's own measurement."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        given = {"attention_mask": batch["attention_mask"], "targets": batch["labels"]}
        self.logits, loss = self.model(batch["input_ids"], batch["pixel_values"], **given)
        return loss

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs


def print_published(checkout: str) -> None:
    """Print peaks of a step of nanoVLM on a GPU, as measured by its authors and as planned."""
    sys.path.insert(0, checkout)
    from models.config import VLMConfig
    from models.vision_language_model import VisionLanguageModel

    config = VLMConfig()
    with fake_ranks(1), torch.device("meta"):
        model = VisionLanguageModel(config, load_backbone=False)
    print(
        "| batch size | published, MiB | planned, MiB | planned / published |\n| ---: | ---: | ---: | ---: |",
        flush=True,
    )
    with fake_ranks(1):
        run = FakeRun(_NanoVLM(model), {"name": "adamw"}, None, Precision.AMP_BF16)
        for size, published in PUBLISHED.items():
            ids = torch.ones(size, config.lm_max_length, dtype=torch.long)
            pixels = torch.zeros(size, 3, config.vit_img_size, config.vit_img_size)
            batch = {"input_ids": ids, "attention_mask": ids, "labels": ids, "pixel_values": pixels}
            with run.mode:
                batch = fake_numbers(batch)
            peak = sum(run.peak(batch).values()) / 2**20
            print(f"| {size} | {published:,.0f} | {peak:,.0f} | {peak / published:.2f} |", flush=True)


def training(folder: Path, settings: dict[str, Any], parallelism: Any, by_block: bool = True) -> Peaks:
    """Measure loading, sharding, three steps, a checkpoint, and gathering the whole model."""
    memory = Memory()
    with memory.phase("loading"):
        model = build_model({"name": "lvlm", **_model(folder)}, build_tokenizer(), parallelism)
    if not by_block:
        model.model.fsdp_wrap_fn = lambda module: False
    batches = training_batches(1, settings["batch"], vocabulary=settings["vocabulary"]) * 3
    with memory.phase("sharding"):
        trainer = Trainer(
            model=model,
            train_dataloader=DataSpec(
                _Batches(batches),
                get_num_samples_in_batch=lambda batch: len(batch["labels"]),
                get_num_tokens_in_batch=count_tokens,
            ),
            max_duration="3ba",
            optimizers=adamw(model),
            parallelism_config=build_parallelism(parallelism),
            device_train_microbatch_size=settings["batch"],
            accumulate_train_batch_on_tokens=True,
            progress_bar=False,
            device="cpu",
        )
        prepare_sharded(trainer.state.model)
    with memory.phase(STEPS):
        trainer.fit()
    with memory.phase("a checkpoint"), tempfile.TemporaryDirectory() as out:
        trainer.save_checkpoint(dist.all_gather_object(f"{out}/ba3/rank{{rank}}.pt")[0])
        dist.barrier()
    with memory.phase("the model whole"):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        get_model_state_dict(trainer.state.model, options=options)
    return memory.peaks


def scoring(folder: Path, settings: dict[str, Any], sharded: bool) -> Peaks:
    """Measure a live reference: loading, and scoring a batch."""
    memory = Memory()
    batch = training_batches(1, settings["batch"], vocabulary=settings["vocabulary"])[0]
    with memory.phase("loading"):
        reference = ReferenceLM.from_pretrained(str(folder), weights=not sharded or dist.get_global_rank() == 0)
    with memory.phase("scoring"):
        if sharded:
            reference.shard("cpu")
        reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return memory.peaks


CASES: dict[str, tuple[int, Callable[..., Peaks], tuple[Any, ...]]] = {
    "one rank": (1, training, (None,)),
    "one rank, checkpointing": (1, training, (CHECKPOINTED,)),
    "two ranks, DDP": (2, training, (None,)),
    "two ranks, FSDP2, one unit": (2, training, (FSDP2, False)),
    "two ranks, FSDP2 by block": (2, training, (FSDP2,)),
    "two ranks, FSDP2 by block, checkpointing": (2, training, (CHECKPOINTED,)),
    "two ranks, FSDP2 by block, checkpoint in one file": (2, training, (FULL,)),
    "two ranks, reference on each": (2, scoring, (False,)),
    "two ranks, reference sharded": (2, scoring, (True,)),
}


def _rank(rank: int, ranks: int, port: int, case: str, folder: Path, settings: dict[str, Any], out: Path) -> None:
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**shared, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}.items():
        os.environ[name] = str(value)
    prepare_process(1)
    dist.initialize_dist("cpu", timeout=600)
    _, measure, arguments = CASES[case]
    (out / str(rank)).write_text(json.dumps(measure(folder, settings, *arguments)))


def peaks_of(case: str, folder: Path, settings: dict[str, Any]) -> list[Peaks]:
    """Run a case, and return the peaks of each rank."""
    with tempfile.TemporaryDirectory() as out:
        ranks, port = CASES[case][0], get_free_tcp_port()
        torch.multiprocessing.spawn(_rank, (ranks, port, case, folder, settings, Path(out)), nprocs=ranks)
        return [json.loads(Path(out, str(rank)).read_text()) for rank in range(ranks)]


def main() -> None:
    """Print a table."""
    settings: Any = OmegaConf.to_container(OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(sys.argv[1:])))
    prepare_process(1)
    if settings["nanovlm"]:
        print_published(settings["nanovlm"])
        return
    os.environ.setdefault(ON_CPU, str(Path(__file__).parents[1] / "tests/common/gloo.py"))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # freed memory goes back to the system and is not counted
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = write_language_model(Path(folder), settings)
        print(f"{settings}; the language model is {size / 1e6:.0f} MB in float32\n", flush=True)
        print("| case | phase | first rank | second rank | planned |\n| --- | --- | ---: | ---: | ---: |", flush=True)
        for case in filter(lambda name: settings["only"] in name, CASES):
            peaks = peaks_of(case, Path(folder), settings)
            for phase in peaks[0]:
                multiples = [of_rank[phase] / size for of_rank in peaks]
                row: dict[str, Any] = {"case": case, "phase": phase, "multiples": multiples}
                ranks, measure, arguments = CASES[case]
                if phase == STEPS and measure is training:
                    row["planned"] = planned(ranks, Path(folder), settings, *arguments) / size
                rows.append(row)
                cells = [f"{multiple:.2f} x" for multiple in multiples] + [""] * (2 - ranks)
                cells += [f"{row['planned']:.2f} x" if "planned" in row else ""]
                print(f"| {case} | {phase} | {' | '.join(cells)} |", flush=True)
    if settings["out"]:
        Path(settings["out"]).write_text(json.dumps({"settings": settings, "bytes": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
