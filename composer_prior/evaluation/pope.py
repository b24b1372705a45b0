"""Questions whether an object is in the image, answered with yes or no (POPE, Li et al. 2023)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from composer_prior.evaluation.choices import Choice, FileChoices
from composer_prior.evaluation.samples import (
    ImageFolder,
    Unusable,
    data_files,
    digest,
    file_size,
    load_image,
    numbered,
    read_json,
    text,
    usable,
    with_category,
)


class Question(NamedTuple):
    """One line of a file."""

    image: Path | bytes  # its file, or its bytes
    question: str  # such as "Is there a snowboard in the image?"
    yes: bool  # True if that is the answer
    category: str  # the name of the file, where there are several
    identity: Any  # ``question_id``


class Pope(FileChoices):
    """Accuracy, precision, recall and F1 of yes, and the share of yes, for the likelier answer.

    The figures of :class:`.ChoiceBenchmark` are added; ``total`` is the accuracy. Each of several files, such as
    random, popular and adversarial, is a category.

    Args:
        data: JSON Lines with question_id, image, text and label, as POPE's authors publish them, or a folder of such
            files.
        images: folder of the images. Default: that of the file.
        prompt: what stands between image and answer; the question is put in the place of {question}.
        answers: how yes and no are spelled, with a comma between them.
        reference: blank, for the model itself with a grey image, or a causal LM on text, such as PRIOR's reference.
        end: score the end of the answer too.
    """

    def __init__(
        self,
        *,
        data: str,
        images: str | None = None,
        prompt: str = "{question}",
        answers: str = "yes,no",
        reference: str = "blank",
        end: bool = False,
    ):
        if "{question}" not in prompt:
            raise ValueError(f"prompt={prompt!r}: expected {{question}} where the question goes.")
        spelled = [answer.strip() for answer in answers.split(",")]
        if len(spelled) != 2 or not all(spelled):
            raise ValueError(f"answers={answers!r}: expected two words with a comma between them, as in 'Yes,No'.")
        self.prompt = prompt
        self.answers = {True: tuple(spelled), False: tuple(reversed(spelled))}
        questions = _read(data, images)
        sizes = [file_size(question.image) for question in questions]
        self.fingerprint = digest([question[1:] for question in questions], sizes, prompt, answers, reference, end)
        super().__init__(questions, reference, end)

    def choice(self, number: int) -> Choice:
        asked = self.samples[number]
        details = {"question_id": asked.identity, "question": asked.question, "label": "yes" if asked.yes else "no"}
        prompt = self.prompt.replace("{question}", asked.question)
        return Choice(load_image(asked.image), self.answers[asked.yes], asked.category, prompt, details)

    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        points = super().count(prediction)
        is_yes, right = float(prediction["label"] == "yes"), points["total"]
        counts = {"is_yes": is_yes, "true_yes": is_yes * right, "said_yes": right if is_yes else 1 - right}
        return points | with_category(counts, prediction["category"])

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shares = super().figures(sums)
        found = {name: share for name, share in shares.items() if name.partition("/")[0] not in _COUNTED}
        for key in [name for name in shares if name.partition("/")[0] == "is_yes"]:
            of = key.removeprefix("is_yes")
            true, said, are = shares[f"true_yes{of}"], shares[f"said_yes{of}"], shares[key]
            found[f"accuracy{of}"] = shares[f"total{of}"]
            found[f"precision{of}"] = true / said
            found[f"recall{of}"] = true / are
            found[f"f1{of}"] = 2 * true / (said + are)
            found[f"yes{of}"] = said
        return found


_COUNTED = ("is_yes", "true_yes", "said_yes")


def _read(data: str, images: str | None) -> list[Question]:
    files = data_files(data)
    folder = ImageFolder(images or files[0].parent)
    entries = []
    for file in files:
        content = read_json(file)
        category = file.stem if len(files) > 1 else ""
        lines = content if isinstance(content, list) else [content]
        entries += [(place, (entry, folder, category)) for place, entry in numbered(file, lines)]
    return usable(data, entries, lambda entry: _question(*entry))


def _question(entry: Any, images: ImageFolder, category: str) -> Question:
    label = text(entry, "label").strip().lower()
    if label not in ("yes", "no"):
        raise Unusable("with a label that is neither yes nor no", f"its label is {label!r}")
    return Question(
        images.find(text(entry, "image")), text(entry, "text"), label == "yes", category, entry.get("question_id")
    )
