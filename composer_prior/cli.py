"""The installed command, ``composer-prior``: one line per job.

A job's module is imported when the job begins: Composer's import takes seconds, and a misspelt key is answered before.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import dropwhile
from typing import Any, NamedTuple

from composer_prior.data.locks import check_ranks
from composer_prior.data.messages import one_line
from composer_prior.options import options_of, show_options


class Job(NamedTuple):
    """What a job does, what its command line looks like, whose arguments are its options, and what runs it."""

    summary: str
    usage: str
    options: str
    run: str


JOBS = {
    "train": Job(
        "train a model from a recipe",
        "RECIPE.yaml [train=DATA validation=DATA] [key=value ...]",
        "composer_prior.training.config:TrainConfig",
        "composer_prior.training.run:main",
    ),
    "launch": Job(
        "start a job on many ranks, of this node or of several",
        "[option=value ...] JOB ...",
        "composer_prior.training.launch:launch",
        "composer_prior.training.launch:main",
    ),
    "score": Job(
        "store the reference's log-probabilities beside the captions",
        "RECIPE.yaml [loader=train|eval] [option=value ...] [key=value of the recipe ...]",
        "composer_prior.scoring.job:ScoreJob",
        "composer_prior.training.score:main",
    ),
    "convert": Job(
        "make an MDS data set from image-caption pairs of any usual form",
        "SOURCE OUT [option=value ...]",
        "composer_prior.conversion.options:ConversionOptions",
        "composer_prior.conversion.convert:main",
    ),
    "caption": Job(
        "caption images with a trained model",
        "MODEL IMAGE|FOLDER|REMOTE ... [option=value ...]",
        "composer_prior.inference.caption:caption_images",
        "composer_prior.inference.caption:main",
    ),
    "inspect": Job(
        "show what is in a caption data set",
        "DATA [option=value ...]",
        "composer_prior.reports.inspection:inspect_captions",
        "composer_prior.reports.inspection:main",
    ),
    "evaluate": Job(
        "say in figures what a model sees in images",
        "MODEL benchmark=NAME [option=value ...]",
        "composer_prior.inference.evaluate:evaluate",
        "composer_prior.inference.evaluate:main",
    ),
    "study": Job(
        "run a study, many runs of recipes, and compare what they give",
        "STUDY.yaml [option=value ...] [key=value of the recipes ...]",
        "composer_prior.studies.job:run_study",
        "composer_prior.studies.job:main",
    ),
    "export": Job(
        "write a trained model as transformers' own LLaVA",
        "MODEL OUT [format=llava] [option=value ...]",
        "composer_prior.inference.export:export_model",
        "composer_prior.inference.export:main",
    ),
}

RANKED = ("train", "score", "evaluate", "study")  # jobs that many ranks share, or that start such


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job and end the program: ``composer-prior JOB ...``.

    Args:
        arguments: the words of the command line. Default: those of the program.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in JOBS:
        asked = words[:1] in (["--help"], ["-h"])
        lines = [f"  {name:8} {job.summary}" for name, job in JOBS.items()]
        text = "\n".join(["usage: composer-prior JOB ...; composer-prior JOB --help lists its options", *lines])
        print(text, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name, job = words[0], JOBS[words[0]]
    if {"--help", "-h"} & set(words[1:]):
        options = options_of(_load(job.options))
        if name == "evaluate":
            from composer_prior.inference.evaluate import benchmark_options  # here: other jobs do without it

            options |= benchmark_options(words)
        print(f"usage: composer-prior {name} {job.usage}\n\n{show_options(options)}")
        sys.exit(0)
    started = [*dropwhile(lambda word: "=" in word, words[1:])] if name == "launch" else words
    if not started or started[0] not in JOBS:
        sys.exit(f"usage: composer-prior launch {job.usage}")
    if name in RANKED:
        check_ranks()
    if started[0] == "train" and started[1:]:
        _check_recipe(started[1:])
    sys.exit(_load(job.run)(words[1:]))


def _check_recipe(words: Sequence[str]) -> None:
    """Answer a key that no recipe has without Composer."""
    from composer_prior.training.config import load_recipe  # here: other jobs do without it

    try:
        load_recipe(words[0], words[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
