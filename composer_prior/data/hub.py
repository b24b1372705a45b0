"""Find and load models and tokenizers in Hugging Face format, without running code that comes with them."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import constants, model_info
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError

from composer_prior.data.messages import DataError, one_line

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Modules of transformers that warn about choices which the user cannot change.
SAYS = ("models.auto.image_processing_auto", "processing_utils", "dynamic_module_utils", "image_utils")
UNSAID = re.compile("`use_fast` is unset|not a valid Python identifier|channel dimension is ambiguous")
SECONDS = 5.0  # timeout of a hub's answer


class ModelFolderError(DataError):
    """A folder or hub id that holds no model that can be read."""


def find_model(path: str | Path, also: str | None = None) -> str | Path:
    """Return the folder that a path names, or else the hub id, for ``from_pretrained``.

    The hub is asked once whether it has the model; transformers would ask for many files, five times each. It is not
    asked for models in one of transformers' caches or in the folder ``also``.

    Raises:
        ModelFolderError: one line, if there is no such folder, or no such model of a hub that can be reached.
    """
    folder, name = Path(path).expanduser(), str(path)
    if folder.exists():
        return folder
    first = name.partition("/")[0] if "/" in name else ""
    missing = ModelFolderError(f"{name!r} does not exist: expected a folder, or a hub id such as organisation/model.")
    if not HUB_ID.fullmatch(name) or first == "runs":
        raise missing
    if any(Path(cache, f"models--{name.replace('/', '--')}").exists() for cache in filter(None, (*_caches(), also))):
        return name
    try:
        _ask_hub(name)
    except ModelFolderError as error:
        raise (missing if first and Path(first).exists() else error) from error.__cause__
    return name


def _caches() -> Iterator[str | None]:
    """Yield the folders in which transformers keeps downloads."""
    yield constants.HF_HUB_CACHE
    yield from map(os.environ.get, ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"))


@cache
def _ask_hub(name: str) -> None:
    try:
        model_info(name, timeout=SECONDS)
    except Exception as error:  # of any HTTP library
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # a mirror that serves only files
        raise ModelFolderError(
            f"{name!r} is neither a folder, nor a model of a hub that can be reached ({type(error).__name__})."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of transformers that the user cannot act on."""

    def changeable(record: logging.LogRecord) -> bool:
        return not UNSAID.search(record.getMessage())

    loggers = [logging.getLogger(f"transformers.{name}") for name in SAYS]
    for logger in loggers:
        logger.addFilter(changeable)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(changeable)


def load_pretrained(auto: Any, path: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """Run ``auto.from_pretrained`` on a folder or hub id; code that comes with it runs only if the user allows it.

    transformers would ask at the terminal and run it if the user presses one key.

    Args:
        auto: an ``Auto`` class of transformers, or another class with ``from_pretrained``.
        path: the folder or hub id.
        trust_remote_code: run code that comes with the model. Default: ``False``.
        options: further ones of ``from_pretrained``.

    Raises:
        ModelFolderError: one line, if there is no such folder or model, or if it needs code that is not allowed to run.
    """
    found = find_model(path, options.get("cache_dir"))
    try:
        with quiet():
            return auto.from_pretrained(found, trust_remote_code=bool(trust_remote_code), **options)
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise ModelFolderError(
            f"{str(path)!r} comes with Python code of its own, which is not run unless you say trust_remote_code=true."
        ) from error
    except Exception as error:
        damaged = type(error) is Exception or isinstance(error, SafetensorError | UnpicklingError | EOFError)
        if not damaged and "PytorchStreamReader" not in str(error):  # tokenizers raises Exception itself
            raise
        raise ModelFolderError(
            f"{str(path)!r} cannot be read: a file in it is damaged or cut ({one_line(error)})."
        ) from error
