"""Find and load models and tokenizers in Hugging Face format, without running code that comes with them."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    asked for models in one of transformers' caches or in the folder ``also``. ModelFolderError is raised if there is no
    such folder, and no such model of a hub that can be reached.
    """
    folder, name = Path(path).expanduser(), str(path)
    if folder.exists():
        return folder
    first = name.partition("/")[0] if "/" in name else ""
    missing = ModelFolderError(f"{name!r} does not exist: expected a folder, or a hub id such as organisation/model.")
    if not HUB_ID.fullmatch(name) or first == "runs":
        raise missing
    caches = (constants.HF_HUB_CACHE, os.getenv("TRANSFORMERS_CACHE"), os.getenv("PYTORCH_TRANSFORMERS_CACHE"), also)
    if any(Path(cache, f"models--{name.replace('/', '--')}").exists() for cache in caches if cache):
        return name
    try:
        _ask_hub(name)
    except ModelFolderError as error:
        raise (missing if first and Path(first).exists() else error) from error.__cause__
    return name


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

    with ExitStack() as filters:
        for name in SAYS:
            logger = logging.getLogger(f"transformers.{name}")
            logger.addFilter(changeable)
            filters.callback(logger.removeFilter, changeable)
        yield


def load_pretrained(auto: Any, path: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """Run ``auto.from_pretrained`` on a folder or hub id; code that comes with it runs only if the user allows it.

    transformers would ask at the terminal and run it if the user presses one key. ModelFolderError is raised if there
    is no such folder or model, if it is damaged, or if it needs code that is not allowed to run.
    """
    found = find_model(path, options.get("cache_dir"))
    try:
        with quiet():
            return auto.from_pretrained(found, trust_remote_code=bool(trust_remote_code), **options)
    except Exception as error:
        damaged = type(error) is Exception or isinstance(error, SafetensorError | UnpicklingError | EOFError)
        if isinstance(error, ValueError) and "custom code" in str(error):
            why = "comes with Python code of its own, which is not run unless you say trust_remote_code=true"
        elif damaged or "PytorchStreamReader" in str(error):  # tokenizers raises Exception itself
            why = f"cannot be read: a file in it is damaged or cut ({one_line(error)})"
        else:
            raise
        raise ModelFolderError(f"{str(path)!r} {why}.") from error
