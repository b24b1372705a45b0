"""The data set of Debian's captioned pictures, made of made-up packages."""

import importlib.util
import random

import numpy as np
import pytest
from common.recipes import ROOT
from PIL import Image

from composer_prior.data.captions import read_captions
from composer_prior.evaluation.foils import read_foils

SVG = """<svg><metadata><dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<rdf:Bag>{keywords}</rdf:Bag></metadata><text><dc:title>drawn</dc:title></text></svg>"""
SENSES = """\
cat%1:05:00:: 02121620 1 18
cat%2:29:00:: 00076400 1 0
dog%1:05:00:: 02084071 1 42
bat%1:05:00:: 02139199 1 1
animal%1:05:00:: 00015388 1 67
car%1:06:00:: 02958343 1 71
idea%1:09:00:: 05833840 1 100
run%1:18:00:: 00558883 1 3
run%2:38:00:: 01926311 1 106
"""


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("debian_pictures", ROOT / "scripts/debian_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(file, number):
    """Save a picture that looks like that of no other number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((400, 200), Image.Resampling.NEAREST).save(file)


def clip(packages, name, number, title, description="", keywords=()):
    """Put a drawing with its text into both packages of clip art."""
    png, svg = (packages / f"openclipart-{kind}/usr/share/openclipart/{kind}" for kind in ("png", "svg"))
    draw(png / f"{name}.png", number)
    (svg / name).parent.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    (svg / f"{name}.svg").write_text(SVG.format(title=title, description=description, keywords=listed))


@pytest.fixture
def packages(tmp_path, script):
    """Folders as the packages have them: 60 animals and 6 cars with titles of their own, one twice, and stamps."""
    folder = tmp_path / "packages"
    for number in range(60):
        animal = ("cat", "dog", "bat")[number % 3]
        name = "".join(chr(97 + int(digit)) * 3 for digit in str(100 + number))
        clip(folder, f"animals/{name}_1", number, f"{name} {animal}", "", ("animal", animal, "hash", "x_86"))
    for number in range(60, 66):
        clip(folder, f"cars/car_{number}", number, f"Car {number}", "A car &amp; a road.", ("car",))
    clip(folder, "cars/same", 65, "Another")
    stamps = folder / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    draw(stamps / "owl.png", 66)
    (stamps / "owl.txt").write_text("A white owl.\nde.utf8=Eine Eule.\n")
    draw(stamps / "silent.png", 67)
    wordnet = folder / "wordnet-base/usr/share/wordnet"
    wordnet.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        (wordnet / f"data.{part}").write_text(f"  1 licence\n1 03 n 01 x 0 000 | a {part}; as in this \n" * 30)
    senses = folder / "wordnet-sense-index/usr/share/wordnet"
    senses.mkdir(parents=True)
    (senses / "index.sense").write_text(SENSES)
    for package in script.PACKAGES:
        (folder / package / "usr/share/doc" / package).mkdir(parents=True)
        (folder / package / "usr/share/doc" / package / "copyright").write_text(f"of {package}")
    return folder


def test_pictures_captions_and_foils_of_packages(script, packages, tmp_path):
    out = tmp_path / "out"
    page = script.make(packages, out)
    sides = {side: [*read_captions({"local": str(out / side)})] for side in ("train", "validation")}
    captions = sides["train"] + sides["validation"]
    assert len(captions) == len(set(captions)) == 60 + 6 + 1  # each picture once, and none without text
    assert f"68 published pictures, {len(sides['train'])} in train, {len(sides['validation'])} in validation" in page
    assert "bbbaaaaaa cat. animal, cat." in captions
    assert "A white owl." in captions
    cars = [side for side, some in sides.items() for caption in some if "A car & a road. car" in caption]
    assert len(cars) >= 5
    assert len(set(cars)) == 1  # titles that differ in numbers
    assert 13 <= len(sides["validation"]) <= 20
    found = read_foils(str(out / "foils.jsonl"))
    assert len(found) == sum("animal" in caption for caption in sides["validation"]) >= 5
    for one in found:
        assert one.caption in sides["validation"]
        assert one.category == "animal"
        ours, *others = (text.rstrip(".").split()[-1] for text in (one.caption, *one.foils))
        assert {ours, *others} <= {"cat", "dog", "bat"}
        assert all(foil == one.caption.replace(ours, other) for foil, other in zip(one.foils, others, strict=True))
        with Image.open(one.image) as image:
            assert image.size == (160, 80)
    texts = [*read_captions({"local": str(out / "definitions/train")})]
    assert len(texts) == 4 * 30 - 3
    assert texts[0] == "a noun; as in this"
    assert (out / "licences/tuxpaint-stamps-default").read_text() == "of tuxpaint-stamps-default"
    again = tmp_path / "again"
    script.make(packages, again)
    assert (again / "foils.jsonl").read_bytes() == (out / "foils.jsonl").read_bytes()


def test_titles_of_collections_and_texts_that_say_nothing(script, tmp_path):
    for number in range(5):
        clip(tmp_path, f"fat_cat_{number}", number, "Clip art of 2004", "who@where.net", ("HASH(0x8a)", "unsorted"))
    clip(tmp_path, "dog", 6, "A dog", "d" * 201)
    found = [
        *script.open_clip_art(
            *(tmp_path / f"openclipart-{kind}/usr/share/openclipart/{kind}" for kind in ("png", "svg"))
        )
    ]
    assert [one.caption for one in found] == ["A dog.", *["fat cat."] * 5]
    assert found[1].heads == {"cat"}


def test_nouns_are_words_that_are_mostly_nouns_of_things(script, tmp_path):
    (tmp_path / "index.sense").write_text(SENSES)
    kinds = script.read_kinds(tmp_path / "index.sense")
    assert kinds == {**dict.fromkeys(("cat", "dog", "bat", "animal"), "animal"), "car": "artifact"}


def test_a_foil_fits_beside_the_other_keywords_and_never_occurs_with_its_noun(script):
    def some(count, title, *keywords):
        return [script.Picture(ROOT / f"{title}{i}.png", title, keywords=keywords) for i in range(count)]

    train = [*some(9, "x", "animal", "cat"), *some(5, "x", "animal", "dog"), *some(5, "x", "cow", "wild")]
    train += [*some(5, "x", "animal", "owl"), *some(4, "x", "animal", "bee"), *some(1, "x", "cat", "owl")]
    kinds = dict.fromkeys(("animal", "cat", "dog", "cow", "owl", "bee"), "animal")
    validation = some(1, "Cats: a cat, a Cat", "animal")
    (row,) = script.foils({"train": train, "validation": validation}, kinds, random.Random(1))
    assert row["foils"] == [
        "Cats: a dog, a Dog. animal."
    ]  # no cow, which is never an animal; nor owl, nor the rare bee


def test_a_folder_is_whole_or_not_there(script, packages, tmp_path):
    (packages / "wordnet-base/usr/share/wordnet/data.adv").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.adv"):
        script.make(packages, tmp_path / "made/out")
    assert [*(tmp_path / "made").iterdir()] == []


def test_another_system_is_told_in_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^error: the packages need apt-get, dpkg-deb and a network: ") as end:
        script.fetch(tmp_path)
    assert "\n" not in str(end.value)
