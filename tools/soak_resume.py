"""Kill a run with SIGKILL at random moments until it finishes, and compare its metrics with an undisturbed run.

``python tools/soak_resume.py [kills=20] [seed=0] [folder=...] [bucket=...]`` runs a small ``prior_vit.yaml`` from an
empty folder: data, tokenizer, reference, scores and LVLM, with a checkpoint after each batch. With a bucket, such as
``s3://soak``, the killed runs save the LVLM there and the reference on the disk. Other keys override the recipe:
``kills=5 save_interval=1ep max_duration=3ep``.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for a run that takes 30 on two cores
TIMED = ("time/", "throughput/")  # metrics that vary between runs
RECIPE = [
    "data.train_samples=64",
    "data.validation_samples=16",
    "data.canvas=48",
    "tokenizer.train.vocab_size=400",
    "device_eval_batch_size=8",
    "model.vision.image_size=24",
    "sample_captions=0",
    "autoresume=true",
    "reference.model.language.config.hidden_size=32",
    "reference.model.language.config.num_hidden_layers=1",
    *(
        f"{prefix}{setting}"
        for prefix in ("", "reference.")
        for setting in (
            "max_duration=12ba",
            "global_train_batch_size=8",
            "save_interval=1ba",
            "progress_bar=false",
            "train_loader.num_workers=0",
            "train_loader.persistent_workers=false",
            "eval_loader.num_workers=0",
            "eval_loader.persistent_workers=false",
        )
    ),
]


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start the command in a new process group, with its output in ``log.txt``."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "yamls/prior_vit.yaml"), *RECIPE, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def metrics(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the metrics of the reference and the run, without timings."""
    return {
        run: [
            {name: value for name, value in json.loads(line).items() if not name.startswith(TIMED)}
            for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("reference", "prior_vit")
    }


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and its descendants; under the launcher each rank leads a process group."""
    import psutil

    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def soak(folder: Path, kills: int, seed: int, bucket: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Kill and resume runs, with a new run after each that finishes; return the number of runs with other metrics.

    Args:
        folder: working folder.
        kills: number of kills.
        seed: seed of the moments.
        bucket: URL for checkpoints of the killed runs. Default: the disk.
        overrides: overrides of the recipe.

    Raises:
        RuntimeError: if a run ends with an error.
    """
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir(parents=True)
    process = start(undisturbed, *overrides)
    _wait_for_output(undisturbed, 0)
    began = time.monotonic()
    _finish(process, undisturbed, PATIENCE)
    work = time.monotonic() - began
    expected = metrics(undisturbed)
    moments = random.Random(seed)
    killed, finished, different = 0, 0, 0
    while killed < kills or finished == 0:
        run = folder / f"killed-{finished}"
        run.mkdir(exist_ok=True)
        written = (run / "log.txt").stat().st_size if (run / "log.txt").exists() else 0
        process = start(run, *overrides, *([f"save_folder={bucket}/{run.name}"] if bucket else []))
        try:
            if killed < kills:
                _wait_for_output(run, written)
                process.wait(moments.random() * work)
            _finish(process, run, PATIENCE + 10 * work)
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
            print(f"kill {killed} of {kills}: {_last_line(run)}", flush=True)
            continue
        finished += 1
        same = metrics(run) == expected
        different += not same
        print(f"finished {finished}: {'the same metrics' if same else 'OTHER METRICS'}", flush=True)
    return different


def _wait_for_output(folder: Path, written: int) -> None:
    """Wait for the first output, after the imports, so that kills hit the actual work."""
    while (folder / "log.txt").stat().st_size <= written:
        time.sleep(0.05)


def _finish(process: subprocess.Popen[bytes], folder: Path, seconds: float) -> None:
    try:
        code: int | str = process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        code = f"a kill after a timeout of {seconds:.0f} s"
    if code != 0:
        raise RuntimeError(f"the run in {folder} ended with {code}: {_last_line(folder)}; see log.txt there")


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output yet"


def main(arguments: list[str]) -> int:
    """Run the test, and return 1 if metrics differ."""
    own = {"kills": 20, "seed": 0, "folder": None, "bucket": None}
    of_tool = [argument for argument in arguments if argument.partition("=")[0] in own]
    overrides = [argument for argument in arguments if argument not in of_tool]
    options = OmegaConf.merge(own, OmegaConf.from_dotlist(of_tool))
    folder = Path(options.folder or tempfile.mkdtemp(prefix="soak-"))
    different = soak(folder, options.kills, options.seed, options.bucket, overrides)
    print(f"{options.kills} kills, {different} runs with other metrics")
    if options.folder is None:
        shutil.rmtree(folder)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
