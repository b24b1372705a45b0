"""Lines and rows of text files, with any line ends, UTF-16 with a byte order mark, and unclosed quotes."""

import codecs
import csv
import io
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from composer_prior.data.files import open_plain

LINE_LIMIT = 16 << 20
_RECORD_LIMIT = 1 << 20  # characters of one row of several lines
_DIALECT_ROWS = 1000
_MARK = "composer_prior.mark"
_PLAIN, _NEEDED, _STRAY = "", "needed quotes", "stray quotes"
_FILE_NAME = re.compile(r".*\.\w{2,5}", re.DOTALL)

Row = tuple[int, list[str] | None, str]
"""Number of its first line, cells (``None`` for a line that is too long), and the use of quotes."""

codecs.register_error(_MARK, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def encoding_of(path: Path) -> str:
    """Return the encoding of a text file by its byte order mark; UTF-8 without one."""
    with open_plain(path) as file:
        head = file.read(4)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a text file in its encoding; invalid bytes become surrogates, which are rejected later."""
    encoding = encoding_of(path)
    return open(path, encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else _MARK)


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield numbered lines, as UTF-8 where they are text; None stands for one that is too long."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        encoding = encoding_of(path)
        if encoding != "utf-8-sig":
            text = io.TextIOWrapper(file, encoding, _MARK, newline="")
            readline = lambda limit: text.readline(limit).encode("utf-8", "surrogatepass")  # noqa: E731
        elif b"\n" not in head and b"\r" in head[:-1]:
            text = io.TextIOWrapper(file, "latin-1")  # which keeps all bytes but line ends: each becomes \n
            readline = lambda limit: text.readline(limit).encode("latin-1")  # noqa: E731
        else:
            readline = file.readline
        number = 0
        while line := readline(LINE_LIMIT):
            number += 1
            is_cut = len(line) >= LINE_LIMIT and not line.endswith(b"\n")
            while is_cut and (rest := readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                pass
            yield number, None if is_cut else line


def rows(path: Path, delimiter: str, columns: int, image: int) -> Iterator[Row]:
    """Yield the rows of a table below its header, each with the number of its first line.

    Only well-formed quotes are interpreted: the closing quote ends its cell, and a row of several lines has as many
    cells as the header while its single lines are not rows. Other quotes are part of the text. A table with tabs
    is read without quoting if its first rows have stray quotes and no needed ones. ``columns`` is the number of cells
    of the header, and ``image`` the index of the image's cell.
    """
    table = _Table(delimiter, columns, image)
    if delimiter == "\t":
        kinds = {kind for _, _, kind in islice(table.rows(_body(path)), _DIALECT_ROWS)}
        table.quoted = not (_STRAY in kinds and _NEEDED not in kinds)
    yield from table.rows(_body(path))


def header_of(path: Path, delimiter: str) -> list[str]:
    """Return the cells of a table's first line."""
    first = next((line for _, line in lines(path)), None)
    return _cells((first or b"").decode("utf-8", "surrogateescape"), delimiter)


def _body(path: Path) -> Iterator[tuple[int, str | None]]:
    numbered = ((n, None if line is None else line.decode("utf-8", "surrogateescape")) for n, line in lines(path))
    return islice(numbered, 1, None)


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of a line with well-formed quotes, or those between its delimiters."""
    return _well_formed([line], delimiter) or line.rstrip("\r\n").split(delimiter)


def _well_formed(pieces: Iterable[str], delimiter: str) -> list[str] | None:
    """Return the cells of one row, or None if its quotes are not well formed."""
    try:
        return next(csv.reader(pieces, delimiter=delimiter, strict=True), None)
    except csv.Error:
        return None


class _Table:
    """Rows of a table, read one after the other."""

    def __init__(self, delimiter: str, columns: int, image: int):
        self.delimiter, self.columns, self.image = delimiter, columns, image
        self.quoted = True
        other = f'[^{delimiter}"\\r\\n]'
        self.stray = re.compile(f'{other}"{other}')

    def rows(self, numbered: Iterator[tuple[int, str | None]]) -> Iterator[Row]:
        """Yield the rows, with at most one of bounded size in memory."""
        csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
        ahead: deque[tuple[int, str | None]] = deque()
        while following := ahead.popleft() if ahead else next(numbered, None):
            number, line = following
            if line is None:
                yield number, None, _PLAIN
            elif not line.strip("\r\n"):
                continue
            elif '"' not in line or not self.quoted:
                yield number, line.rstrip("\r\n").split(self.delimiter), _PLAIN
            elif cells := _well_formed([line], self.delimiter):
                yield number, cells, self._kind(line, cells)
            else:
                yield number, *self._several_lines(line, ahead, numbered)

    def _kind(self, line: str, cells: list[str]) -> str:
        """Return the use of quotes in a line of well-formed cells; only tables with tabs need it."""
        if self.delimiter != "\t":
            return _PLAIN
        needed = any('"' in cell or self.delimiter in cell for cell in cells)
        return _STRAY if self.stray.search(line) else _NEEDED if needed else _PLAIN

    def _several_lines(
        self, line: str, ahead: deque[tuple[int, str | None]], numbered: Iterator[tuple[int, str | None]]
    ) -> tuple[list[str], str]:
        """Return the cells of a row: several lines if these close its quotes, or else one with quotes as text."""
        taken: list[str] = [line]

        def more() -> Iterator[str]:
            yield line
            size = len(line)
            while True:
                if len(taken) > len(ahead):
                    ahead.extend(islice(numbered, 1))
                following = ahead[len(taken) - 1][1] if len(taken) <= len(ahead) else None
                # A whole row within a cell means that the quote before it is unclosed.
                stands_alone = len(taken) > 1 and self._is_row(taken[-1], line)
                if following is None or stands_alone or size + len(following) > _RECORD_LIMIT:
                    return
                taken.append(following)
                size += len(following)
                yield following

        cells = _well_formed(more(), self.delimiter)
        separate = self._is_row(line, line) and self._is_row(taken[-1], line)
        if cells is None or len(cells) != self.columns or separate:
            return line.rstrip("\r\n").split(self.delimiter), _STRAY
        for _ in taken[1:]:
            ahead.popleft()
        return cells, _NEEDED

    def _is_row(self, line: str, first: str) -> bool:
        """Return whether a line looks like a whole row if its quotes are taken as text."""
        cells = line.rstrip("\r\n").split(self.delimiter)
        tabs = self.delimiter == "\t"  # which are rare in text
        if len(cells) < self.columns or (tabs and len(cells) > self.columns):
            return False
        image, other = self._image_cell(cells), self._image_cell(first.rstrip("\r\n").split(self.delimiter))
        if _FILE_NAME.fullmatch(image):
            return True
        if re.search(r"\s", image):  # probably text
            return False
        same_shape = re.sub(r"\d+", "0", image) == re.sub(r"\d+", "0", other)
        numbered = same_shape and re.search(r"\d", image) is not None
        folder = os.path.dirname(image)
        return tabs or numbered or (folder != "" and folder == os.path.dirname(other))

    def _image_cell(self, cells: list[str]) -> str:
        """Return the cell of the image, counted from the nearer end: a caption may have delimiters."""
        index = self.image if 2 * self.image < self.columns else self.image - self.columns
        return cells[index].strip('"') if -len(cells) <= index < len(cells) else ""
