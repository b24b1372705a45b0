"""Find and load models and tokenizers in Hugging Face format, without running code that comes with them; upload."""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, model_info
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from composer_prior.data.messages import DataError, one_line, say
from composer_prior.data.storage import is_remote
from composer_prior.data.stores import is_denied

# Files that a push deletes if the folder lacks them: readers would take them for its own.
REPLACED = {
    "model": re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
    "dataset": re.compile(r"shard\.[^/]+\.mds(\.\w+)?"),
}
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


def check_push(name: str | None, kind: str, out: str | Path = "", mark: str = "") -> None:
    """Raise ValueError if nothing can be pushed to a repository; make it, private, if it does not exist.

    Args:
        name: ``USER/NAME``; nothing is done for None.
        kind: ``model`` or ``dataset``.
        out: what will be pushed, which must be a folder.
        mark: a file that data sets of this kind have; a repository with the index of another kind is refused.
    """
    if name is None:
        return
    if is_remote(out):
        raise ValueError(f"push_to_hub={name}: a folder is pushed, and {out} is a remote.")
    try:
        HfApi().create_repo(name, repo_type=kind, private=True, exist_ok=True)
        files = HfApi().list_repo_files(name, repo_type=kind) if mark else []
    except Exception as error:  # of any HTTP library
        raise ValueError(f"push_to_hub={name}: {why_not(error)}.") from error
    if "index.json" in files and mark not in files:
        raise ValueError(f"push_to_hub={name}: other data are there (index.json without {mark}); name another one.")


def pushed_file(name: str, file: str) -> bytes | None:
    """Return a file of a data set of the Hub, or None if it is not there."""
    try:
        return Path(HfApi().hf_hub_download(name, file, repo_type="dataset")).read_bytes()
    except Exception as error:  # of any HTTP library
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(f"push_to_hub={name}: {why_not(error)}.") from error


def push(folder: str | Path, name: str | None, kind: str, card: Callable[[Path], str] | None = None) -> None:
    """Upload a folder without its hidden files as one commit, and say so, or why that failed; rank 0 does.

    Weights and shards that the folder lacks are deleted there: readers could take them for its own. A ``README.md``
    there that does not name composer-prior stays.

    Args:
        folder: which is complete, whatever happens here.
        name: ``USER/NAME``; nothing is done for None.
        kind: ``model`` or ``dataset``.
        card: returns the text of ``README.md`` for a folder that lacks one.
    """
    if name is None or int(os.getenv("RANK", "0")):
        return
    place, hub, readme, how = Path(folder).expanduser(), HfApi(), "README.md", ""
    try:
        paths = {file.relative_to(place).as_posix(): file for file in sorted(place.rglob("*")) if file.is_file()}
        files: dict[str, Path | bytes] = {path: file for path, file in paths.items() if not path.startswith(".")}
        if not files:  # a push of nothing would delete weights
            raise FileNotFoundError("the folder is missing or empty")
        options = ["--repo-type", kind, "--exclude", ".*", "--delete", "model*.safetensors*"]
        again = shlex.join(["hf", "upload", name, str(place), *options])
        how = f"; to push it: {again}" if card is None else "; to push it, repeat the command"
        if card is not None:
            files[readme] = card(place).encode()
        there = hub.list_repo_files(name, repo_type=kind)
        if readme in there:
            text = Path(hub.hf_hub_download(name, readme, repo_type=kind)).read_text(errors="replace")
            if text.strip() and "composer-prior" not in text:
                files.pop(readme, None)
        changes: list[Any] = [CommitOperationAdd(*one) for one in files.items()]
        changes += [
            CommitOperationDelete(path) for path in there if REPLACED[kind].fullmatch(path) and path not in files
        ]
        hub.create_commit(name, changes, repo_type=kind, commit_message="Push by composer-prior")
        say(f"{folder} is pushed to {constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}")
    except Exception as error:  # of any HTTP library
        say(f"{folder} was not pushed to {name}: {why_not(error)}{how}")


def why_not(error: Exception) -> str:
    """Return an error of the hub as one line."""
    if is_denied(error):
        return "the hub denies access; log in (hf auth login, or HF_TOKEN) with a token that may use this repository"
    return one_line(error, 300).rstrip(".")
