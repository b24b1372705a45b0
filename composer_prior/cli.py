"""The installed command, ``composer-prior``: one line per job.

A job's module is imported when the job begins: Composer's import takes seconds, and a misspelt key is answered before.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NamedTuple

from composer_prior import __version__, registry
from composer_prior.data.locks import check_ranks
from composer_prior.data.messages import hidden, one_line, say
from composer_prior.options import Option, options_of, parse_options, show_options
from composer_prior.registry import did_you_mean
from composer_prior.scoring.job import BESIDE_RECIPE
from composer_prior.training.checks import check_recipe
from composer_prior.training.config import load_recipe


class Job(NamedTuple):
    """A job: its summary, usage, the target whose arguments are its options, its entry point, and how many words come
    before the options."""

    summary: str
    usage: str
    options: str
    run: str
    words: int = 1


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
        words=2,
    ),
    "caption": Job(
        "caption images with a trained model",
        "MODEL IMAGE|FOLDER|REMOTE ... [option=value ...]",
        "composer_prior.inference.caption:caption_images",
        "composer_prior.inference.caption:main",
        words=2,
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
        words=2,
    ),
}

RANKED = ("train", "score", "evaluate", "study")  # jobs that many ranks share, or that start such


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job and end the program: ``composer-prior JOB ...``.

    Args:
        arguments: the words of the command line. Default: those of the program.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _show_traceback
    try:
        if words[:1] and words[0] in RANKED and not {"--help", "-h"} & set(words):
            check_ranks()
        _answer(words)
        run = _load(JOBS[words[0]].run)
        signal.signal(signal.SIGINT, _stop)  # again: Composer's import puts its own there, which says nothing
        sys.exit(run(words[1:]))
    except BaseException as error:
        heard_by_composer = isinstance(error, SystemExit) and error.code == 128 + signal.SIGINT  # while it is imported
        if not _stopped and not heard_by_composer:
            raise
        if not _stopped:
            print("\nStopped by Ctrl-C.", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _answer(words: Sequence[str]) -> None:
    """End the program where a command line asks for help, or cannot be meant; nothing is imported for that."""
    if not words or words[0] not in JOBS:
        if words[:1] == ["--version"]:
            say(f"composer-prior {__version__}")
            sys.exit(0)
        asked = words[:1] in (["--help"], ["-h"])
        wrong = [f"{words[0]} is not a job. {did_you_mean(words[0], JOBS)}"] if words and not asked else []
        lines = [f"  {name:8} {job.summary}" for name, job in JOBS.items()]
        text = "\n".join([*wrong, "usage: composer-prior JOB ...; composer-prior JOB --help lists its options", *lines])
        say(text) if asked else print(text, file=sys.stderr)
        sys.exit(0 if asked else 2)
    name, job = words[0], JOBS[words[0]]
    try:
        options = options_of(job.options)
        if name == "evaluate" and not any(word.startswith("code_paths=") for word in words):
            for word in words:
                if word.startswith("benchmark="):
                    theirs = options_of(registry.look_up("benchmark", word.partition("=")[2], "benchmark"))
                    options = {**options, **theirs, **options}
        if {"--help", "-h"} & set(words[1:]):
            say(f"usage: composer-prior {name} {job.usage}\n\n{show_options(options)}")
            sys.exit(0)
        _check(name, words[1:], options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


def _check(name: str, words: Sequence[str], options: dict[str, Option]) -> None:
    usage = f"usage: composer-prior {name} {JOBS[name].usage}; --help lists the options"
    if name == "launch":
        given = [*takewhile(lambda word: "=" in word, words)]
        parse_options(given, options)
        if words[len(given) :][:1] == [] or words[len(given)] not in JOBS:
            sys.exit(usage)
        _answer(words[len(given) :])
    elif name in ("train", "score"):
        own = [word for word in words if word.partition("=")[0] in BESIDE_RECIPE] if name == "score" else []
        if not words:
            sys.exit(usage)
        if name == "score" and "=" in words[0]:
            return  # without a recipe, its keys have dots
        parse_options(own, {**options, "loader": Option("loader", str, "train", "")})
        recipe = load_recipe(words[0], [word for word in words[1:] if word not in own])
        if not recipe.code_paths:  # they may register what is not known here
            check_recipe(recipe)
    elif name != "study" and not any(word.startswith("code_paths=") for word in words):
        rest, chosen = parse_options(words, options)
        enough = len(rest) >= JOBS[name].words and (name == "caption" or len(rest) == JOBS[name].words)
        if not enough or rest[0].startswith("-") or (name == "evaluate" and "benchmark" not in chosen):
            known = f"; benchmarks: {', '.join(sorted(registry.names('benchmark')))}" * (name == "evaluate")
            print(f"{usage}{known}", file=sys.stderr)
            sys.exit(2)


_stopped: list[int] = []  # by which signal


def _stop(number: int, _: object) -> None:
    """Say at once that Ctrl-C has come; processes that this one has made leave it to this one."""
    if os.getpid() != _PROCESS:
        return
    if not _stopped:
        os.write(2, b"\nStopped by Ctrl-C.\n")
    _stopped.append(number)
    raise KeyboardInterrupt


_PROCESS = os.getpid()


def _show_traceback(kind: Any, error: Any, trace: Any) -> None:
    """Python's, without what came from the environment."""
    sys.stderr.write(hidden("".join(traceback.format_exception(kind, error, trace))))


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
