"""Train at real scale on one GPU: ``python -m benchmarks.gpu [steps=40] [out=runs/gpu] [key=value ...]``.

A ViT-L/14 at 336 pixels and a Llama of 1 billion weights, both random, learn the embedded captions in bf16: by
next-token prediction, by PRIOR with stored scores, and by PRIOR with a live reference of 360 million weights. The table
has the median speed of the second half of the steps, the share of the GPU's peak (MFU), and the peak memory, measured
and planned. Keys override each run; nothing is downloaded.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.cluster import LLAMA_1B, LLAMA_8B, table
from composer_prior.training.plan import GPUS

DEFAULTS = {"steps": 40, "out": "runs/gpu", "gpu": "h200"}
BOS, EOS = {"bos_token_id": 1}, {"eos_token_id": 2}
LLAMA_360M = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
MODEL = {
    "model.vision.architecture": "ViT-L-14-336-quickgelu",
    "model.vision.pretrained": None,
    "model.vision.layer": -2,
    "model.language.pretrained": None,
    "model.language.config": {**LLAMA_8B, **LLAMA_1B, **BOS, **EOS},
    "reference.model.language.config": {**LLAMA_8B, **LLAMA_360M, **BOS, **EOS, "num_key_value_heads": 5},
    "reference.max_duration": "5ba",
    "reference.scheduler.t_warmup": "0ba",
    "benchmarks.scene_foils": None,
    "benchmarks.hallucination": None,
    "benchmarks.captioning": None,
    "optimizer": {"name": "adamw", "lr": 2e-5, "fused": True},
    "scheduler.t_warmup": "5ba",
    "sample_captions": 0,
    "save_folder": None,
    "eval_loader": None,
    "device_train_microbatch_size": 16,
    "train_loader.num_workers": 8,
    "callbacks.compute_monitor": {"interval": 1000},
    "callbacks.memory_monitor": {},
    "callbacks.speed_monitor.window_size": 2,
}
NTP = {"algorithms.prior": None, "train_loader.dataset.scores": None}
METHODS: dict[str, dict[str, Any]] = {
    "next-token prediction": NTP,
    "PRIOR, stored": {},
    "PRIOR, live": {"train_loader.dataset.scores": None},
}


def words(settings: dict[str, Any]) -> list[str]:
    """Return overrides as words of a command."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def measure(method: str, given: dict[str, Any], settings: dict[str, Any]) -> tuple[float, ...]:
    """Plan and train, and return samples/s, the share of the GPU's peak, and peak memory measured and planned, GiB."""
    name = f"{settings['out']}/{method.replace(', ', '_').replace(' ', '_')}"
    run = words({**MODEL, **given, "run_name": method.split(",")[-1].strip(), "run_folder": name})
    run += [
        f"max_duration={settings['steps']}ba",
        f"reference.run_folder={settings['out']}/reference",
        *settings["keys"],
    ]
    command = [sys.executable, "-m", "composer_prior"]
    planned = f"{name}.json"
    options = ["world_size=1", "nproc=1", f"gpu={settings['gpu']}", f"out={planned}"]
    subprocess.run([*command, "plan", "prior_vit.yaml", *options, *run], check=True)
    subprocess.run([*command, "train", "prior_vit.yaml", *run, f"callbacks.plan_monitor.plan={planned}"], check=True)
    lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]

    def median(metric: str) -> float:
        found = [line[metric] for line in lines[len(lines) // 2 :] if metric in line]
        return statistics.median(found) if found else float("nan")

    plan = json.loads(Path(planned).read_text())
    peak = max(line.get("memory/peak_allocated_mem", 0) for line in lines) * 1e9 / 2**30
    memory = sum(plan["memory"].values()) / 2**30
    return median("throughput/samples_per_sec"), median("throughput/device/mfu"), peak, memory


def main() -> None:
    """Print a table."""
    given = OmegaConf.from_dotlist([word for word in sys.argv[1:] if word.split("=")[0] in DEFAULTS])
    settings: Any = OmegaConf.to_container(OmegaConf.merge(DEFAULTS, given))
    settings["keys"] = [word for word in sys.argv[1:] if word.split("=")[0] not in DEFAULTS]
    if settings["gpu"] not in GPUS:
        raise SystemExit(f"gpu={settings['gpu']}: one of {', '.join(GPUS)}.")
    Path(settings["out"]).mkdir(parents=True, exist_ok=True)
    found = {method: measure(method, given, settings) for method, given in METHODS.items()}
    first = next(iter(found.values()))[0]
    rows = [
        (method, f"{speed:.1f}", f"{first / speed:.3f}", f"{utilization:.0%}", f"{peak:.1f}", f"{planned:.1f}")
        for method, (speed, utilization, peak, planned) in found.items()
    ]
    head = ("method", "samples/s", "time / the first's", "MFU", "peak, GiB", "planned, GiB")
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
