"""Choices between the true caption of an image and foils, which differ in a word or in their order."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from composer_prior.data.messages import DataError
from composer_prior.evaluation.choices import SCORES, Choice, FileChoices
from composer_prior.evaluation.samples import (
    ImageFolder,
    Unusable,
    data_files,
    digest,
    file_size,
    image_name,
    load_image,
    numbered,
    read_json,
    text,
    usable,
    value,
)

VOTES = 2  # of three annotators, from which on VALSE's authors use a sample
ATTRIBUTE_PAIRS = 25  # samples, from which on ARO's authors report a pair of attributes
_MACRO = "\t"  # between the parts of a sum's name that is of one group


@dataclass(frozen=True)
class Foil:
    """One sample."""

    image: Path | bytes  # its file, or its bytes
    caption: str  # true of it
    foils: tuple[str, ...]  # not true of it
    category: str = ""  # which figures it belongs to
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels; None: the whole image
    group: str = ""  # whose accuracies the ``_macro`` figures average, such as ARO's relation
    least: int = 1  # number of samples from which on a group counts there


class Foils(FileChoices):
    """Accuracy of choosing the caption among its foils by likelihood; see :class:`.ChoiceBenchmark` for the figures.

    The format of a file is recognized from its keys:

    - JSON Lines of this package: ``image``, ``caption``, ``foils`` (or ``foil``) and perhaps ``category``;
    - SugarCrepe (Hsieh et al. 2023), VALSE (Parcalabescu et al. 2022; samples that at least two of three annotators
      validated), FOIL-COCO (Shekhar et al. 2017; each foil beside the caption it was made from), and ARO's relations
      and attributions (Yuksekgonul et al. 2023; the images cut to the box that both objects are in), as their authors
      publish them.

    Where there are several files, the name of each is the category of its samples. ARO's authors report the mean of the
    accuracies of all relations, and of all pairs of attributes with at least 25 samples: that is ``total_macro``. For
    relations they leave out symmetric ones, which the predictions name, so that it can be recounted.

    Args:
        data: a file, or a folder of files.
        images: folder of the images, or one with folders of them. Default: that of the file.
        prompt: text between image and caption. Default: that of training.
        reference: blank, for the model itself with a grey image, or a causal LM on text, such as PRIOR's reference.
        end: score the end of the caption too.
    """

    def __init__(
        self,
        *,
        data: str,
        images: str | None = None,
        prompt: str | None = None,
        reference: str = "blank",
        end: bool = True,
    ):
        self.prompt = prompt
        samples = read_foils(data, images)
        parts = [(s.caption, s.foils, s.category, s.box, s.group, *file_size(s.image)) for s in samples]
        self.fingerprint = digest(parts, prompt, reference, end)
        super().__init__(samples, reference, end)

    def choice(self, number: int) -> Choice:
        sample = self.samples[number]
        image = load_image(sample.image)
        details = {"image": image_name(sample.image), **({"group": sample.group} if sample.group else {})}
        texts = (sample.caption, *sample.foils)
        return Choice(image.crop(sample.box) if sample.box else image, texts, sample.category, self.prompt, details)

    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        points = super().count(prediction)
        if "group" not in prediction:
            return points
        where = _MACRO.join(("", prediction["category"], prediction["group"]))
        return points | {f"{name}{where}": points[name] for name in (*SCORES, "samples")}

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = super().figures({name: total for name, total in sums.items() if _MACRO not in name})
        groups = defaultdict(list)
        for key, total in sums.items():
            name, _, where = key.partition(_MACRO)
            if where and name != "samples":
                category = where.partition(_MACRO)[0]
                figure = f"{name}_macro/{category}" if category else f"{name}_macro"
                groups[figure].append(total / sums[f"samples{_MACRO}{where}"])
        return found | {figure: _mean(accuracies) for figure, accuracies in groups.items()}


def _mean(values: list[np.ndarray]) -> np.ndarray:
    """Return the mean of the defined values: a resample need not have every group."""
    table = np.stack(values)
    defined = np.isfinite(table)
    return np.where(defined, table, 0).sum(0) / defined.sum(0)


def read_foils(data: str, images: str | None = None) -> list[Foil]:
    """Read the samples of a file or of a folder of files; a DataError says why none can be used."""
    files = data_files(data)
    folder = ImageFolder(images or files[0].parent)
    entries: list[tuple[str, Any]] = []
    for file in files:
        name = file.stem if len(files) > 1 else ""
        entries += [(place, (reader, entry, folder, name)) for place, reader, entry in _entries(file)]
    found = usable(data, entries, lambda entry: _foil(*entry))
    sizes = Counter((sample.category, sample.group) for sample in found)
    return [one if sizes[one.category, one.group] >= one.least else replace(one, group="") for one in found]


def _foil(reader: Any, entry: Any, images: ImageFolder, category: str) -> Foil:
    sample: Foil = reader(entry, images)
    if any(foil.strip() == sample.caption.strip() for foil in sample.foils):
        raise Unusable("with a foil equal to the caption", f"the caption {sample.caption!r} is its own foil")
    return replace(sample, category=sample.category or category)


def _entries(file: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place of each entry of a file, the function that reads it, and the entry."""
    content = read_json(file)
    if isinstance(content, Mapping) and {"annotations", "images"} <= content.keys():
        yield from ((place, _of_foil_coco, entry) for place, entry in _pairs_of_foil_coco(file, content))
        return
    if isinstance(content, Mapping) and "caption" in content:  # one line
        content = [content]
    rows = numbered(file, content) if isinstance(content, Mapping | list) else []
    keys = {key for _, entry in rows if isinstance(entry, Mapping) for key in entry}
    reader = next((reader for needed, reader in _READERS if needed <= keys), None)
    if reader is None:
        raise DataError(
            f"{file}: expected JSON Lines with image, caption and foils, or a file of SugarCrepe, VALSE, FOIL-COCO or "
            "ARO's relations or attributions."
        )
    yield from ((place, reader, entry) for place, entry in rows)


def _own(entry: Any, images: ImageFolder) -> Foil:
    foils = value(entry, "foils", "foil")
    foils = [foils] if isinstance(foils, str) else foils
    if not isinstance(foils, list) or not all(isinstance(foil, str) and foil.strip() for foil in foils):
        raise Unusable("with foils that are not texts", f"its foils are {foils!r}")
    category = str(entry.get("category") or "")
    return Foil(images.find(text(entry, "image")), text(entry, "caption"), tuple(foils), category)


def _of_sugarcrepe(entry: Any, images: ImageFolder) -> Foil:
    name = text(entry, "filename")
    # COCO's images of 2017 have the same numbers as those of 2014.
    image = images.find(name, f"COCO_val2014_{name}", f"COCO_train2014_{name}")
    return Foil(image, text(entry, "caption"), (text(entry, "negative_caption"),))


def _of_valse(entry: Any, images: ImageFolder) -> Foil:
    votes = (entry.get("mturk") or {}).get("caption") if isinstance(entry, Mapping) else None
    if votes is None or votes < VOTES:
        raise Unusable(
            "not validated by VALSE's annotators", f"{votes or 0} of 3 annotators chose the caption and not the foil"
        )
    caption, foil = value(entry, "caption"), value(entry, "foil", "foils")
    caption, foil = (found[0] if isinstance(found, list) else found for found in (caption, foil))
    return Foil(images.find(text(entry, "image_file")), caption, (foil,))


def _of_aro(entry: Any, images: ImageFolder) -> Foil:
    try:
        left, top, width, height = (int(entry[f"bbox_{side}"]) for side in "xywh")
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable("without a box", "it lacks bbox_x, bbox_y, bbox_w or bbox_h") from error
    if width < 1 or height < 1:
        raise Unusable("with an empty box", f"its box is {width} x {height} pixels")
    relation = entry.get("relation_name")
    group, least = (relation, 1) if relation else ("_".join(entry.get("attributes") or ()), ATTRIBUTE_PAIRS)
    box = (left, top, left + width, top + height)
    captions = text(entry, "true_caption"), (text(entry, "false_caption"),)
    return Foil(images.find(text(entry, "image_path")), *captions, box=box, group=group, least=least)


def _pairs_of_foil_coco(file: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """Yield each foil with its original caption and the name of the image."""
    names = {image.get("id"): image.get("file_name") for image in content["images"]}
    captions = {one.get("id"): one.get("caption") for one in content["annotations"] if one.get("foil") is False}
    for place, one in numbered(file, content["annotations"]):
        if "foil" not in one:
            raise DataError(f"{file}, {place}: expected foil, true or false, as FOIL-COCO has it.")
        if one["foil"]:
            yield place, {**one, "original": captions.get(one.get("id")), "file_name": names.get(one.get("image_id"))}


def _of_foil_coco(entry: Any, images: ImageFolder) -> Foil:
    return Foil(images.find(text(entry, "file_name")), text(entry, "original"), (text(entry, "caption"),))


_READERS = (
    ({"true_caption", "false_caption"}, _of_aro),
    ({"filename", "negative_caption"}, _of_sugarcrepe),
    ({"image_file", "mturk"}, _of_valse),
    ({"image", "caption", "foils"}, _own),
    ({"image", "caption", "foil"}, _own),
)
