"""How a benchmark is run: figures and intervals from predictions alone, resumed, refused, and shared by ranks."""

import json

import numpy as np
import pytest
from common.judged import Blind
from PIL import Image

from composer_prior.evaluation.benchmark import Benchmark, figures_of, reasons, run_benchmark
from composer_prior.evaluation.choices import Choice, ChoiceBenchmark


class Numbers(Benchmark):
    """Sample ``i`` is answered by ``i``; the figures are the mean, and a ratio that is not defined."""

    fingerprint = "numbers"
    batch_size = 3

    def __init__(self, count=10, fail_at=None):
        self.samples, self.fail_at, self.asked = count, fail_at, []

    def __len__(self):
        return self.samples

    def predict(self, model, numbers):
        if self.fail_at in numbers:
            raise KeyboardInterrupt
        self.asked += numbers
        return [{"answer": number} for number in numbers]

    def count(self, prediction):
        return {"sum": prediction["answer"], "samples": 1.0, "none": 0.0}

    def figures(self, sums):
        return {"mean": sums["sum"] / sums["samples"], "undefined": sums["sum"] / sums["none"]}


def test_a_figure_has_the_interval_of_a_bootstrap_over_samples():
    answers = np.random.default_rng(1).normal(5, 2, size=400)
    figures = figures_of(Numbers(), [{"answer": answer} for answer in answers])
    mean, error = answers.mean(), answers.std() / 20
    assert figures["mean"]["value"] == pytest.approx(mean)
    assert figures["mean"]["low"] == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert figures["mean"]["high"] == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert figures["undefined"] == {"value": None, "low": None, "high": None}


def test_one_sample_has_no_interval_and_none_no_figure():
    assert figures_of(Numbers(), [{"answer": 3}])["mean"] == {"value": 3.0, "low": None, "high": None}
    assert run_benchmark(Numbers(0), Blind()) == ({}, [])


class OneChoice(ChoiceBenchmark):
    fingerprint = "one"

    def __len__(self):
        return 1

    def choice(self, number):
        return Choice(Image.new("RGB", (8, 8)), ("true", "false"))


def test_what_takes_another_image_is_undefined_where_there_is_none():
    found, (line,) = run_benchmark(OneChoice(), Blind())
    assert line["logprobs_shuffled"] is None
    undefined = {name for name, one in found.items() if one["value"] is None}
    assert undefined == {"total_shuffled", "per_token_shuffled", "image_gain_shuffled"}
    assert {*reasons(OneChoice(), found).values()} == {"there is no other image or nothing to divide by"}
    assert reasons(Numbers(), figures_of(Numbers(), [{"answer": 3}])) == {
        "undefined": "there is no other image or nothing to divide by"
    }


def test_what_was_stopped_goes_on_where_it_was(tmp_path):
    file = tmp_path / "out/predictions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Numbers(fail_at=7), Blind(), predictions=file, settings={"model": "a"})
    with open(file, "a") as lines:
        lines.write('{"sample": 6, "answ')  # what a killed process leaves
    again = Numbers()
    figures, predictions = run_benchmark(again, Blind(), predictions=file, settings={"model": "a"})
    assert again.asked == [6, 7, 8, 9]
    assert [line["answer"] for line in predictions] == [*range(10)]
    assert [json.loads(line) for line in file.read_text().splitlines()] == predictions
    assert figures == run_benchmark(Numbers(), Blind())[0]
    fewer = run_benchmark(Numbers(), Blind(), predictions=file, settings={"model": "a"}, limit=4)
    assert [line["answer"] for line in fewer[1]] == [0, 1, 2, 3]
    with pytest.raises(FileExistsError, match=r"\(model differ\)"):
        run_benchmark(Numbers(), Blind(), predictions=file, settings={"model": "b"})
    run_benchmark(Numbers(2), Blind(), predictions=file, settings={"model": "b"}, overwrite=True)
    assert len(file.read_text().splitlines()) == 2


class Letters(ChoiceBenchmark):
    fingerprint = "letters"

    def __len__(self):
        return 3

    def choice(self, number):
        texts = [("bb", "aaa"), ("cc", "aa"), ("ab", "ba")][number]
        return Choice(Image.new("RGB", (4, 4), (number, 0, 0)), texts, "first" if number == 0 else "rest")


class Sees(Blind):
    """Finds every text that begins with the letter of the image more likely."""

    def logprobs(self, images, texts, prompt=None, end=True):
        scores = super().logprobs(images, texts, prompt, end)
        for image, some, written in zip(images, scores, texts, strict=True):
            letter = {0: "b", 1: "c", 2: "a"}.get(image.getpixel((0, 0))[0])
            for score, text in zip(some, written, strict=True):
                score.values[0] += 9.0 * (text[0] == letter)
        return scores


def test_who_ignores_the_image_is_at_text_only_level_and_at_chance_without_the_prior():
    figures = {name: one["value"] for name, one in figures_of_letters(Blind()).items()}
    assert figures["chance"] == figures["image_gain"] == figures["image_gain_shuffled"] == 0.5
    assert figures["total"] == figures["total_shuffled"] == figures["text_only"]
    assert figures["total"] == pytest.approx((1.0 + 1.0 + 0.5) / 3)  # "ab" and "ba" are equally likely
    assert figures["total/first"] == 1.0
    assert figures["total/rest"] == 0.75


def test_who_sees_is_right_with_its_own_image_alone():
    figures = {name: one["value"] for name, one in figures_of_letters(Sees()).items()}
    assert figures["total"] == figures["per_token"] == figures["image_gain"] == 1.0
    assert figures["image_gain_shuffled"] == pytest.approx((0.5 + 0.0 + 0.0) / 3)


def figures_of_letters(model):
    return run_benchmark(Letters(), model)[0]
