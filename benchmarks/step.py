"""Measure the cost of PRIOR and the speed of a step: ``python -m benchmarks.step [1 … 7] [--threads N]``.

The alternatives run in turn in one process, on the same weights, data and batches; a ratio is the median of the ratios
within the turns. Items: 1 PRIOR with stored scores, 2 with a live reference, 3 throughput and 4 memory against Hugging
Face, 5 scoring, 6 utilization of the processor by part, 7 towers and projectors; ``--nanovlm FOLDER``, a checkout of
huggingface/nanoVLM, adds its model to item 7.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
import transformers

from benchmarks import items
from benchmarks.measure import prepare_process


def main() -> None:
    """Print a Markdown table, and write the same with every timing to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", type=int, metavar="1…7", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="default: benchmark.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--repetitions", type=int, default=7, help="turns whose median is taken; default: 7")
    parser.add_argument("--nanovlm", metavar="FOLDER", help="checkout of huggingface/nanoVLM, for item 7")
    arguments = parser.parse_args()
    chosen = set(arguments.items) or set(range(1, 8))
    if not chosen <= set(range(1, 8)):  # `choices` would refuse an empty list
        parser.error(f"the items are 1 to 7, not {arguments.items}")
    if arguments.nanovlm and not Path(arguments.nanovlm, "models/vision_language_model.py").is_file():
        parser.error(f"--nanovlm {arguments.nanovlm} is no checkout of huggingface/nanoVLM")
    prepare_process(arguments.threads)
    machine = {
        "processor": _processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "repetitions": arguments.repetitions,
        "load": os.getloadavg()[0],
    }
    print(f"{machine}\n\n| item | what | measured | goal |\n| --- | --- | --- | --- |", flush=True)
    measurements = {
        (1, 2): lambda: items.prior_over_ntp(arguments.repetitions),
        (3,): lambda: items.over_hugging_face(arguments.repetitions),
        (4,): lambda: items.memory(),
        (5,): lambda: items.scoring(arguments.repetitions),
        (6,): lambda: items.utilization(arguments.repetitions),
        (7,): lambda: items.front_ends(arguments.repetitions, arguments.nanovlm),
    }
    rows = [line for numbers, measure in measurements.items() if chosen & set(numbers) for line in measure()]
    arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
