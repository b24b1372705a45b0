"""A trained model as a model of lmms-eval, ``--model composer_prior``, and what a task of image-caption pairs needs.

lmms-eval finds it by the entry point ``lmms_eval.models``; nothing else imports this module. It needs of the package
only what loads a model, so it also runs where Composer is not installed (``scripts/lmms_eval.py``).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from composer_prior.data.images import decode_rgb, on_white
from composer_prior.data.tokenizer import encode_caption
from composer_prior.models.image_text_model import ImageTextModel

NAME = "composer_prior"


def manifest() -> ModelManifest:
    """Describe the model to lmms-eval."""
    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{ComposerPrior.__name__}")


class ComposerPrior(lmms):
    """A model that captions images, for lmms-eval.

    It has learnt captions of single images after one prompt. So the text of a task is left out unless ``use_context``
    asks for it, and a document has exactly one image. Captions and likelihoods of texts, as of choices, are given.

    A task's ``generation_kwargs`` are honoured where they say ``max_new_tokens`` (64), ``num_beams`` (1),
    ``temperature`` (0, the most likely token), ``do_sample``, ``top_p``, ``top_k``, ``repetition_penalty`` and
    ``until``, at the first of which a caption is cut off; lmms-eval sets an empty line where a task says nothing.

    Args:
        pretrained: a run folder, a model folder or a hub id.
        batch_size: images that are captioned at once. Default: ``1``.
        device: such as ``cuda:1``. Default: a GPU if there is one. Of several processes each has its own.
        use_context: put the text of the task between image and caption. Default: ``False``, the prompt of training.
        trust_remote_code: run code that comes with the language model. Default: ``False``.
        max_batch_size: is ignored; lmms-eval passes it.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        use_context: bool = False,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: expected a number of images, at least 1.")
        self.batch_size = int(batch_size)
        self.use_context = use_context
        self.accelerator = Accelerator()  # lmms-eval shares documents out among its processes
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = Path(pretrained).expanduser()
        place = place / "model" if (place / "model/config.json").is_file() else place
        self.model = ImageTextModel.from_pretrained(place if place.exists() else pretrained, trust_remote_code)
        alone = self._world_size == 1
        self.device = torch.device(device) if device is not None and alone else self.accelerator.device
        self.model.to(self.device)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Caption the requests, in their order."""
        groups: dict[tuple[str, str | None], list[int]] = {}  # what is decoded alike
        for position, request in enumerate(requests):
            context, options, *_ = request.args
            key = json.dumps(options, sort_keys=True, default=str), context if self.use_context else None
            groups.setdefault(key, []).append(position)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Captions", disable=self.rank != 0) as bar:
            for (_, prompt), positions in groups.items():
                for start in range(0, len(positions), self.batch_size):
                    batch = positions[start : start + self.batch_size]
                    options = requests[batch[0]].args[1]
                    images = [self._image(requests[position]) for position in batch]
                    captions = self.model.generate_captions(images, prompt, **decoding(options))
                    for position, caption in zip(batch, captions, strict=True):
                        answers[position] = cut(caption, options.get("until"))
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each request the loss of its text in nats, and whether the text is what greedy decoding begins with.

        The loss is the negative log-likelihood of the whole text: lmms-eval takes the choice with the smallest value.
        The texts of a document share one pass over its image.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}  # what has one beginning
        for position, request in enumerate(requests):
            if len(request.args) != 6:
                raise ValueError(f"{NAME} knows no likelihood of text without an image, as acc_mutual_info asks for.")
            context, _, _, number, task, split = request.args
            key = (task, split, number, context if self.use_context else self.model.prompt)
            groups.setdefault(key, []).append(position)
        answers = [(0.0, False)] * len(requests)
        for (*_, prompt), positions in tqdm(groups.items(), desc="Likelihoods", disable=self.rank != 0):
            images = [self._image(requests[positions[0]])]
            texts = [self._continuation(requests[position]) for position in positions]
            scores = self.model.text_logprobs(images, [texts], prompt)[0]
            inputs = {key: value.to(self.device) for key, value in self.model.inputs(images, prompt).items()}
            ids = self.model.model.generate(**inputs, max_new_tokens=max(map(len, texts)), do_sample=False)[0]
            greedy = ids[inputs["input_ids"].shape[1] :].tolist()
            for position, text, values in zip(positions, texts, scores, strict=True):
                answers[position] = (-sum(values), greedy[: len(text)] == text)
        return answers

    def _continuation(self, request: Instance) -> list[int]:
        """Return the ids of the text of a likelihood request: a choice, or the task's text for the document."""
        _, text, _, number, task, split = request.args
        text = text(self.task_dict[task][split][number]) if callable(text) else text
        ids: list[int] = encode_caption(self.model.tokenizer, text).ids
        if not ids:
            raise ValueError(f"{task}, document {number}: a text without tokens has no likelihood.")
        return ids

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(f"{NAME} captions images: it takes tasks of one round, not of several.")

    def _image(self, request: Instance) -> Image.Image:
        _, _, doc_to_visual, number, task, split = request.args
        found = doc_to_visual(self.task_dict[task][split][number])
        images = list(found) if isinstance(found, (list, tuple)) else [found]
        if len(images) != 1 or not isinstance(images[0], Image.Image):
            kinds = ", ".join(type(image).__name__ for image in images) or "nothing"
            raise ValueError(f"{task}, document {number}: {NAME} captions one image at a time, and was given {kinds}.")
        return rgb(images[0])


def decoding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a task's ``generation_kwargs`` into options of :meth:`.ImageTextModel.generate_captions`."""
    given = {key: value for key, value in options.items() if value is not None}
    samples = bool(given.get("do_sample", given.get("temperature", 0) > 0)) and given.get("temperature", 1) > 0
    found = {"max_new_tokens": int(given.get("max_new_tokens", 64)), "num_beams": int(given.get("num_beams", 1))}
    kept = ("repetition_penalty", *(("temperature", "top_p", "top_k") if samples else ()))
    return {**found, "do_sample": samples, **{key: given[key] for key in kept if key in given}}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Cut a text before the first of its end words."""
    ends = [until] if isinstance(until, str) else until or []
    return text[: min([len(text), *(text.find(end) for end in ends if end and end in text)])]


def rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, with transparency on white as in training."""
    return on_white(image.copy()).convert("RGB")


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """For a task of image-caption pairs: the image, encoded or decoded, decoded as ``composer-prior caption`` does."""
    image = doc["image"]
    image = image["bytes"] if isinstance(image, Mapping) else image
    return [rgb(image) if isinstance(image, Image.Image) else decode_rgb(image)]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """For a task of image-caption pairs: ``exact_match`` and ``word_f1`` against the nearest of the captions."""
    captions = [doc["caption"]] if isinstance(doc["caption"], str) else doc["caption"]
    return {
        "exact_match": max(float(results[0].strip() == caption.strip()) for caption in captions),
        "word_f1": max(word_f1(results[0], caption) for caption in captions),
    }


def word_f1(text: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of words, lower case and each as often as it is there."""
    found, wanted = (Counter(re.findall(r"\w+", one.lower())) for one in (text, expected))
    both = found.total() + wanted.total()
    return 2 * (found & wanted).total() / both if both else 1.0
