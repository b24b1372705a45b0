"""The benchmarks with a real model: what they ask of it, and what its answers look like."""

import json

import pytest
from common.fakes import write_image, write_json

from composer_prior import registry
from composer_prior.evaluation.benchmark import run_benchmark


@pytest.fixture
def options(tmp_path, scenes):
    for number in (0, 200):
        write_image(tmp_path / f"{number}.png", number, (32, 24))
    asked = [
        {"question_id": n, "image": f"{n % 2 * 200}.png", "text": f"Is there a {thing}?", "label": label}
        for n, (thing, label) in enumerate((("cat", "yes"), ("dog", "no"), ("bus", "yes")))
    ]
    foils = [{"image": f"{n}.png", "caption": "a cat on a mat", "foils": ["a mat on a cat"]} for n in (0, 200)]
    return {
        "captioning": {"data": str(scenes), "split": "validation", "max_new_tokens": 4},
        "hallucination": {"data": str(scenes), "split": "validation", "max_new_tokens": 4},
        "pope": {"data": write_json(tmp_path / "pope.jsonl", asked)},
        "foils": {"data": write_json(tmp_path / "foils.jsonl", foils)},
    }


@pytest.mark.parametrize("name", ["captioning", "hallucination", "pope", "foils"])
def test_a_model_of_ours_answers_every_benchmark_and_can_be_counted_again(lvlm, options, name, tmp_path):
    benchmark = registry.build("benchmark", name, options[name], "benchmarks")
    file = tmp_path / "predictions.jsonl"
    figures, predictions = run_benchmark(benchmark, lvlm.eval().image_text_model, predictions=file, limit=5)
    assert [json.loads(line) for line in file.read_text().splitlines()] == predictions
    assert len(predictions) == min(5, len(benchmark))
    again, _ = run_benchmark(benchmark, None, predictions=file, limit=5)  # no model is asked again
    assert again == figures
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values() if figure["value"])
