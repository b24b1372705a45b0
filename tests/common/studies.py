"""Small studies: a YAML on a shipped recipe made small, and a program that trains nothing, in place of a run."""

from pathlib import Path

from omegaconf import OmegaConf

from common.recipes import ROOT, SHRUNKEN, VIT

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

words = dict(word.split("=", 1) for word in sys.argv[2:])
kind = "prepare" if __name__ == "fake_prepare" or "fake_prepare" in sys.argv[0] else "train"
here = Path("calls.txt")
def say(what):
    with here.open("a") as file:
        file.write(f"{what} {words['run_name'] if kind == 'train' else 'prepare'} {os.environ['OMP_NUM_THREADS']}\\n")
say("begin")
if words.get("optimizer.lr") == "fast":
    print("Traceback of something", "error: optimizer.lr='fast': expected float.", sep="\\n", flush=True)
    sys.exit("something else at the end")
if kind == "train":
    if Path("slow").exists():
        def saved(*_):
            say("saved")
            sys.exit(143)
        signal.signal(signal.SIGTERM, saved)
    folder = Path(words["run_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for batch in range(1, 5):
            record = {"batch": batch, "time/sample": 8 * batch, "metrics/eval/loss": 2.0 / batch + int(words["seed"])}
            file.write(json.dumps(record) + "\\n")
            file.flush()
            while batch == 2 and Path("slow").exists():
                time.sleep(0.05)
say("end")
"""


def study_content(**changes):
    """Return the YAML content of a study of ntp, prior and floor with two seeds."""
    content = {
        "name": "tiny",
        "recipe": str(ROOT / "yamls/prior_vit.yaml"),
        "overrides": OmegaConf.to_container(OmegaConf.from_dotlist([*SHRUNKEN, *VIT])),
        "axes": {
            "method": {
                "ntp": {"algorithms.prior": None, "train_loader.dataset.scores": None},
                "prior": {},
                "floor": {"algorithms": {"prior": {"floor": 0.1}}},
            },
            "steps": {4: {}, 2: {"max_duration": "2ba"}},
            "seed": [1, 2],
        },
        "grids": {
            "methods": {"method": "all", "seed": "all"},
            "compute": {"method": ["ntp", "prior"], "steps": "all", "seed": 1, "scaling": "samples"},
        },
        "baseline": "ntp",
        "figures": {"averaged": {"validation/loss": "lower"}, "beside": {"scene_foils/total": "higher"}},
        "curve": "validation/loss",
        "fits": {"validation/loss": "lower"},
    }
    return {**content, **changes}


def write_study(file, **changes):
    """Write a study, and return its path as text."""
    file = Path(file)
    OmegaConf.save(OmegaConf.create(study_content(**changes)), file)
    return str(file)
