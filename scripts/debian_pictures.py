r"""Make a data set of captioned pictures of Debian packages: ``python scripts/debian_pictures.py OUT``, on Debian.

    OUT/train, OUT/validation    drawings and photographs with their published captions, as ``convert`` writes them
    OUT/foils.jsonl              validation captions with another noun, for the benchmark ``foils``
    OUT/definitions              train and validation of WordNet's definitions and examples, text without pictures
    OUT/README.md, OUT/licences  rules, counts and licences, and the packages' copyright files

``yamls/studies/real_pictures.yaml`` compares methods on them. A language model that has read definitions and none of
the captions, with the tokenizer in FOLDER, for ``model.language.pretrained``:

    composer-prior train reference.yaml run_name=definitions train=OUT/definitions/train \
        validation=OUT/definitions/validation tokenizer.name=FOLDER tokenizer.train=null max_duration=400ba
"""

import html
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from streaming import MDSWriter

from composer_prior.conversion.convert import convert_captions
from composer_prior.data.images import ImageError, decode_rgb, read_image_file
from composer_prior.data.messages import one_line
from composer_prior.data.storage import whole_folder

PACKAGES = {
    "openclipart-png": "public domain",
    "openclipart-svg": "public domain",
    "tuxpaint-stamps-default": "GPL-2 or later",
    "wordnet-base": "WordNet 3.0",
    "wordnet-sense-index": "WordNet 3.0",
}
KINDS = {"05": "animal", "06": "artifact", "08": "body", "13": "food", "15": "place", "17": "object", "18": "person"}
KINDS |= {"20": "plant", "25": "shape"}  # WordNet's files of nouns of things that can be drawn
SAME = {"and", "the", "with", "black", "white"}  # words that do not tell titles apart
README = """\
# Captioned pictures of Debian packages
Titles, descriptions and keywords are as published, but descriptions of more than 200 characters and keywords with
digits are removed. A title of more than 4 pictures is that of a collection, and the file's name stands for it. Pictures
whose title has no word of three letters are dropped. Of pictures that look the same one is kept, and at most 40 of one
title or collection, each reduced to 160 pixels, on white. Titles that differ only in numbers, words of one or two
letters, black or white are on one side of the split; a title of more than 10 pictures is in train.

A foil is a validation caption with another noun. Nouns are keywords and last words of titles in at least 5 training
captions. They have at least three letters, WordNet counts them as nouns at least as often as anything else, and their
first sense is a thing that can be drawn. The other noun is of the same kind (WordNet's lexicographer file), and starts
with a vowel if and only if the first one does; no caption has both, and some caption has it beside each of the other
keywords that at least 5 training captions have. Up to 3 are drawn, as often as they occur.
No person has checked the foils, so some may be true.
"""


class Picture(NamedTuple):
    """A published picture; ``collection`` is its title as published."""

    file: Path
    title: str
    description: str = ""
    keywords: tuple[str, ...] = ()
    collection: str = ""

    @property
    def caption(self) -> str:
        """Return all of its text."""
        parts = dict.fromkeys(part.rstrip(".") for part in (self.title, self.description, ", ".join(self.keywords)))
        return ". ".join(part for part in parts if part) + "."

    @property
    def group(self) -> frozenset[str]:
        """Return the words that tell its title from others."""
        return frozenset(re.findall(r"[^\W\d_]{3,}", self.title.lower())) - SAME

    @property
    def heads(self) -> set[str]:
        """Return the words that may name what it shows."""
        return {word.lower() for word in [*self.keywords, *re.findall(r"\b[^\W\d_]+\b", self.title)[-1:]]}


def open_clip_art(png: Path, svg: Path) -> Iterator[Picture]:
    """Yield the drawings below ``png``, with the text of the SVG files below ``svg``."""

    def texts(tag: str, about: str) -> list[str]:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", about, re.DOTALL)
        return [" ".join(html.unescape(text).split()) for text in found] or [""]

    files = {file: file.read_text(errors="replace").partition("</metadata>")[0] for file in sorted(svg.rglob("*.svg"))}
    uses = Counter(texts("dc:title", about)[0] for about in files.values())
    for file, about in files.items():
        collection, description = texts("dc:title", about)[0], texts("dc:description", about)[0]
        name = re.sub(r"[_-]*\d*$", "", file.stem).replace("_", " ")
        title = collection if collection and uses[collection] <= 4 else name
        if len(description) > 200 or re.search(r"@|http|HASH\(", description):
            description = ""
        words = (word.replace("_", " ") for word in texts("rdf:li", about))
        keywords = tuple(word for word in words if not re.search(r"^(|unsorted|hash)$|\d|hash\(", word))
        yield Picture(png / file.relative_to(svg).with_suffix(".png"), title, description, keywords, collection)


def tux_paint(stamps: Path) -> Iterator[Picture]:
    """Yield the pictures below ``stamps``, with the English line of their text files."""
    for file in sorted(stamps.rglob("*.png")):
        if (about := file.with_suffix(".txt")).exists() and (lines := about.read_text(errors="replace").splitlines()):
            yield Picture(file, lines[0].strip())


def choose(pictures: Sequence[Picture], rng: random.Random) -> Iterator[tuple[Picture, Image.Image]]:
    """Yield pictures and RGB images in random order: those that can be decoded, and none that looks like another."""
    looks, uses = set(), Counter[Any]()
    for picture in rng.sample(pictures, len(pictures)):
        names = {picture.group, picture.collection} - {""}
        if picture.group and max(uses[name] for name in names) < 40:
            try:
                image = decode_rgb(read_image_file(picture.file))
            except ImageError:
                continue
            look = bytes(value >> 4 for value in image.resize((16, 16), Image.Resampling.BOX).tobytes())
            if look not in looks:
                looks.add(look)
                uses.update(names)
                image.thumbnail((160, 160))
                yield picture, image


def split(pictures: Sequence[Picture], rng: random.Random, share: float = 0.2) -> dict[str, list[Picture]]:
    """Return the pictures of ``train`` and ``validation``; those of one group are on one side."""
    sizes = Counter(picture.group for picture in pictures)
    groups = sorted((group for group, size in sizes.items() if size <= 10), key=sorted)
    held: set[frozenset[str]] = set()
    for group in rng.sample(groups, len(groups)):
        if sum(sizes[one] for one in held) < share * len(pictures):
            held.add(group)
    return {
        side: [picture for picture in pictures if (picture.group in held) == (side == "validation")]
        for side in ("train", "validation")
    }


def read_kinds(senses: Path) -> dict[str, str]:
    """Return the kind of each noun of things that can be drawn, from WordNet's ``index.sense``."""
    uses: dict[str, Counter[bool]] = defaultdict(Counter)
    kinds = {}
    entry = r"^([a-z]{3,})%(\d):(\d\d)\S* \d+ (\d+) (\d+)$"
    for word, part, kind, number, count in re.findall(entry, senses.read_text(), re.MULTILINE):
        uses[word][part == "1"] += int(count)
        if (part, number) == ("1", "1") and kind in KINDS:
            kinds[word] = KINDS[kind]
    return {word: kind for word, kind in kinds.items() if uses[word][True] >= uses[word][False]}


def foils(
    sides: Mapping[str, Sequence[Picture]], kinds: Mapping[str, str], rng: random.Random, often: int = 5
) -> Iterator[dict[str, Any]]:
    """Yield validation captions with their foils, as ``README`` says, once for each noun that can be exchanged."""
    uses = Counter(word for picture in sides["train"] for word in picture.heads)
    nouns = sorted(word for word, count in uses.items() if count >= often and word in kinds)
    beside: dict[str, set[str]] = defaultdict(set)
    for picture in (*sides["train"], *sides["validation"]):
        words = {*re.findall(r"[a-z]+", picture.caption.lower()), *picture.heads}
        for noun in words.intersection(nouns):
            beside[noun] |= words
    for picture in sides["validation"]:
        for noun in sorted(picture.heads.intersection(nouns)):
            rest = {word for word in picture.heads - {noun} if uses[word] >= often}
            fitting = [
                other
                for other in nouns
                if kinds[other] == kinds[noun] and other not in beside[noun] and rest <= beside[other]
                if (other[0] in "aeiou") == (noun[0] in "aeiou")  # it may follow a or an
            ]
            others: dict[str, str] = {}
            while len(others) < min(3, len(fitting)):
                (other,) = rng.choices(fitting, [uses[one] for one in fitting])
                parts = re.split(rf"\b({noun})\b", picture.caption, flags=re.IGNORECASE)
                parts[1::2] = [other.title() if part.istitle() else other for part in parts[1::2]]
                others[other] = "".join(parts)
            if others:
                row = {"image": f"pictures/{picture.file.name}", "caption": picture.caption}
                yield {**row, "foils": [*others.values()], "category": kinds[noun]}


def write_definitions(wordnet: Path, out: Path) -> int:
    """Write WordNet's definitions and examples as captions without images; return how many."""
    lines = [line for part in ("noun", "verb", "adj", "adv") for line in (wordnet / f"data.{part}").open()]
    texts = [line.partition(" | ")[2].strip() for line in lines if " | " in line]
    for side in ("train", "validation"):
        with MDSWriter(out=str(out / side), columns={"caption": "str"}, hashes=["sha1"]) as writer:
            for number, text in enumerate(texts):
                if (number % 50 == 0) == (side == "validation"):
                    writer.write({"caption": text})
    return len(texts)


def make(packages: Path, out: Path, seed: int = 17) -> str:
    """Make the new folder ``out`` of ``packages``, a folder with a folder for each; return its README."""
    with whole_folder(out) as folder:
        fill(packages, folder, random.Random(seed))
    return (out / "README.md").read_text()


def fill(packages: Path, out: Path, rng: random.Random) -> None:
    """Write all files into an empty folder."""
    (out / "pictures").mkdir()
    (out / "licences").mkdir()
    clip_art = (packages / f"openclipart-{kind}/usr/share/openclipart/{kind}" for kind in ("png", "svg"))
    published = [*open_clip_art(*clip_art), *tux_paint(packages / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps")]
    pictures = []
    for number, (picture, image) in enumerate(choose(published, rng)):
        pictures.append(picture._replace(file=out / f"pictures/{number:05}.png"))
        image.save(pictures[-1].file)
    sides = split(pictures, rng)
    kinds = read_kinds(packages / "wordnet-sense-index/usr/share/wordnet/index.sense")
    lists: dict[str, list[dict[str, Any]]] = {"foils": [*foils(sides, kinds, rng)]}
    for side, some in sides.items():
        lists[side] = [{"image": f"pictures/{one.file.name}", "caption": one.caption} for one in some]
    for name, rows in lists.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for side in sides:
        convert_captions(out / f"{side}.jsonl", out / side)
    definitions = write_definitions(packages / "wordnet-base/usr/share/wordnet", out / "definitions")
    counts = f"{len(published)} published pictures, {len(sides['train'])} in train, {len(sides['validation'])} in "
    counts += f"validation, {len(lists['foils'])} captions with foils, {definitions} definitions"
    for name in PACKAGES:
        shutil.copy(packages / name / "usr/share/doc" / name / "copyright", out / "licences" / name)
    licences = "".join(f"- {name}: {licence}\n" for name, licence in PACKAGES.items())
    (out / "README.md").write_text(f"{README}\n{counts}.\n\n{licences}")


def fetch(folder: Path) -> None:
    """Download the packages, and unpack each into a folder of its name."""
    try:
        subprocess.run(["apt-get", "-qq", "download", *PACKAGES], cwd=folder, check=True)
        for name in PACKAGES:
            (file,) = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", file, folder / name], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: the packages need apt-get, dpkg-deb and a network: {one_line(error)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit(f"{__doc__}\nerror: name one folder, which must not exist yet.")
    with tempfile.TemporaryDirectory() as temporary:
        fetch(Path(temporary))
        print(make(Path(temporary), Path(sys.argv[1])))
