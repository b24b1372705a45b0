from dataclasses import replace

import pytest
from PIL import Image

from composer_prior.emoji_scenes.captions import write_caption
from composer_prior.emoji_scenes.scenes import PlacedObject, Scene, draw_scene, sample_rng, sample_scene
from composer_prior.evaluation.scene_choices import SCENE
from tests.common.scene_oracle import SceneOracle, answers, falsehoods

SCENE_OF_THREE = Scene(
    96,
    "red",
    (226, 84, 76),
    (
        PlacedObject("snail", "small", 5, 5, 25),
        PlacedObject("snail", "small", 10, 60, 25),
        PlacedObject("owl", "large", 50, 50, 42),
    ),
)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_caption_of_the_data_set_is_true(split: str):
    for index in range(400):
        rng = sample_rng(split, index, 17)
        scene = sample_scene(split, rng)
        assert falsehoods(write_caption(scene, rng)[0], scene) == []


@pytest.mark.parametrize(
    ("text", "false"),
    [
        ("Two small snails left of a large owl, red backdrop", []),
        ("Two snails on a red background", []),
        ("Three drawings with an owl and two snails, by Lars Wolf", []),
        ("A small snail on a red background", ["a small snail"]),
        ("Two large snails, three drawings", ["two large snails"]),
        ("Two snails above an owl", ["above"]),
        ("Two snails right of an owl", ["right of"]),
        ("An owl left of two snails on a blue page", ["left of", "blue"]),
        ("Two drawings: two snails", ["two drawings"]),
        ("Four drawings, two snails, an owl and a fox", ["a fox", "four drawings"]),
        ("Two snails left of a fox", ["a fox", "left of"]),
    ],
)
def test_each_statement_is_checked_against_the_scene(text: str, false: list[str]):
    assert falsehoods(text, SCENE_OF_THREE) == false


def test_a_text_without_statements_is_refused():
    with pytest.raises(ValueError, match="No statement"):
        falsehoods("Stock photo, click to enlarge", SCENE_OF_THREE)
    with pytest.raises(ValueError, match="Not a question"):
        answers("Why?", "because", SCENE_OF_THREE)


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("Is there a snail?", {"yes"}),
        ("Is there an eggplant?", {"no"}),
        ("How many snails are there?", {"two"}),
        ("How many owls are there?", {"one"}),
        ("How many foxes are there?", {"no"}),
        ("Is the owl large or small?", {"large"}),
        ("Are the snails large or small?", {"small"}),
        ("What colour is the background?", {"red"}),
        ("Where are the snails, seen from the owl?", {"left"}),
        ("Where is the owl, seen from the snails?", {"right"}),
    ],
)
def test_answers_to_each_question(question: str, right: set[str]):
    given = {"yes", "no", "one", "two", "three", "large", "small", "red", "blue", "left", "right", "above", "below"}
    assert {answer for answer in given if answers(question, answer, SCENE_OF_THREE)} == right


def test_it_reads_the_scene_of_the_image_and_knows_nothing_without_one():
    picture, other, blank = draw_scene(SCENE_OF_THREE), draw_scene(SCENE_OF_THREE), Image.new("RGB", (8, 8))
    picture.info[SCENE] = SCENE_OF_THREE
    other.info[SCENE] = replace(SCENE_OF_THREE, colour="blue")
    texts = ["An owl, red backdrop", "An owl, blue backdrop"]
    found = SceneOracle().logprobs([picture, other, blank], [texts] * 3)
    best = [[one.values[0] == 0 for one in scores] for scores in found]
    assert best == [[True, False], [False, True], [True, True]]
    assert SceneOracle().generate_captions([picture, blank]) == ["two snails and an owl on a red background", ""]
    assert falsehoods(SceneOracle().generate_captions([picture])[0], SCENE_OF_THREE) == []
