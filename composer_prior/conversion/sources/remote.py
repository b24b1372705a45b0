"""Archives in a bucket as a source; each is a unit of work, stored on disk only while a process reads it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from composer_prior.conversion.sources.base import BadFile, Record, Rejected, Source, SourceError, SourceOptions
from composer_prior.conversion.sources.files import describe, file_unit, parquet_problem, tar_problem
from composer_prior.conversion.sources.recognition import archives_of, open_local
from composer_prior.data.messages import DataError
from composer_prior.data.remote import Remote
from composer_prior.data.storage import StorageError
from composer_prior.data.stores import is_denied, is_final, told


class _NotThereError(Exception):
    """A file of a remote that no longer exists or cannot be downloaded for good."""


@dataclass(frozen=True, kw_only=True)
class RemoteSource(Source):
    """Tar shards or Parquet files in a bucket, read as :class:`.TarSource` and :class:`.ParquetSource` read them."""

    remote: str  # the folder's URL
    files: tuple[str, ...]
    known_bad: tuple[BadFile, ...] = ()  # before the first readable file; others are found when they are downloaded

    @classmethod
    def open(cls, remote: str, options: SourceOptions) -> "RemoteSource":
        """List the archives below a URL, or open the one that it names; it must hold archives of one kind."""
        folder, _, last = remote.rstrip("/").rpartition("/")
        found = archives_of([Path(last)])
        if not found:
            folder = remote.rstrip("/")
            try:
                found = archives_of(map(Path, Remote(folder).names()))
            except NotImplementedError:
                raise SourceError(f"{remote}: a remote of this kind cannot be listed; name one of its files.") from None
            except (StorageError, FileNotFoundError) as error:
                why = told(error.__cause__ or error, remote, 200)
                raise SourceError(f"{remote} cannot be listed: {why}.") from error
        if options.form is not None:
            found = {format: files for format, files in found.items() if format == options.form}
        if len(found) != 1:
            both = f"it holds {' and '.join(found)}, choose with form=" if found else "no .tar or .parquet found here"
            raise SourceError(f"{remote}: {both}. Of a remote, these two are read; copy other formats to a disk first.")
        ((format, files),) = found.items()
        nowhere = Path(os.devnull)
        images = nowhere
        asked = options.images_folder()  # of Parquet files without their bytes
        if asked is not None:
            images, options = asked, replace(options, images=str(asked))
        names = tuple(file.as_posix() for file in files)
        source = cls(remote=folder, files=names, options=options, format=format, images=images, folder=nowhere)
        bad: list[BadFile] = []
        for name in names:
            try:
                with source._downloaded(name) as file:
                    fault = source._problem(name, file)
                    if fault is None:
                        return replace(source, has_spans=open_local(file, options).has_spans, known_bad=tuple(bad))
                    bad.append(fault)
            except _NotThereError as error:
                bad.append(BadFile.of(name, str(error)))
        raise SourceError(f"{remote}: none of its {len(files)} files can be read: {describe(bad)}.")

    def bad_files(self) -> Iterator[BadFile]:
        return iter(self.known_bad)

    def _problem(self, name: str, file: Path) -> BadFile | None:
        """Return a bad file if a downloaded file cannot be read at all, or None."""
        is_table = self.format == "parquet"
        problem_of, reason = (parquet_problem, "unreadable file") if is_table else (tar_problem, "broken archive")
        unit = file_unit(file.parent, file, problem_of, reason)
        return replace(unit, key=name, where=name) if isinstance(unit, BadFile) else None

    def units(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, unit: str) -> Iterator[Record | Rejected]:
        above = unit.removesuffix(PurePosixPath(unit).name)
        try:
            with self._downloaded(unit) as file:
                if problem := self._problem(unit, file):
                    yield problem
                    return
                try:
                    source = open_local(file, self.options)
                except SourceError as error:
                    yield BadFile.of(unit, str(error).replace(str(file), unit).replace(str(file.parent), unit))
                    return
                for part in source.units():
                    yield from (replace(item, where=above + item.where) for item in source.read(part))
        except _NotThereError as error:
            yield BadFile.of(unit, str(error))

    @contextmanager
    def _downloaded(self, name: str) -> Iterator[Path]:
        """Download a file to a temporary folder."""
        remote = f"{self.remote}/{name}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, PurePosixPath(name).name)
            try:
                Remote(self.remote).get(name, file, seconds=self.options.download_timeout)
            except DataError as error:
                if is_final(error.__cause__) and not is_denied(error):
                    raise _NotThereError(f"{remote} cannot be read: {error}") from error
                hint = "" if is_denied(error) else "; run the same command again to go on"
                raise SourceError(f"{remote} cannot be read: {error}{hint}.") from error
            yield file
