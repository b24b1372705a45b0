"""Yes and no: figures by hand, the level of a model that sees nothing, and what is left out."""

import pytest
from common.fakes import FakeModel, shade, write_image, write_json

from composer_prior import registry
from composer_prior.data.messages import DataError
from composer_prior.evaluation.benchmark import run_benchmark
from composer_prior.evaluation.pope import Pope

OBJECTS = ("cat", "dog", "bird", "bus")  # image i shows object i


def questions(folder, name="coco_pope_random.json", wrong=1):
    """Of each image whether its own object is there, and another one."""
    lines = []
    for i, own in enumerate(OBJECTS):
        write_image(folder / f"{i}.jpg", i)
        for thing, label in ((own, "yes"), (OBJECTS[(i + wrong) % 4], "no")):
            text = f"Is there a {thing} in the image?"
            lines.append({"question_id": len(lines) + 1, "image": f"{i}.jpg", "text": text, "label": label})
    write_json(folder / "lines.jsonl", lines)
    (folder / "lines.jsonl").rename(folder / name)  # JSON Lines under the name that POPE gives them
    return str(folder / name)


def sees(image, text, prompt):
    there = shade(image) < 4 and OBJECTS[shade(image)] in prompt
    return -0.1 if (text == "yes") == there else -2.0


def figures(benchmark, score):
    found, predictions = run_benchmark(benchmark, FakeModel(score=score))
    return {name: figure["value"] for name, figure in found.items()}, predictions


def test_a_model_that_sees_is_right_and_with_other_images_it_is_not(tmp_path):
    found, predictions = figures(Pope(data=questions(tmp_path)), sees)
    assert [found[name] for name in ("accuracy", "precision", "recall", "f1", "yes")] == [1, 1, 1, 1, 0.5]
    assert found["total_shuffled"] < 1
    assert found["text_only"] == 0.5, "without an image it always says no"
    assert predictions[0]["label"] == "yes"
    assert predictions[0]["question"] == "Is there a cat in the image?"
    assert predictions[0]["texts"] == ["yes", "no"]


def test_figures_by_hand(tmp_path):
    def says_yes_of(image, text, prompt):  # right of cat, bird and bus; wrongly yes of the second question of image 0
        yes = ("cat" in prompt) or (shade(image) == 0) or (shade(image) in (2, 3) and OBJECTS[shade(image)] in prompt)
        return 0.0 if (text == "yes") == yes else -1.0

    found, _ = figures(Pope(data=questions(tmp_path)), says_yes_of)
    # yes to: cat, dog (image 0), bird (2), bus (3), cat (3): 3 right of 5, and of 4 that are there 3
    assert found["yes"] == pytest.approx(5 / 8)
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(2 * 3 / (5 + 4))
    assert found["accuracy"] == pytest.approx(5 / 8)


def test_a_model_that_ignores_the_image_stands_at_the_level_of_text_alone(tmp_path):
    found, _ = figures(Pope(data=questions(tmp_path)), lambda image, text, prompt: float(text == "yes"))
    assert found["accuracy"] == found["total_shuffled"] == found["text_only"] == found["image_gain"] == 0.5
    assert (found["yes"], found["recall"], found["precision"]) == (1, 1, 0.5)
    tied, _ = figures(Pope(data=questions(tmp_path)), lambda image, text, prompt: 0.0)
    assert (tied["accuracy"], tied["yes"]) == (0.5, 0.5)


def test_each_of_several_files_has_figures_of_its_own(tmp_path):
    for name in ("random", "popular"):
        questions(tmp_path, f"coco_pope_{name}.json", wrong=1 if name == "random" else 2)
    benchmark = Pope(data=str(tmp_path))
    assert len(benchmark) == 16
    assert all(benchmark.samples[i].image != benchmark.samples[benchmark.other(i)].image for i in range(16))
    found, _ = figures(benchmark, sees)
    assert found["f1/coco_pope_random"] == found["f1/coco_pope_popular"] == found["accuracy"] == 1


def test_answers_and_prompt_are_spelled_as_asked_for(tmp_path):
    data = questions(tmp_path)
    benchmark = Pope(data=data, answers="Yes, No", prompt="Q: {question} A:")
    choice = benchmark.choice(1)
    assert choice.texts == ("No", "Yes")
    assert choice.prompt == "Q: Is there a dog in the image? A:"
    for options in ({"answers": "yes"}, {"answers": "yes,no,maybe"}, {"prompt": "Q:"}):
        with pytest.raises(ValueError, match="expected"):
            registry.build("benchmark", "pope", {"data": "nowhere", **options}, "benchmarks.pope")


def test_lines_without_image_or_label_are_counted_and_named(tmp_path, capfd):
    file = questions(tmp_path)
    with open(file, "a") as lines:
        lines.write(
            '{"image": "9.jpg", "text": "Is there?", "label": "yes"}\n{"image": "0.jpg", "text": "Is there?"}\n'
        )
        lines.write('{"image": "0.jpg", "text": "Is there?", "label": "maybe"}\n')
    assert len(Pope(data=file)) == 8
    (line,) = capfd.readouterr().out.splitlines()
    assert "3 of 11 entries are left out" in line
    assert "entry 9: there is no 9.jpg in" in line
    with pytest.raises(DataError, match=r"images=.*nowhere: there is no such folder"):
        Pope(data=file, images=str(tmp_path / "nowhere"))
