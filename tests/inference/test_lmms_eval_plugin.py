"""The plugin for lmms-eval, on a stand-in for the few names of lmms-eval that it uses."""

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
from common.models import small_lvlm
from PIL import Image

from composer_prior import load
from composer_prior.data.tokenizer import encode_caption


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


class Lmms:
    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str


COLOURS = ["red", "green", "blue"]


@pytest.fixture
def plugin(tokenizer, tmp_path, monkeypatch):
    names = {"api.instance": ("Instance", Instance), "api.model": ("lmms", Lmms)}
    names["models.registry_v2"] = ("ModelManifest", ModelManifest)
    for package in ("", ".api", ".models"):
        monkeypatch.setitem(sys.modules, f"lmms_eval{package}", ModuleType(f"lmms_eval{package}"))
    for name, (attribute, value) in names.items():
        module = ModuleType(f"lmms_eval.{name}")
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "composer_prior.inference.lmms_eval_plugin", raising=False)
    small_lvlm("encoder", tokenizer).image_text_model.save_pretrained(tmp_path / "model")
    found = importlib.import_module("composer_prior.inference.lmms_eval_plugin")
    monkeypatch.setitem(sys.modules, found.__name__, found)
    judged = found.ComposerPrior(str(tmp_path / "model"), batch_size=2, device="cpu")
    judged.task_dict["colours"] = {"test": [{"image": Image.new("RGB", (24, 24), c), "answer": c} for c in COLOURS]}
    return judged


def visual(doc):
    return [doc["image"]]


def choices(context=""):
    """As lmms-eval's task of the type multiple_choice asks: every choice of every document."""
    texts = [(number, f" a {colour} square") for number in range(3) for colour in COLOURS]
    return [
        Instance("loglikelihood", (context, text, visual, number, "colours", "test"), index)
        for index, (number, text) in enumerate(texts)
    ]


@torch.no_grad()
def by_hand(model, image, text, prompt):
    ids = encode_caption(model.tokenizer, text).ids
    inputs = model.inputs([image], prompt)
    start = inputs["input_ids"].shape[1]
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    logits = model.model(input_ids=whole, pixel_values=inputs["pixel_values"]).logits[0, start - 1 : -1]
    scores = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
    return float(scores.sum()), logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize("use_context", [False, True])
def test_likelihoods_of_choices(plugin, tmp_path, use_context):
    plugin.use_context = use_context
    model = load(tmp_path / "model")
    requests = choices("what is this?")
    documents = plugin.task_dict["colours"]["test"]
    for request, (score, greedy) in zip(requests, plugin.loglikelihood(requests), strict=True):
        _, text, _, number, *_ = request.args
        expected = by_hand(model, documents[number]["image"], text, "what is this?" if use_context else "")
        assert score == pytest.approx(-expected[0], abs=1e-4)  # lmms-eval chooses the smallest
        assert greedy == expected[1]


def test_what_is_generated_is_greedy(plugin):
    request = Instance("generate_until", ("", {"max_new_tokens": 3}, visual, 1, "colours", "test"), 0)
    (text,) = plugin.generate_until([request])
    inputs = plugin.model.inputs([Image.new("RGB", (24, 24), "green")], "")
    ids = plugin.model.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == plugin.model.tokenizer.decode(ids, skip_special_tokens=True)
    as_text = plugin.model.tokenizer.decode(ids[:1])
    if encode_caption(plugin.model.tokenizer, as_text).ids == ids[:1].tolist():
        asked = Instance("loglikelihood", ("", lambda doc: as_text, visual, 1, "colours", "test"), 0)
        assert plugin.loglikelihood([asked])[0][1]


def test_what_has_no_likelihood_is_named(plugin):
    empty = Instance("loglikelihood", ("", "", visual, 0, "colours", "test"), 0)
    with pytest.raises(ValueError, match="colours, document 0: a text without tokens has no likelihood"):
        plugin.loglikelihood([empty])
    alone = Instance("loglikelihood", ("", " red"), 0)
    with pytest.raises(ValueError, match="no likelihood of text without an image"):
        plugin.loglikelihood([alone])
    two = Instance("loglikelihood", ("", " red", lambda doc: [doc["image"]] * 2, 0, "colours", "test"), 0)
    with pytest.raises(ValueError, match="one image at a time"):
        plugin.loglikelihood([two])
