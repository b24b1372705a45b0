"""CHAIR by hand, objects found as whole words, and where true objects come from."""

import pytest
from common.fakes import FakeModel, shade, write_image, write_json
from hypothesis import given
from hypothesis import strategies as st

from composer_prior.data.messages import DataError
from composer_prior.emoji_scenes.captions import plural, write_caption
from composer_prior.emoji_scenes.scenes import CLASSES, sample_rng, sample_scene
from composer_prior.evaluation.benchmark import run_benchmark
from composer_prior.evaluation.hallucination import Hallucination, Vocabulary, read_synonyms

SYNONYMS = """\
person, man, woman, child, people
dog, puppy
hot dog
bird, duck

train
cup
"""


@pytest.fixture
def objects(tmp_path):
    (tmp_path / "objects.txt").write_text(SYNONYMS)
    return str(tmp_path / "objects.txt")


def annotations(folder, captions):
    """COCO's annotations of images 0, 1, ... with these references."""
    names = [f"{i}.jpg" for i in range(len(captions))]
    for i, name in enumerate(names):
        write_image(folder / name, i)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    return write_json(
        folder / "captions.json",
        {"images": images, "annotations": [{"image_id": i, "caption": c} for i, c in enumerate(captions)]},
    )


def figures(benchmark, captions):
    found, predictions = run_benchmark(benchmark, FakeModel(lambda image: captions[shade(image)]))
    return {name: figure["value"] for name, figure in found.items()}, predictions


def test_what_there_is_nothing_to_divide_by_has_no_value(tmp_path, objects):
    benchmark = Hallucination(data=annotations(tmp_path, ["a dog"]), objects=objects)
    found, _ = figures(benchmark, ["a dog"])
    others = {"precision_shuffled": None, "recall_shuffled": None}  # there is no other image
    assert found == {"chair_i": 0, "chair_s": 0, "recall": 1, "precision": 1, "all_right": 1, **others}


def test_chair_by_hand(tmp_path, objects):
    data = annotations(tmp_path, ["a man and a dog", "two ducks", "a cup", "a train and a puppy"])
    captions = [
        "a woman walks her dog",  # all right
        "a bird, a cup and another cup",  # two mentions of a cup that is not there
        "a table",  # names nothing
        "a train",  # misses the dog
    ]
    found, predictions = figures(Hallucination(data=data, objects=objects), captions)
    assert [line["named"] for line in predictions] == [["person", "dog"], ["bird", "cup", "cup"], [], ["train"]]
    assert [line["there"] for line in predictions] == [["dog", "person"], ["bird"], ["cup"], ["dog", "train"]]
    assert found["chair_i"] == pytest.approx(2 / 6)
    assert found["chair_s"] == pytest.approx(1 / 4)
    assert found["recall"] == pytest.approx(4 / 6)
    assert found["precision"] == pytest.approx(4 / 5)
    assert found["all_right"] == pytest.approx(1 / 4)


def test_a_caption_equal_to_its_reference_is_all_right_and_one_that_says_nothing_has_no_chair(tmp_path, objects):
    texts = ["a man and a dog", "two ducks"]
    benchmark = Hallucination(data=annotations(tmp_path, texts), objects=objects)
    right, _ = figures(benchmark, texts)
    shuffled = {"recall_shuffled": 0, "precision_shuffled": 0}  # the other image shows other objects
    assert right == {"chair_i": 0, "chair_s": 0, "recall": 1, "precision": 1, "all_right": 1, **shuffled}
    silent, _ = figures(benchmark, ["", ""])
    nothing = {"chair_i": None, "precision": None, "precision_shuffled": None}
    assert silent == {"chair_s": 0, "recall": 0, "all_right": 0, "recall_shuffled": 0, **nothing}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A HOT-DOG, hot  dogs and a dog.", ["hot dog", "hot dog", "dog"]),
        ("doghouse hotdog dogma", []),
        ("children, women, men, people's puppies", ["person"] * 4 + ["dog"]),
        ("a baby bird by the train tracks", ["bird"]),
        ("a passenger train", ["train"]),
        ("", []),
    ],
)
def test_objects_are_found_as_whole_words_the_longest_first(objects, text, names):
    assert read_synonyms(objects).find(text) == names


@given(st.lists(st.sampled_from(CLASSES), max_size=6))
def test_every_class_is_found_by_its_name_and_its_plural(names):
    vocabulary = Vocabulary(dict.fromkeys(CLASSES, ()))
    assert vocabulary.find(", ".join(names)) == names
    assert vocabulary.find(" | ".join(f"two {plural(name)}" for name in names)) == names


def test_captions_of_emoji_scenes_name_just_the_classes_of_the_scene():
    vocabulary = Vocabulary(dict.fromkeys(CLASSES, ()))
    for index in range(500):
        rng = sample_rng("validation", index, 17)
        scene = sample_scene("validation", rng)
        caption, _ = write_caption(scene, rng)
        assert sorted(vocabulary.find(caption)) == sorted(scene.groups), caption


def test_emoji_scenes_need_no_list(scenes):
    benchmark = Hallucination(data=str(scenes), split="validation")
    texts = iter([sample.references[0] for sample in benchmark.images.samples])
    found, predictions = run_benchmark(benchmark, FakeModel(lambda image: next(texts)))
    assert len(predictions) == 24
    assert found["all_right"]["value"] == found["recall"]["value"] == 1
    assert found["chair_i"]["value"] == 0


def test_objects_of_instances_join_those_of_the_references_or_stand_alone(tmp_path, objects, capfd):
    data = annotations(tmp_path, ["a man", "a thing"])
    instances = write_json(
        tmp_path / "instances.json",
        {
            "images": [{"id": 0}, {"id": 1}],
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "toaster"}],
            "annotations": [{"image_id": i, "category_id": c} for i, c in ((0, 1), (0, 1), (1, 1), (1, 2))],
        },
    )
    assert Hallucination(data=data, objects=objects, instances=instances).there == [["dog", "person"], ["dog"]]
    assert (
        "1 of 2 categories are not among the objects and count for nothing, such as toaster" in capfd.readouterr().out
    )
    alone = Hallucination(data=data, objects=objects, instances=instances, references=False)
    assert alone.there == [["dog"], ["dog"]]
    other = write_json(tmp_path / "other.json", {"images": [{"id": 0}], "categories": [], "annotations": []})
    with pytest.raises(DataError, match=r"1 of 2 images are not in it, such as 1\.jpg"):
        Hallucination(data=data, objects=objects, instances=other)


def test_what_says_nothing_about_objects_is_refused(tmp_path, objects):
    data = annotations(tmp_path, ["a thing", "another thing"])
    with pytest.raises(DataError, match=r"0\.jpg do not name a class of the emoji scenes; give a fitting list"):
        Hallucination(data=data)
    with pytest.raises(DataError, match="do not name an object of the list"):
        Hallucination(data=data, objects=objects)
    with pytest.raises(ValueError, match="give instances="):
        Hallucination(data=data, objects=objects, references=False)
    with pytest.raises(ValueError, match="max_new_tokens=0: expected int of at least 1"):
        Hallucination(data=data, objects=objects, max_new_tokens=0)
    (tmp_path / "bad.txt").write_text("dog\n, puppy\n")
    with pytest.raises(DataError, match=r"bad\.txt, line 2"):
        Hallucination(data=data, objects=str(tmp_path / "bad.txt"))
    with pytest.raises(DataError, match=r"objects=.*none\.txt cannot be read"):  # before any data
        Hallucination(data=str(tmp_path / "no.json"), objects=str(tmp_path / "none.txt"))
