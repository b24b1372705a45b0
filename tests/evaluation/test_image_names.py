"""What annotations name is an image in the folder of images, or in the entry itself, and never elsewhere."""

import base64
import json
import os
import unicodedata

import pytest
from conversion.test_field import IMAGE, picture

from composer_prior.data.messages import DataError
from composer_prior.evaluation import samples
from composer_prior.evaluation.captioned import CaptionedImages
from composer_prior.evaluation.foils import read_foils
from composer_prior.evaluation.pope import _read as read_pope
from composer_prior.evaluation.samples import Unusable, file_size, load_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one image and with ways out of it, beside an image that must not be read."""
    monkeypatch.setattr(samples, "announce", lambda message: None)
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(picture(7))
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(picture(8))
    (images / "val2014").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(images / "pipe.png")
    return images


def read(form, names, folder):
    """The images of annotations in one of the published forms."""
    if form == "coco":
        content = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"image_id": number, "caption": "a tile"} for number in range(len(names))],
        }
    elif form == "karpathy":
        sentences = [{"raw": "a tile"}]
        content = {"images": [{"filename": name, "split": "test", "sentences": sentences} for name in names]}
    elif form == "pope":
        content = [{"question_id": 1, "image": name, "text": "Is it?", "label": "yes"} for name in names]
    else:
        key, foil = {"foils": ("image", "foil"), "sugarcrepe": ("filename", "negative_caption")}[form]
        content = [{key: name, "caption": "a tile", foil: "a pipe"} for name in names]
    file = folder.parent / "data.json"
    file.write_text(json.dumps(content))
    if form in ("coco", "karpathy"):
        return [one.image for one in CaptionedImages(str(file), str(folder)).samples]
    if form == "pope":
        return [one.image for one in read_pope(str(file), str(folder))]
    return [one.image for one in read_foils(str(file), str(folder))]


FORMS = ["coco", "karpathy", "pope", "foils", "sugarcrepe"]


@pytest.mark.parametrize("form", FORMS)
def test_no_name_leads_out_of_the_folder(form, folder):
    outside = str(folder.parent / "secret.png")
    names = ["0.png", outside, "../secret.png", "x/../../secret.png", f"file://{outside}", "link.png", "pipe.png"]
    found = read(form, [*names, "x" * 5000, "val2014/1.png", "/mnt/coco/0.png"], folder)
    assert [image.name for image in found] == ["0.png", "link.png", "1.png", "0.png"]
    assert [load_image(image).size for image in found[1:3]] == [(12, 12)] * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "leaves"),
        ("pipe.png", "not a regular file"),
        ("9.png", "no 9"),
        ("a caption " * 40, "no a caption"),
    ],
)
def test_what_is_not_found_says_why(name, reason, folder):
    with pytest.raises(Unusable, match=reason):
        samples.ImageFolder(folder).find(name)


@pytest.mark.parametrize("form", FORMS)
def test_base64_is_an_image_and_what_is_cut_is_left_out(form, folder):
    whole, large = base64.b64encode(IMAGE).decode(), base64.b64encode(picture(200, 300)).decode()
    found = read(form, [whole, f"data:image/png;base64,{whole}", large[:-60], "0.png"], folder)
    assert [image if isinstance(image, bytes) else image.name for image in found] == [IMAGE, IMAGE, "0.png"]
    assert len({file_size(image) for image in found}) == 2
    assert load_image(found[0]).getpixel((0, 0)) == (90, 80, 60)
    with pytest.raises(DataError) as caught:
        read(form, [large[:-60]], folder)
    assert "truncated image" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_names_in_either_unicode_form(form, forms, below, folder):
    listed, there = (unicodedata.normalize(one, "café.png") for one in forms)
    (folder / below).mkdir(exist_ok=True)
    (folder / below / there).write_bytes(IMAGE)
    (image,) = read(form, [listed], folder)
    assert load_image(image).size == (12, 12)


def test_annotations_nested_deep_are_one_line(folder):
    (folder.parent / "data.json").write_text("[" * 5000)
    with pytest.raises(DataError, match="nested more than 100 deep"):
        read_foils(str(folder.parent / "data.json"), str(folder))
