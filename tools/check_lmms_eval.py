"""Compare captions of lmms-eval and of the command: ``python tools/check_lmms_eval.py out=FOLDER [env=FOLDER]``.

The check trains a small model, captions 64 images with ``composer-prior caption`` and with lmms-eval, and requires
equal strings. It first creates lmms-eval's environment (``scripts/lmms_eval.py install``), its only download.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from common.recipes import SHRUNKEN, VIT  # noqa: E402 - of the tests

IMAGES = 64
BATCH = 16
MEMORISES = [  # the 64 images of training, so that captions differ from image to image
    f"data.train_samples={IMAGES}",
    "reference.model.language.config.hidden_size=128",
    "max_duration=400ba",
    "sample_captions=0",
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def main(arguments: list[str]) -> int:
    """Train, caption twice, compare and print; return 1 if captions differ."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if not {"out"} <= set(given) <= {"out", "env"} or len(given) != len(arguments):
        print("Usage: python tools/check_lmms_eval.py out=FOLDER [env=FOLDER]")
        return 1
    out = Path(given["out"]).resolve()
    env = Path(given.get("env", out / "env")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    script = (sys.executable, ROOT / "scripts/lmms_eval.py")
    model = out / "runs/prior_vit/model"
    if not model.exists():
        job("train", out, *ours("train"), ROOT / "yamls/prior_vit.yaml", *SHRUNKEN, *VIT, *MEMORISES)
    job("install", out, *script, "install", f"env={env}")
    job("task", out, *script, "task", out / "data/emoji_scenes/train", out / "task")
    write_images(out / "task/captions.parquet", out / "images")
    options = ["num_workers=0", f"batch_size={BATCH}", "overwrite=true", "out=captions.jsonl", "progress=false"]
    job("composer-prior caption", out, *ours("caption"), model, "images", *options)
    log = out / f"lmms_eval_{time.time_ns()}"
    words = ["--model", "composer_prior", "--model_args", f"pretrained={model}", "--batch_size", BATCH]
    words += ["--include_path", out / "task", "--tasks", "captions", "--log_samples", "--output_path", log]
    job("lmms-eval", out, env / "bin/python", "-m", "lmms_eval", *words)
    return compare(out / "captions.jsonl", log)


def ours(name: str) -> tuple[Any, ...]:
    """Return the words that start a command of ``composer-prior``."""
    return sys.executable, "-m", "composer_prior", name


def job(name: str, folder: Path, *command: Any) -> None:
    """Run a program in a folder without a hub, with its output in a file there, and print its time."""
    start = time.monotonic()
    file = folder / f"{name.replace(' ', '_')}.log"
    with open(file, "w") as output:
        environment = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "hf")}
        done = subprocess.run(
            [*map(str, command)], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"error: {name} failed: {file} ends with\n{file.read_text()[-3000:]}")


def write_images(parquet: Path, folder: Path) -> None:
    """Write the images of a Parquet file to files named by their rows."""
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    for number, image in enumerate(pyarrow.parquet.read_table(parquet)["image"].to_pylist()):
        (folder / f"{number:04}.png").write_bytes(image)


def compare(captions: Path, log: Path) -> int:
    """Print the number of equal captions; return 1 unless all are equal."""
    lines = [json.loads(line) for line in captions.read_text().splitlines()]
    command = {int(Path(line["image"]).stem): line["caption"] for line in lines}
    (samples,) = log.rglob("*samples_captions.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    # lmms-eval strips a response before it scores it, and also logs the original.
    plugin = {line["doc_id"]: answer(line.get("resps", line["filtered_resps"])) for line in found}
    same = sum(command[number] == plugin.get(number) for number in command)
    for number in [number for number in command if command[number] != plugin.get(number)][:5]:
        print(f"{number}: {command[number]!r}, lmms-eval: {plugin.get(number)!r}")
    (results,) = log.rglob("*results.json")
    print(json.loads(results.read_text())["results"])
    different = len(set(command.values()))
    print(f"{same} of {len(command)} captions are equal; {different} are distinct.")
    return int(not (same == len(command) == len(plugin) == IMAGES and different > IMAGES // 4))


def answer(responses: Any) -> str:
    """Return the one response of a document, which lmms-eval logs with or without a list."""
    return responses if isinstance(responses, str) else answer(*responses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
