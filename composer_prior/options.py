"""Options of a command, ``key=value``: the arguments of a function or of a class, with the words of its docstring."""

import inspect
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from composer_prior import signatures
from composer_prior.registry import check_value, did_you_mean, parameters_of


class Option(NamedTuple):
    """One of a command's options."""

    name: str
    annotation: Any
    default: str  # as typed; empty if the option is required
    sentence: str


def options_of(target: Any) -> dict[str, Option]:
    """Return a function's keyword options, a dataclass's fields or a class's arguments, with their documentation.

    ``module:name`` is read from source, without its import; the documentation is the first sentence on each.
    """
    if isinstance(target, str):
        target = signatures.stub(target)
    arguments, made = parameters_of(target), dict[str, Any]()
    if not isinstance(target, type):
        arguments = {name: one for name, one in arguments.items() if one.kind is one.KEYWORD_ONLY}
    elif is_dataclass(target):
        made = {f.name: f.default_factory() for f in fields(target) if f.default_factory is not MISSING}
    sentences = _sentences(target)
    return {
        name: Option(name, one.annotation, _typed_form(made.get(name, one.default)), sentences.get(name, ""))
        for name, one in arguments.items()
    }


def parse_options(words: Sequence[str], options: dict[str, Option]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into words without ``=`` and the values of its options.

    A text option keeps its value as written, so a folder may be named 2017.

    Raises:
        ValueError: for an unknown option, naming the nearest, and for a value of another type.
    """
    given = [word for word in words if re.match(r"[\w.]+=", word)]
    values: dict[str, Any] = {}
    for word in given:
        name, _, text = word.partition("=")
        if name not in options:
            raise ValueError(f"{name} is not an option. {did_you_mean(name, options)}")
        values[name] = _value(word, text, options[name].annotation)
        check_value(name, values[name], options[name].annotation)
    return [word for word in words if word not in given], values


def show_options(options: dict[str, Option]) -> str:
    """Return one line for each option, with its default."""
    width = max(len(option.name) for option in options.values())
    return "\n".join(
        f"  {option.name:{width}}  {option.sentence}{f' [{option.default}]' * bool(option.default)}"
        for option in options.values()
    )


def _value(word: str, text: str, annotation: Any) -> Any:
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if text == "null":
        return None
    if set(kinds) <= {str, Path, type(None)} and text:
        return text
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=True)
        value = read[word.partition("=")[0]]
    except Exception:
        value = text
    return "" if value is None else value


def _typed_form(default: Any) -> str:
    """Return a default as a user would type it."""
    if default is inspect.Parameter.empty or default == "???":
        return ""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def _sentences(target: Any) -> dict[str, str]:
    """Return the first sentence on each argument, from the docstring and those of base classes."""
    sentences: dict[str, str] = {}
    for owner in reversed(target.__mro__[:-1]) if isinstance(target, type) else (target,):
        text = inspect.cleandoc(vars(owner).get("__doc__") or "" if isinstance(owner, type) else owner.__doc__ or "")
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, flags=re.S | re.M)
        for entry in re.findall(r"^ {4}(\S.*?)(?=^ {4}\S|\Z)", section[1] if section else "", flags=re.S | re.M):
            names, _, words = entry.partition(":")
            line = " ".join(re.sub(r":\w+:`[.~]?([^`]*)`|``", r"\1", words).split())
            sentence = re.split(r"(?<=[.])\s+(?=[A-Z\"])|(?<=[a-z)])[.;]?\s+Default:", line)[0].rstrip(".")
            sentences.update((name.strip(), sentence) for name in names.split(","))
    return sentences
