"""The code of pages: blocks in their order, command lines, and what makes a command small."""

import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from common.recipes import ROOT
from composer_prior.commands import cli
from composer_prior.options import options_of
from composer_prior.registry import look_up
from composer_prior.training.config import TrainConfig

# Before a block, or before a block and of its commands with a word.
COMMENT = re.compile(r"<!-- not run(?: `(?P<word>[^`]+)`)?: (?P<reason>.+) -->")
LISTING = r"command_not_found_handle() { printf '%s\0' " '"$@"; printf "\\n"; }'


@dataclass
class Block:
    """A block of code of a page.

    Args:
        place: page and line.
        language: of the code.
        text: the code.
        reasons: why commands with a word do not run, or of the word None, why the block does not.
    """

    place: str
    language: str
    text: str
    reasons: dict[str | None, str]

    def runs(self, words: list[str] | None = None) -> bool:
        """Return whether the block, or one of its commands, runs."""
        return None not in self.reasons and not self.reasons.keys() & {*(words or ())}


def blocks(page: Path, instead: Mapping[str, str] | None = None) -> Iterator[Block]:
    """Yield the blocks of a page, with other texts in the place of some, which the page must have."""
    reasons: dict[str | None, str] = {}
    code: Block | None = None
    unused = {**(instead or {})}
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{page.relative_to(ROOT)}:{number}"
        if code is not None and line.strip() == "```":
            code.text = textwrap.dedent(code.text)
            for old in [old for old in unused if old in code.text]:
                code.text = code.text.replace(old, unused.pop(old))
            yield code
            code = None
        elif code is not None:
            code.text += f"{line}\n"
        elif said := COMMENT.fullmatch(line.strip()):
            reasons[said["word"]] = said["reason"]
        elif fence := re.fullmatch(r"```(\S*).*", line.strip()):
            code, reasons = Block(place, fence[1], "", reasons), {}
        else:
            assert not (reasons and line.strip()), f"{place}: what does not run?"
    assert code is None
    assert not unused, f"{page} does not have {[*unused]}"


def commands(block: Block) -> list[list[str]]:
    """Return the words of the commands of a block, as bash reads them. It finds no program, so nothing is started."""
    variables = {"PATH": "/nowhere", "NODE": "0", "FIRST": "node0"}
    given = {"env": variables, "capture_output": True, "text": True}
    said = subprocess.run(["/bin/bash", "-c", f"{LISTING}\n{block.text}"], check=False, **given).stdout
    found = [line.rstrip("\0").split("\0") for line in said.splitlines()]
    lines = re.sub(r"\\\n", "", block.text).splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith(("#", "source "))]
    assert not block.runs() or len(found) == len(wanted), f"{block.place}: {found}"
    return found


def commands_in_text(page: Path) -> Iterator[list[str]]:
    """Yield the words of commands in sentences and in a recipe's comments, without those that have a gap."""
    command = r"(?:composer-prior|python|make) "
    quoted = rf"(?<!`)`({command}[^`]+)`(?!`)|^# +({command}.+)"
    text = re.sub(r"\\\n# +", "", page.read_text(encoding="utf-8"))
    for found in re.finditer(quoted, text, re.M):
        if "..." not in found[0]:
            yield shlex.split(found[1] or found[2], comments=True)


def check_program(words: list[str]) -> None:
    """Check that the program of a command in Python is there, as ``python -m benchmarks.step`` and ``tools/x.py``."""
    if words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), words
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), words
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words


def jobs(words: list[str]) -> list[list[str]] | None:
    """Return the jobs of ``composer-prior`` that a command does, None of another command."""
    program, *rest = words
    if program == "composer-prior":
        return [rest]
    if program == "composer":  # its launcher: train.py is that job
        assert (ROOT / "train.py").exists()
        return [["train", *list(dropwhile("train.py".__ne__, rest))[1:]]]
    if program == "make" and (
        lines := re.search(rf"^{rest[0]}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    ):
        return [
            line.split()[1:] for line in lines[1].splitlines() if line.startswith("\t$(BIN)/composer-prior ")
        ] or None
    return None


def run(words: list[str], only_parse: bool = False) -> None:
    """Parse the words of a job, and do it in this process, made small.

    Raises:
        AssertionError: if the job is refused or fails.
    """
    try:
        given = cli._parse(words)
        if words[0] == "launch":
            return run(given[0], only_parse)
        if not only_parse:
            cli.main([*words, *small(words, given)])
    except (SystemExit, ValueError, OSError) as end:
        status = end.code if isinstance(end, SystemExit) else end
        assert not status, f"composer-prior {' '.join(words)}: {status}"


def small(words: list[str], given: tuple[Any, ...]) -> list[str]:
    """Return the options that make a job small."""
    match words[0]:
        case "train" | "score" if isinstance(given[0], TrainConfig):
            return [*small_recipe(given[0])]
        case "convert":
            return ["processes=1", "progress=false"]
        case "study":
            assert "report=only" in words or "plan=true" in words, "a page runs no whole study, which takes hours"
            return []
        case "advise":
            return ["steps=2", "samples=4"]
        case "evaluate":
            options = options_of(look_up("benchmark", given[2]["benchmark"], "benchmark"))
            return ["limit=4", *(["samples=12"] if "samples" in options else [])]
    return []


def small_recipe(recipe: TrainConfig, where: str = "") -> Iterator[str]:
    """Yield overrides that make a recipe small, with those of reference and viewer, which are ``where``."""
    sizes: dict[str, Any] = {"max_duration": "2ba", "save_interval": "2ba", "global_train_batch_size": 8}
    sizes |= {"device_eval_batch_size": 8, "progress_bar": "false", "sample_captions": 2}
    sizes |= {f"{key}.num_workers": 0 for key in recipe.loaders}
    sizes |= {f"{key}.persistent_workers": "false" for key in recipe.loaders}
    for key, entry in recipe.benchmarks.items():
        sizes |= {f"benchmarks.{key}.samples": 12} if "samples" in entry else {f"benchmarks.{key}.limit": 4}
    if recipe.data is not None and not where:
        sizes |= {"data.train_samples": 64, "data.validation_samples": 16, "data.canvas": 48}
    if recipe.tokenizer.get("train") and not where:
        sizes["tokenizer.train.vocab_size"] = 400
    tower = (recipe.model.get("vision") or {}).get("name")
    sizes |= {"open_clip": {"model.vision.image_size": 24}, "patches": {"model.vision.max_side": 48}}.get(tower, {})
    if (recipe.model.get("language") or {}).get("config"):
        sizes |= {"model.language.config.hidden_size": 32, "model.language.config.num_hidden_layers": 1}
    yield from (f"{where}{key}={value}" for key, value in sizes.items())
    if not where:
        for key, helper in recipe.helpers.items():
            yield from small_recipe(helper, f"{key}.")
