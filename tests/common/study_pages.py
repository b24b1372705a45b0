"""Results of a study that was never run, and what its page says."""

import json
import random
import re
from itertools import product
from pathlib import Path

from composer_prior.studies.study_page import write_report

SEEDS = ["1", "2", "3", "4", "5"]
STEPS = {"40": {}, "10": {}, "20": {}, "80": {}}


def header(**changes) -> dict:
    study = {
        "name": "a study", "recipe": "prior_vit.yaml", "overrides": {}, "recipes": {},
        "axes": {"method": {"ntp": {}, "prior": {}, "noise": {}}, "seed": [1, 2, 3, 4, 5], "steps": STEPS},
        "grids": {
            "methods": {"method": "all", "seed": "all"},
            "compute": {"method": ["ntp", "prior"], "steps": "all", "seed": "all", "scaling": "flops"},
        },
        "baseline": "ntp",
        "figures": {
            "averaged": {"foils/total": "higher", "captions/cider": "higher"},
            "beside": {"validation/loss": "lower", "validation/loss_other": "lower"},
        },
        "curve": "validation/loss",
        "fits": {"validation/loss": "lower"},
    }  # fmt: skip
    return {"study": {**study, **changes}}


METHODS = {"methods": {"method": "all", "seed": "all"}}  # a grid without scaling, and few pictures


def lines_of(study: dict, change=lambda cell, records: records) -> list[dict]:
    """Results of all cells of all grids: prior's loss is lower and its loss of other tokens higher, noise is noise."""
    study, lines, seen = study["study"], [], set()
    axes = {axis: [*map(str, values)] for axis, values in study["axes"].items()}
    base, better = axes["method"][:2]
    for grid in study["grids"].values():
        named = {axis: axes[axis] if chosen == "all" else chosen for axis, chosen in grid.items() if axis in axes}
        for key in product(*(named.get(axis, axes[axis][:1]) for axis in axes)):
            cell = dict(zip(axes, key, strict=True))
            if key in seen:
                continue
            seen.add(key)
            dice = random.Random(str(key))
            luck = random.Random(cell["seed"]).gauss(0, 0.1)
            steps = int(cell["steps"]) if "steps" in cell else 40
            gain = 0.1 if cell["method"] == better else 0.0

            def loss(step, gain=gain, luck=luck, dice=dice):
                return 1 + 4 * step**-0.5 + luck - gain + dice.gauss(0, 0.002)

            batches = [steps // 4, steps // 2, steps]
            curve = {
                "batch": batches,
                "loss": [*map(loss, batches)],
                "loss_other": [loss(step, -gain) for step in batches],
            }
            records = {
                "validation": {name: values[-1] for name, values in curve.items() if name != "batch"},
                "foils": {"total": 0.7 + gain + luck + dice.gauss(0, 0.01)},
                "captions": {"cider": 0.5 + luck + 0.01 * (-1) ** int(cell["seed"]) * (cell["method"] != base)},
                "training": {
                    "steps": steps, "samples": 8 * steps, "unique_samples": 100, "tokens": None,
                    "flops": 1e9 * steps * (1.31 if cell["method"] == better else 1), "seconds": 36.0,
                    "reference_flops": 2e9 * (cell["method"] == better), "scoring_flops": 0,
                },
            }  # fmt: skip
            for benchmark, figures in change(cell, records).items():
                line = {"cell": cell, "benchmark": benchmark, "figures": figures}
                if benchmark == "validation":
                    line["curve"] = curve
                if benchmark == "training":
                    line["versions"] = {"torch": "2.7.0"}
                lines.append(line)
    return lines


def written(folder: Path, study: dict | None = None, lines: list[dict] | None = None, end: str = "") -> Path:
    study = study or header()
    lines = lines_of(study) if lines is None else lines
    file = folder / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (study, *lines)) + end, encoding="utf-8")
    return file


def report(folder: Path, *args, **options) -> tuple[str, str]:
    paths = write_report(written(folder, *args, **options))
    assert all(path.exists() for path in paths)
    return paths[0].read_text(encoding="utf-8"), paths[1].read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Of Markdown: tables of rows of cells."""
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    starts = [number - 1 for number, row in enumerate(rows) if row[0] == "---"]
    return [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]


def row(text: str, table: int, name: str) -> list[str]:
    return next(cells for cells in tables(text)[table] if cells[0].startswith(name))
