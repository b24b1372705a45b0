"""The installed command, ``composer-prior``: parse a command line, then import its job's module and run it.

Importing Composer takes seconds, so help and errors in the command line come before that import.
"""

import os
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import takewhile
from typing import Any, cast

from omegaconf import OmegaConf

from composer_prior import __version__, registry
from composer_prior.commands.ranks import set_ranks
from composer_prior.data.messages import hidden, one_line_exit, say
from composer_prior.options import Option, options_of, parse_options, show_options
from composer_prior.registry import did_you_mean
from composer_prior.scoring.job import BESIDE_RECIPE, ScoreJob
from composer_prior.training.config import TrainConfig, load_recipe
from composer_prior.training.keys import check_keys


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job and end the program: ``composer-prior JOB ...``.

    Args:
        arguments: the words of the command line. Default: those of the program.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _show_traceback
    try:
        if words[:1] and words[0] in JOBS and JOBS[words[0]].ranked and not _asks_for_help(words):
            set_ranks()
        with one_line_exit():
            given = _parse(words)
        job = import_module(f"composer_prior.commands.{words[0]}")
        signal.signal(signal.SIGINT, _stop)  # again: Composer's import installs a handler that prints nothing
        sys.exit(job.run(*given) or 0)
    except BaseException as error:
        heard_by_composer = isinstance(error, SystemExit) and error.code == 128 + signal.SIGINT  # while it is imported
        if not _stopped and not heard_by_composer:
            raise
        if not _stopped:
            print("\nStopped by Ctrl-C.", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _parse(words: Sequence[str], run_code: bool = True) -> tuple[Any, ...]:
    """Return the arguments of a job's ``run``; print help, the version or the usage and end the program where due.

    Args:
        words: the command line.
        run_code: run ``code_paths``, which register components; without it, a command that names some is not checked.
    """
    if words[:1] == ["--version"]:
        say(f"composer-prior {__version__}")
        sys.exit(0)
    if not words or words[0] not in JOBS:
        asked = words[:1] in (["--help"], ["-h"])
        wrong = [f"{words[0]} is not a job. {did_you_mean(words[0], JOBS)}"] if words and not asked else []
        lines = [f"  {name:8} {job.summary}" for name, job in JOBS.items()]
        text = "\n".join([*wrong, "usage: composer-prior JOB ...; composer-prior JOB --help lists its options", *lines])
        say(text) if asked else print(text, file=sys.stderr)
        sys.exit(0 if asked else 2)
    name, job, rest = words[0], JOBS[words[0]], words[1:]
    options = options_of(job.options)
    if name == "evaluate":
        options |= _benchmark_options(rest, options)
    if _asks_for_help(rest):
        say(f"usage: composer-prior {name} {job.usage}\n\n{show_options(options)}")
        sys.exit(0)
    given = job.parse(rest, options, run_code)
    if given is None:
        known = f"; benchmarks: {', '.join(sorted(registry.names('benchmark')))}" * (name == "evaluate")
        print(f"usage: composer-prior {name} {job.usage}; --help lists the options{known}", file=sys.stderr)
        sys.exit(2)
    return given


def _asks_for_help(words: Sequence[str]) -> bool:
    return bool({"--help", "-h"} & set(words))


Options = dict[str, Option]
Parsed = tuple[Any, ...] | None  # the arguments of a job's ``run``; None where the usage is to be shown


def _words_and_options(least: int, most: int | None) -> Callable[[Sequence[str], Options, bool], Parsed]:
    """Return a parser of ``WORD ... [option=value ...]``."""

    def parse(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
        rest, chosen = parse_options(words, options)
        enough = least <= len(rest) <= (most or len(rest)) and not rest[0].startswith("-")
        return (rest, chosen) if enough else None

    return parse


def _parse_launch(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
    given = [*takewhile(lambda word: "=" in word, words)]
    _, chosen = parse_options(given, options)
    job = words[len(given) :]
    if not job or job[0] not in JOBS:
        return None
    _parse(job, run_code=False)
    return job, chosen


def _parse_train(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
    return (_checked_recipe(words, run_code),) if words else None


def _parse_plan(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
    if not words:
        return None
    own = [word for word in words[1:] if word.partition("=")[0] in options]
    _, chosen = parse_options(own, options)
    return _checked_recipe([word for word in words if word not in own], run_code), chosen


def _parse_score(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
    if not words:
        return None
    if "=" in words[0]:
        return None, _job_without_recipe(words, options)
    beside = [word for word in words if word.partition("=")[0] in BESIDE_RECIPE]
    _, chosen = parse_options(beside, {**options, "loader": Option("loader", str, "train", "")})
    if chosen.get("loader", "train") not in ("train", "eval"):
        raise ValueError(f"loader={chosen['loader']!r}: expected train or eval.")
    return _checked_recipe([word for word in words if word not in beside], run_code), chosen


def _job_without_recipe(words: Sequence[str], options: Options) -> dict[str, Any]:
    """Return the fields of a :class:`.ScoreJob`, whose keys may have dots."""
    given = OmegaConf.from_dotlist(list(words))
    for key in map(str, given):
        if key not in options:
            raise ValueError(f"{key} is not a key. {did_you_mean(key, options)}")
    job = OmegaConf.merge(OmegaConf.structured(ScoreJob), given)
    scorer = job.reference or job.viewer
    if OmegaConf.missing_keys(job) or scorer is None or not job.dataset or "name" not in job.tokenizer:
        raise ValueError(
            "Without a recipe, give out=..., reference=... or viewer=..., tokenizer.name=... and dataset.local=..."
        )
    return cast(dict[str, Any], OmegaConf.to_container(job))


def _checked_recipe(words: Sequence[str], run_code: bool) -> TrainConfig:
    recipe = load_recipe(words[0], words[1:])
    for path in recipe.code_paths if run_code else ():
        runpy.run_path(path)
    if run_code or not recipe.code_paths:
        check_keys(recipe)
    return recipe


def _benchmark_options(words: Sequence[str], options: Options) -> Options:
    """Return the options of the benchmark that a command line names, without those of the command."""
    for word in words:
        if word.startswith("code_paths="):
            for path in OmegaConf.from_dotlist([word]).code_paths or ():
                runpy.run_path(path)
    for word in words:
        if word.startswith("benchmark="):
            found = options_of(registry.look_up("benchmark", word.partition("=")[2], "benchmark"))
            return {name: option for name, option in found.items() if name not in options}
    return {}


def _parse_evaluate(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
    parsed = _words_and_options(1, 1)(words, options, run_code)
    if parsed is None or "benchmark" not in parsed[1]:
        return None
    (model,), chosen = parsed
    own = options_of(JOBS["evaluate"].options)
    chosen.pop("code_paths", None)  # run already
    return model, {k: v for k, v in chosen.items() if k not in own}, {k: v for k, v in chosen.items() if k in own}


def _parse_study(words: Sequence[str], options: Options, run_code: bool) -> Parsed:
    keys = [word for word in words if _sets_recipe_key(word, options)]
    rest, chosen = parse_options([word for word in words if word not in keys], options)
    return (rest[0], keys, chosen) if len(rest) == 1 and not rest[0].startswith("-") else None


def _sets_recipe_key(word: str, options: Options) -> bool:
    """Return True if a word sets a key of the recipes, False if an option; raise if neither."""
    match = re.match(r"([\w.\[\]-]+)=", word)
    if not match or match[1] in options:
        return False
    names = [field.name for field in fields(TrainConfig)]
    if match[1].split(".")[0].split("[")[0] not in names:
        hint = did_you_mean(match[1], [*options, *names])
        raise ValueError(f"{match[1]} is neither an option nor a key of a recipe. {hint}")
    return True


@dataclass(frozen=True)
class Job:
    """A job of the command line.

    Args:
        summary: one line.
        usage: the words that follow its name.
        options: the function or class whose arguments are its options, as ``module:name``.
        parse: returns the arguments of ``run`` in the module of the job's name.
        ranked: several ranks may share the job.
    """

    summary: str
    usage: str
    options: str
    parse: Callable[[Sequence[str], Options, bool], Parsed]
    ranked: bool = False


JOBS = {
    "train": Job(
        "train a model from a recipe",
        "RECIPE.yaml [train=DATA validation=DATA] [key=value ...]",
        "composer_prior.training.config:TrainConfig",
        _parse_train,
        ranked=True,
    ),
    "plan": Job(
        "say what a run takes, in memory, time and storage, without its GPUs",
        "RECIPE.yaml [option=value ...] [key=value of the recipe ...]",
        "composer_prior.training.plan:plan",
        _parse_plan,
    ),
    "launch": Job(
        "start a job on many ranks, of this node or of several",
        "[option=value ...] JOB ...",
        "composer_prior.training.launch:launch",
        _parse_launch,
    ),
    "score": Job(
        "store a reference's or a viewer's log-probabilities beside the captions",
        "RECIPE.yaml [loader=train|eval] [option=value ...] [key=value of the recipe ...]",
        "composer_prior.scoring.job:ScoreJob",
        _parse_score,
        ranked=True,
    ),
    "convert": Job(
        "make an MDS data set from image-caption pairs of any usual format",
        "SOURCE OUT [option=value ...]",
        "composer_prior.conversion.options:ConversionOptions",
        _words_and_options(2, 2),
    ),
    "caption": Job(
        "caption images with a trained model",
        "MODEL IMAGE|FOLDER|REMOTE ... [option=value ...]",
        "composer_prior.inference.caption:caption_images",
        _words_and_options(2, None),
    ),
    "inspect": Job(
        "show the contents of a caption data set",
        "DATA [option=value ...]",
        "composer_prior.reports.inspection:inspect_captions",
        _words_and_options(1, 1),
    ),
    "advise": Job(
        "measure what the image explains of the captions, and which weights find it",
        "DATA [option=value ...]",
        "composer_prior.inference.advise:advise",
        _words_and_options(1, 1),
    ),
    "evaluate": Job(
        "run a benchmark of a model",
        "MODEL benchmark=NAME [option=value ...]",
        "composer_prior.inference.evaluate:evaluate",
        _parse_evaluate,
        ranked=True,
    ),
    "study": Job(
        "run a study, many runs of recipes, and compare their results",
        "STUDY.yaml [option=value ...] [key=value of the recipes ...]",
        "composer_prior.studies.job:run_study",
        _parse_study,
        ranked=True,
    ),
    "export": Job(
        "write a trained model as transformers' own LLaVA",
        "MODEL OUT [format=llava] [option=value ...]",
        "composer_prior.inference.export:export_model",
        _words_and_options(2, 2),
    ),
}


_stopped: list[int] = []  # the signals received
_PROCESS = os.getpid()


def _stop(number: int, _: object) -> None:
    """Print at once that Ctrl-C has come; child processes leave that to this one."""
    if os.getpid() != _PROCESS:
        return
    if not _stopped:
        os.write(2, b"\nStopped by Ctrl-C.\n")
    _stopped.append(number)
    raise KeyboardInterrupt


def _show_traceback(kind: Any, error: Any, trace: Any) -> None:
    """Print Python's traceback without values from the environment."""
    sys.stderr.write(hidden("".join(traceback.format_exception(kind, error, trace))))
