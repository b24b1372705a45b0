"""Hallucinated objects of captions: CHAIR, and the share of the objects in the image that captions name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from composer_prior.data.messages import DataError, announce, one_line
from composer_prior.emoji_scenes.captions import plural
from composer_prior.emoji_scenes.scenes import CLASSES
from composer_prior.evaluation.captioned import CaptionBenchmark, CaptionedImage
from composer_prior.evaluation.samples import digest, per_category, read_json, with_category

_PLURALS = {"child": "children", "foot": "feet", "goose": "geese", "person": "people", "sheep": "sheep"}
_ENDINGS = (("man", "men"), ("knife", "knives"), ("shelf", "shelves"), ("loaf", "loaves"), ("calf", "calves"))
# Pairs of words that CHAIR's authors read as one thing: the object it is, or none.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_PAIRS = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
_PAIRS |= {"passenger jet": "airplane", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
_PAIRS |= {"home plate": "", "train track": ""}


class Vocabulary:
    """Objects and the words of one or several parts that name them; plurals are added."""

    def __init__(self, synonyms: Mapping[str, Iterable[str]]):
        self.objects = {word.lower(): name for name, words in synonyms.items() for word in (name, *words)}
        plurals = {form: name for word, name in self.objects.items() for form in _plurals(word)}
        pairs = {form: name for pair, name in _PAIRS.items() for form in (pair, *_plurals(pair))}
        known = {*self.objects.values(), ""}
        pairs = {form: self.objects.get(name, name) for form, name in pairs.items()}
        self._names = {**plurals, **{form: name for form, name in pairs.items() if name in known}, **self.objects}
        words = sorted(self._names, key=len, reverse=True)
        forms = "|".join(r"[\s-]+".join(map(re.escape, word.split())) for word in words)
        self._pattern = re.compile(rf"(?<!\w)(?:{forms})(?!\w)")

    def find(self, text: str) -> list[str]:
        """Return the objects that a text names, in its order and as often as it names them.

        Only whole words count, and of words that begin at one place the longest: a hot dog is not a dog.
        """
        found = (self._names[" ".join(re.split(r"[\s-]+", word))] for word in self._pattern.findall(text.lower()))
        return [name for name in found if name]


def read_synonyms(file: str | Path) -> Vocabulary:
    """Read objects of a file like CHAIR's ``synonyms.txt``: a line each, the object and then its synonyms."""
    try:
        lines = Path(file).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"objects={file} cannot be read: {one_line(error)}") from error
    synonyms: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, *words = (" ".join(word.split()) for word in line.lower().split(","))
            if not name:
                raise DataError(f"{file}, line {number}: expected the object before the first comma.")
            synonyms.setdefault(name, []).extend(filter(None, words))
    if not synonyms:
        raise DataError(f"objects={file} names no object; write one in each line, with its synonyms after commas.")
    return Vocabulary(synonyms)


class Hallucination(CaptionBenchmark):
    """Objects of generated captions beside those of the images (CHAIR, Rohrbach et al. 2018, section 2).

    ``chair_i``: of all mentions of objects the share of objects that are not there; ``chair_s``: the share of captions
    with such a mention; ``recall``: of the objects that are there the share that is named; ``precision``: of the
    different objects that a caption names the share that is there; ``all_right``: the share of captions that name
    every object that is there and no other. ``precision_shuffled`` and ``recall_shuffled`` are those of the captions
    beside the objects of another image, the level of captions that are written without looking.

    Args:
        data: an MDS folder, or the annotations of COCO, of Karpathy's splits or of NoCaps.
        objects: a file with a line per object, its synonyms after commas, as CHAIR's synonyms.txt. Default: the classes
            of the emoji scenes.
        instances: annotations of COCO's instances, whose categories are there too.
        references: objects that the reference captions name are there.
        others: those of :class:`.CaptionBenchmark`.
    """

    headline: ClassVar[Mapping[str, str]] = {
        "objects named right": "precision",
        "by chance": "precision_shuffled",
        "objects found": "recall",
        "captions all right": "all_right",
    }

    def __init__(
        self,
        *,
        data: str,
        objects: str | None = None,
        instances: str | None = None,
        references: bool = True,
        **others: Any,
    ):
        if not references and instances is None:
            raise ValueError("references=false: no other option says which objects are in the images; give instances=.")
        # Before the data are read, which may take long.
        self.vocabulary = Vocabulary(dict.fromkeys(CLASSES, ())) if objects is None else read_synonyms(objects)
        super().__init__(data=data, **others)
        samples = self.images.samples
        there = [
            {name for text in (sample.references if references else ()) for name in self.vocabulary.find(text)}
            for sample in samples
        ]
        if instances is not None:
            annotated = _annotated(instances, samples, self.vocabulary)
            there = [some | more for some, more in zip(there, annotated, strict=True)]
        nothing = [sample.name for sample, some in zip(samples, there, strict=True) if not some]
        if len(nothing) == len(there) or (objects is None and nothing):
            which = "a class of the emoji scenes" if objects is None else "an object of the list"
            raise DataError(
                f"{data}: the captions of {nothing[0]} do not name {which}; give a fitting list as objects=."
            )
        self.there = [sorted(some) for some in there]
        known = sorted(self.vocabulary.objects.items())
        self.fingerprint = digest(self.images.fingerprint, self.there, known, self.prompt, self.max_new_tokens)

    def truth(self, number: int, caption: str) -> dict[str, Any]:
        other = self.other(number)
        another = None if other == number else self.there[other]
        return {"named": self.vocabulary.find(caption), "there": self.there[number], "there_in_another": another}

    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        counts = chair_counts(prediction["named"], prediction["there"])
        there = prediction["there_in_another"]
        another = dict[str, float]() if there is None else chair_counts(prediction["named"], there)
        counts |= {f"{name}_shuffled": another.get(name, np.nan) for name in ("named_right", "there")}
        return with_category(counts, prediction["category"])

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return per_category(sums, chair)


def chair_counts(named: Sequence[str], there: Iterable[str]) -> dict[str, float]:
    """Return what a caption adds to the sums of :func:`chair`; ``named`` has an object as often as the caption."""
    different, true = set(named), set(there)
    wrong = [name for name in named if name not in true]
    return {
        "captions": 1.0,
        "captions_wrong": float(bool(wrong)),
        "captions_right": float(different == true),
        "mentions": float(len(named)),
        "mentions_wrong": float(len(wrong)),
        "named": float(len(different)),
        "named_right": float(len(different & true)),
        "there": float(len(true)),
    }


def chair(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return CHAIR per instance and per sentence, recall, precision and the share of entirely right captions."""
    return {
        "chair_i": sums["mentions_wrong"] / sums["mentions"],
        "chair_s": sums["captions_wrong"] / sums["captions"],
        "recall": sums["named_right"] / sums["there"],
        "precision": sums["named_right"] / sums["named"],
        "recall_shuffled": sums["named_right_shuffled"] / sums["there_shuffled"],
        "precision_shuffled": sums["named_right_shuffled"] / sums["named"],
        "all_right": sums["captions_right"] / sums["captions"],
    }


def _plurals(word: str) -> set[str]:
    *head, last = word.split(" ")
    forms = {plural(last), f"{last}s"}
    if last in _PLURALS:
        forms.add(_PLURALS[last])
    forms |= {last[: -len(one)] + many for one, many in _ENDINGS if last.endswith(one) and last != "human"}
    if last.endswith("o"):
        forms.add(f"{last}es")
    return {" ".join([*head, form]) for form in forms}


def _annotated(file: str, samples: Sequence[CaptionedImage], vocabulary: Vocabulary) -> list[set[str]]:
    """Return the objects of COCO's instances in each image."""
    path = Path(file).expanduser()
    content = read_json(path)
    if not isinstance(content, Mapping) or not {"images", "annotations", "categories"} <= content.keys():
        raise DataError(
            f"instances={path}: expected images, annotations and categories, as COCO's instances have them."
        )
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    names = {number: vocabulary.objects.get(name.lower(), "") for number, name in categories.items()}
    unknown = [name for number, name in categories.items() if not names[number]]
    if unknown:
        announce(
            f"{path}: {len(unknown)} of {len(categories)} categories are not among the objects and count for nothing, "
            f"such as {unknown[0]}."
        )
    found: dict[Any, set[str]] = {entry["id"]: set() for entry in content["images"]}
    for entry in content["annotations"]:
        if names.get(entry.get("category_id")) and entry.get("image_id") in found:
            found[entry["image_id"]].add(names[entry["category_id"]])
    missing = [sample.name for sample in samples if sample.coco_id not in found]
    if missing:
        raise DataError(
            f"instances={path}: {len(missing)} of {len(samples)} images are not in it, such as "
            f"{missing[0]}; give the instances of the same images."
        )
    return [found[sample.coco_id] for sample in samples]
