"""Self-contained HTML pages: no script, no external files, and all text escaped."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from composer_prior.data.images import ImageError, decode_rgb
from composer_prior.data.messages import visible

Shade = tuple[str, float | None]
"""A piece of a caption and the value that shades it, such as its probability; ``None`` is no shade."""

_THUMBNAIL = 320
_FOCUS = ' tabindex="0"'  # what scrolls needs it for the keyboard
_SCROLLED = (200, 8)  # characters and lines of a caption that may be higher than its box
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; background: #fff; color: #1b1b1b }
mark { --shade: 255 140 0; background: rgb(var(--shade) / var(--w)); color: inherit; border-radius: .15rem }
.control { color: #c22; font-size: .8em }
@media screen and (prefers-color-scheme: dark) {
  :root { background: #161616; color: #f0f0f0 }
  mark { --shade: 168 82 0 }
  .control { color: #f77 }
  /* The plots' white, black and greys. Without an ancestor in the selectors, which copies by `use` do not have. */
  [style*="fill: #ffffff"] { fill: none !important }
  [style*="fill: #000000"] { fill: currentColor !important }
  :is([style*="stroke: #000000"], [style*="stroke: #555555"]) { stroke: currentColor !important }
  [style*="stroke: #dddddd"] { stroke: #8886 !important }
}
mark .control { color: inherit }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
.pictures svg { display: block; width: 100%; min-width: 23rem; max-width: 44rem; height: auto; fill: currentColor }
.pictures text { font-family: system-ui, sans-serif !important }
figure { margin: 0; padding: .75rem; border: 1px solid #8886; border-radius: .5rem; min-width: 0 }
img { max-width: 100%; display: block; margin: 0 auto .5rem }
figcaption { overflow-wrap: anywhere }
figcaption p { margin: .25rem 0; unicode-bidi: isolate; white-space: pre-wrap; max-height: 16rem; overflow: auto }
small { opacity: .8 }
.wide { overflow-x: auto; margin: .75rem 0 }
figure .wide { margin-bottom: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em }
th, td { padding: .2rem .4rem; text-align: right; vertical-align: top; border-bottom: 1px solid #8886 }
th:first-child { text-align: left; font-weight: inherit; min-width: 9rem }
@media print {
  :root { font-size: 11px }
  body { max-width: none; margin: 0 }
  .wide, figcaption p { overflow: visible; max-height: none }
  .pictures { grid-template-columns: 1fr 1fr }
  .pictures svg { min-width: 0 }
  figure, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
  mark { print-color-adjust: exact }
}
"""


def document(title: str, body: str) -> str:
    """Return one self-contained HTML page, which may load nothing and run nothing, from a title in plain text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{plain(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f'<h1 dir="auto">{escape(title)}</h1>\n{body}</main></body></html>\n'
    )


def samples_page(cards: Iterable[str], title: str, text: str = "", above: str = "") -> str:
    """Return a page of the samples of :func:`sample_card`, with plain text and HTML, such as a legend, above them."""
    return document(title, f"{f'<pre>{escape(text)}</pre>' if text else ''}\n{above}{side_by_side(cards, 'samples')}")


def legend(says: str, full: float | None = 1.0) -> str:
    """Return the legend of :func:`sample_card` as HTML: a sentence and the colour scale, ``full`` as in the cards."""
    steps = (
        {0: "0", 1: "the largest of the caption"} if full is None else {w: f"{full * w:g}" for w in (0, 0.25, 0.5, 1)}
    )
    marks = " ".join(f'<mark style="--w:{part:.3f}">&nbsp;{escape(said)}&nbsp;</mark>' for part, said in steps.items())
    return f"<p>{escape(says)}; the pointer shows the value. Scale: {marks}</p>\n"


def sample_card(
    name: str | int,
    image: bytes | Image.Image | Sequence[bytes],
    captions: Sequence[str],
    shades: Sequence[Sequence[Shade]] | None = None,
    labels: Sequence[str] = (),
    full: Sequence[float] = (),
) -> str:
    """Return one sample as a ``figure`` element: thumbnails and captions, escaped.

    Args:
        name: the name of the image's file, or the sample's number.
        image: RGB, or encoded, one or several; an image that cannot be decoded is replaced by the error.
        captions: its captions.
        shades: the pieces of each caption, each with a value; a larger value has a stronger colour.
        labels: text above each caption. Default: none.
        full: value of the strongest colour, for each caption. Default: its largest value.
    """
    shown, sizes = "", list[str]()
    for one in [image] if isinstance(image, bytes | Image.Image) else image:
        try:
            picture = one.copy() if isinstance(one, Image.Image) else decode_rgb(one)
            sizes.append(f"{picture.width} by {picture.height} pixels")
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
            buffer, kind = io.BytesIO(), "png" if max(picture.size) <= 64 else "jpeg"
            picture.save(buffer, kind)
            shown += f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        except ImageError as error:
            shown += f"<p><em>{escape(str(error))}</em></p>"
    size = ", ".join(sizes) or "no image"
    above = [f"<small>{escape(label)}</small>" for label in labels] or [""] * len(captions)
    paragraphs = ""
    for i, text in enumerate(captions):
        high = len(text) > _SCROLLED[0] or text.count("\n") > _SCROLLED[1]
        shown_text = _shaded(shades[i], full[i] if full else None) if shades else escape(text)
        paragraphs += f'{above[i]}<p dir="auto"{_FOCUS if high else ""}>{shown_text}</p>'
    below = f"<small>{escape(name if isinstance(name, str) else f'sample {name:,}')} · {size}</small>"
    return f"<figure>{shown}<figcaption>{paragraphs}{below}</figcaption></figure>\n"


def picture(svg: str, caption: str, description: str = "") -> str:
    """Return an SVG of :mod:`.plots` as a ``figure`` element.

    Above it is the caption, plain text; the description is for readers who do not see it. Default: the caption.
    """
    says = plain(description or caption)
    inner = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{says}" ', 1)
    return f'<figure><figcaption dir="auto">{escape(caption)}</figcaption>\n{_wide(inner, "picture")}</figure>\n'


def side_by_side(figures: Iterable[str], kind: str = "pictures") -> str:
    """Return figures of :func:`picture`, or as ``samples`` those of :func:`sample_card`, side by side."""
    return f'<div class="{kind}">\n{"".join(figures)}</div>\n'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain text, the first cell of each row its name."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row" dir="auto">{escape(name)}</th>{values}</tr>\n'
    return _wide(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>", "table")


def _wide(element: str, kind: str) -> str:
    """Return an element that scrolls sideways, by the keyboard too, where the screen is too narrow for it."""
    return f'<div class="wide" role="group" aria-label="{kind}"{_FOCUS}>{element}</div>\n'


def _shaded(pieces: Sequence[Shade], full: float | None) -> str:
    full = full or max((weight for _, weight in pieces if weight is not None), default=0.0) or 1.0
    return "".join(
        escape(text)
        if weight is None
        else f'<mark style="--w:{min(1.0, max(0.0, weight) / full):.3f}" title="{weight:.3g}">{escape(text)}</mark>'
        for text, weight in pieces
    )


def escape(text: str) -> str:
    """Escape text for HTML and make control characters visible, so that none can reorder or hide its surroundings."""
    shown = ((char, visible(char, keep="\n\t")) for char in text)
    return "".join(html.escape(c) if c == said else f'<span class="control">{said}</span>' for c, said in shown)


def plain(text: str) -> str:
    """Escape text for titles and attributes, which hold no elements."""
    return html.escape(visible(text))
