"""Blocks of a page, plain text, tables and pictures, as HTML and as GitHub's Markdown."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from composer_prior.data.messages import visible
from composer_prior.reports.page import document, escape, picture, side_by_side, table


class Heading(NamedTuple):
    """A heading of level 2 or more; the title is 1."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """A paragraph of plain text."""

    text: str


class Table(NamedTuple):
    """A table of plain text, the first cell of each row its name."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """An SVG of :mod:`composer_prior.reports.plots`, its path beside the Markdown, and a caption in plain text."""

    file: str
    svg: str
    caption: str


Block = Heading | Paragraph | Table | Picture


def html(title: str, blocks: Sequence[Block]) -> str:
    """Return one self-contained page with the pictures in it, neighbours side by side."""
    parts = list[str]()
    for are_pictures, group in groupby(blocks, key=lambda block: isinstance(block, Picture)):
        written = map(_html, group)
        parts.append(side_by_side(written) if are_pictures else "".join(written))
    return document(title, "".join(parts))


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} dir="auto">{escape(text)}</h{level}>\n'
        case Paragraph(text):
            return f"<p>{escape(_kept_together(text))}</p>\n"
        case Table(header, rows):
            return table(header, [[name, *map(_kept_together, cells)] for name, *cells in rows])
        case Picture(_, svg, caption):
            return picture(svg, caption)


def _kept_together(text: str) -> str:
    """Let text break between a number, its interval and words, but not inside one of them."""
    return re.sub(r"(?<=,) (?=[^\[\]]*\])| (?=%|±|min)|(?<=±) ", "\u00a0", text)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the page as Markdown, with the pictures as links to their files."""
    return "\n".join([f"# {_escaped(title)}\n", *map(_markdown, blocks)])


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escaped(text)}\n"
        case Paragraph(text):
            return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", _escaped(text)) + "\n"  # no heading, no list
        case Table(header, rows):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            escaped = ([_escaped(cell) if row is not lines[1] else cell for cell in row] for row in lines)
            return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
        case Picture(file, _, caption):
            return f"![{_escaped(caption, inside_brackets=True)}]({file})\n"


def _escaped(text: str, inside_brackets: bool = False) -> str:
    """Escape text so that none of it is Markdown or HTML, with few backslashes."""
    text = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*|~$]", r"\\\g<0>", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no emphasis
    if inside_brackets:
        return re.sub(r"[\[\]]", r"\\\g<0>", text)
    return re.sub(r"\](?=[(\[:])", r"\\]", text)  # so ends the text of a link, but no interval
