"""Errors at the start of a run, as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import metadata

from composer_prior.data.messages import OneLineError, one_line
from composer_prior.data.storage import StorageError


class StartError(ValueError):
    """A library's error at the start of a run, as one line."""


@contextmanager
def one_line_errors(where: str = "") -> Iterator[None]:
    """Let what the libraries below raise at a run's start be one line that says where it comes from."""
    try:
        yield
    except StorageError as error:
        raise StartError(f"{where}: {error}".removeprefix(": ")) from error
    except OneLineError:
        raise
    except (ValueError, OSError, RuntimeError, ImportError, TypeError, LookupError, ArithmeticError) as error:
        if not where and isinstance(error, ValueError | TypeError | LookupError):
            raise  # a line of ours, or a fault of ours, which needs its traceback
        kind = f"{type(error).__name__}: " if isinstance(error, RuntimeError | LookupError) else ""
        said = kind + one_line(error)
        missing = error.__cause__ or error
        if isinstance(missing, ModuleNotFoundError) and missing.name:  # Composer's advice is its own extras
            package, extras = missing.name.partition(".")[0], metadata("composer-prior").get_all("Provides-Extra") or ()
            how = f"-e '.[{package}]'" if package in extras else package
            said = f"the package {package} is missing: pip install -c constraints.txt {how}"
        raise StartError(f"{where}: {said}".removeprefix(": ")) from error
