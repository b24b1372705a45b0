"""The recipes of the repository, made small: what the tests of whole runs start from."""

import json
import os
import subprocess
import sys
from pathlib import Path

from composer_prior.training.config import load_recipe

ROOT = Path(__file__).parents[2]
SHRUNKEN = [
    "data.train_samples=64",
    "data.validation_samples=16",
    "data.canvas=48",
    "tokenizer.train.vocab_size=400",
    "max_duration=4ba",
    "reference.max_duration=4ba",
    "global_train_batch_size=8",
    "reference.global_train_batch_size=8",
    "device_eval_batch_size=8",
    "reference.save_interval=2ba",
    "reference.model.language.config.hidden_size=32",
    "reference.model.language.config.num_hidden_layers=1",
    *(f"{prefix}{loader}_loader.num_workers=0" for prefix in ("", "reference.") for loader in ("train", "eval")),
    *(
        f"{prefix}{loader}_loader.persistent_workers=false"
        for prefix in ("", "reference.")
        for loader in ("train", "eval")
    ),
    "progress_bar=false",
    "reference.progress_bar=false",
    "sample_captions=2",
]
BENCHMARKS = [
    "benchmarks.scene_foils.samples=12",
    *(f"benchmarks.{n}.limit=4" for n in ("hallucination", "captioning")),
]
TOWER = ["model.vision.image_size=24"]
VIT = [*TOWER, *BENCHMARKS]
PATCH = ["model.vision.patch_size=12", "model.vision.max_side=48", *BENCHMARKS]


def recipe(name, *overrides):
    family = VIT if "vit" in name else PATCH if "patch" in name else []
    shrunken = SHRUNKEN if name != "reference" else [o.removeprefix("reference.") for o in SHRUNKEN]
    return load_recipe(ROOT / "yamls" / f"{name}.yaml", [*shrunken, *family, *overrides])


def losses(folder):
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(line["batch"], line["loss/train/total"]) for line in lines if "loss/train/total" in line]


def run_program(*command, ok=True, timeout=400, cwd=None, **environment):
    """What a program of one thread has printed, with the right kind of exit status."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode == 0) == ok, (done.stdout + done.stderr)[-3000:]
    return done.stdout, done.stderr


def launch(folder, *command, expect=0, ranks=2, timeout=400):
    """What the command prints under Composer's launcher, in a folder."""
    composer = Path(sys.executable).with_name("composer")
    options = {"ok": expect == 0, "timeout": timeout, "cwd": folder, "PYTHONPATH": str(ROOT / "tests")}
    return "".join(run_program(composer, "-n", ranks, *command, **options))
