"""The recipes of the repository, made small: what the tests of whole runs start from."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from composer.utils.misc import get_free_tcp_port

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
NO_REPORT = ["sample_captions=0", *(f"benchmarks.{n}=null" for n in ("scene_foils", "hallucination", "captioning"))]
TOWER = ["model.vision.image_size=24"]
VIT = [*TOWER, *BENCHMARKS]
FAULTS = f"code_paths=[{ROOT / 'tests/common/programs/faults.py'}]"
LANGUAGE = "{model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
ALONE = ["reference=null", "model.language.pretrained=null", f"model.language.config={LANGUAGE}"]  # without a reference
# The recipe at real scale made small, beside a language model with its tokenizer in the folder ``pretrained``.
LOADERS = [f"{prefix}{kind}_loader" for prefix in ("", "reference.") for kind in ("train", "eval")]
SMALL_REAL_SCALE = [
    "tokenizer.name=pretrained",
    "reference.model.language.pretrained=pretrained",
    "model.vision.architecture=prior-vit-tiny",
    "model.vision.pretrained=null",
    "model.vision.image_size=48",
    *(f"{prefix}global_train_batch_size=16" for prefix in ("", "reference.")),
    *(f"{prefix}device_train_microbatch_size=4" for prefix in ("", "reference.")),
    *(f"{prefix}progress_bar=false" for prefix in ("", "reference.")),
    *(f"{loader}.num_workers=1" for loader in LOADERS),
]
PATCH = ["model.vision.patch_size=12", "model.vision.max_side=48", *BENCHMARKS]


def recipe(name, *overrides):
    family = VIT if "vit" in name else PATCH if "patch" in name else []
    shrunken = SHRUNKEN if name != "reference" else [o.removeprefix("reference.") for o in SHRUNKEN]
    return load_recipe(ROOT / "yamls" / f"{name}.yaml", [*shrunken, *family, *overrides])


def losses(folder):
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(line["batch"], line["loss/train/total"]) for line in lines if "loss/train/total" in line]


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a rank, which a Trainer also sets in its own process."""


def run_program(*command, ok=True, timeout=400, cwd=None, **environment):
    """Run a program with one thread, check its exit status, and return its output."""
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
    """Run a command under Composer's launcher in a folder, and return its output."""
    composer = Path(sys.executable).with_name("composer")
    options = {"ok": expect == 0, "timeout": timeout, "cwd": folder, "PYTHONPATH": str(ROOT / "tests")}
    return "".join(run_program(composer, "-n", ranks, *command, **options))


def launch_nodes(nodes, *job):
    """Run a job on nodes of one rank, one launcher of this package each, and return its output."""
    start = [sys.executable, "-m", "composer_prior", "launch", "nproc=1", f"world_size={nodes}"]
    start += ["master_addr=127.0.0.1", f"master_port={get_free_tcp_port()}"]
    with ThreadPoolExecutor(nodes) as pool:
        running = [pool.submit(run_program, *start, f"node_rank={node}", *job) for node in range(nodes)]
    return "".join(text for one in running for text in one.result())


@cache
def forks():
    """Start the process from which :func:`fork_ranks` forks; it ends when this one closes its input."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/common/programs/forks.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def fork_ranks(folder, program, *arguments, ranks=2, timeout=400, expect=0, nodes=None, patience=60):
    """Run the ranks of :func:`launch` without its three imports of Composer, and return their output.

    Environment variables replace the launcher; each rank is a separate process. With ``nodes``, each of these folders
    is a node with its share of the ranks. If the ranks shall fail (``expect``), each must end by itself, and at most
    ``patience`` seconds after the first.
    """
    nodes = nodes or [folder or Path.cwd()]
    local = ranks // len(nodes)
    with tempfile.TemporaryDirectory() as outputs:
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": get_free_tcp_port(), "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT / "tests"}
        printed = [Path(outputs, f"rank{rank}.txt") for rank in range(ranks)]
        of_ranks = [{"RANK": r, "LOCAL_RANK": r % local, "NODE_RANK": r // local} for r in range(ranks)]
        request = {
            "arguments": [str(word) for word in (program, *arguments)],
            "folders": [str(nodes[of_rank["NODE_RANK"]]) for of_rank in of_ranks],
            "environments": [
                {**os.environ, **{name: str(value) for name, value in {**shared, **of_rank}.items()}}
                for of_rank in of_ranks
            ],
            "printed": [str(path) for path in printed],
            "timeout": timeout,
            "patience": patience if expect else 0,
        }
        forks().stdin.write(json.dumps(request) + "\n")
        forks().stdin.flush()
        statuses = json.loads(forks().stdout.readline())
        output = "".join(path.read_text() for path in printed if path.exists())
    assert statuses == [expect] * ranks, f"{statuses}: {output[-3000:]}"
    return output
