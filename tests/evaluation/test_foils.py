"""Foils in every published form, told by what a file holds."""

import pytest
from common.fakes import FakeModel, shade, write_image, write_json

from composer_prior.data.messages import DataError
from composer_prior.evaluation.benchmark import run_benchmark
from composer_prior.evaluation.foils import Foils

OWN = [
    {"image": f"{i}.png", "caption": f"true {i}", "foils": [f"false {i}", f"wrong {i}"], "category": "ab"[i % 2]}
    for i in range(4)
]


@pytest.fixture
def images(tmp_path):
    """Images 0 to 3 under all the names that the files of this test have for them."""
    for i in range(4):
        for name in (f"{i}.png", f"00000000000{i}.jpg", f"COCO_val2014_{i:012}.jpg", f"swig/{i}_swig.jpg"):
            write_image(tmp_path / "images" / name, i, (20, 10))
    return str(tmp_path / "images")


def sees(image, text, prompt):
    return -1.0 if f"true {shade(image)}" in text else -2.0


def figures(benchmark, score=sees):
    found, predictions = run_benchmark(benchmark, FakeModel(score=score))
    return {name: figure["value"] for name, figure in found.items()}, predictions


def sugarcrepe():
    return {
        str(i): {"filename": f"00000000000{i}.jpg", "caption": f"true {i}", "negative_caption": f"false {i}"}
        for i in range(4)
    }


def valse(votes=(3, 2, 1, 3)):
    return {
        f"test_{i}": {
            "image_file": f"{i}_swig.jpg",
            "caption": f"true {i}",
            "foil": f"false {i}",
            "linguistic_phenomena": "actions",
            "mturk": {"caption": vote, "foil": 3 - vote, "other": 0},
        }
        for i, vote in enumerate(votes)
    }


def foil_coco():
    annotations = []
    for i in range(4):
        common = {"id": 50 + i, "image_id": i}
        annotations += [
            {
                **common,
                "foil_id": 2 * i,
                "caption": f"true {i}",
                "foil": False,
                "target_word": "ORIG",
                "foil_word": "ORIG",
            },
            {
                **common,
                "foil_id": 2 * i + 1,
                "caption": f"false {i}",
                "foil": True,
                "target_word": "a",
                "foil_word": "b",
            },
        ]
    named = [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in range(4)]
    return {"images": named, "annotations": annotations, "info": {}, "licenses": []}


def aro(**more):
    return [
        {
            "image_path": f"{i}.png",
            "true_caption": f"true {i}",
            "false_caption": f"false {i}",
            "bbox_x": 2,
            "bbox_y": 1,
            "bbox_w": 12,
            "bbox_h": 5,
            **more,
        }
        for i in range(4)
    ]


FORMS = {
    "own": OWN,
    "sugarcrepe": sugarcrepe(),
    "valse": valse((3,) * 4),
    "foil": foil_coco(),
    "relation": aro(relation_name="behind"),
    "attribution": aro(attributes=["red", "big"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_oracle_is_always_right_and_a_model_that_sees_nothing_guesses(tmp_path, images, form):
    benchmark = Foils(
        data=write_json(tmp_path / "x.jsonl" if form == "own" else tmp_path / "x.json", FORMS[form]), images=images
    )
    assert len(benchmark) == 4
    found, predictions = figures(benchmark)
    chance = 1 / 3 if form == "own" else 1 / 2
    assert found["total"] == found["image_gain"] == 1
    assert found["total_shuffled"] == found["text_only"] == found["chance"] == pytest.approx(chance)
    assert [line["texts"][0] for line in predictions] == [f"true {i}" for i in range(4)]
    blind, _ = figures(benchmark, lambda image, text, prompt: 0.0)
    assert blind["total"] == blind["total_shuffled"] == pytest.approx(chance)


def test_categories_are_those_of_own_lines_or_the_names_of_several_files(tmp_path, images):
    own = Foils(data=write_json(tmp_path / "own.jsonl", OWN), images=images)
    found, _ = figures(own, lambda image, text, prompt: -1.0 if text in ("true 0", "true 2") else -1.5)
    assert (found["total"], found["total/a"], found["total/b"]) == (pytest.approx(2 / 3), 1, pytest.approx(1 / 3))
    write_json(tmp_path / "files" / "swap_att.json", sugarcrepe())
    write_json(tmp_path / "files" / "add_obj.json", sugarcrepe())
    found, _ = figures(Foils(data=str(tmp_path / "files"), images=images))
    assert found["total/swap_att"] == found["total/add_obj"] == 1


def test_images_of_aro_are_cut_to_their_box(tmp_path, images):
    data = write_json(tmp_path / "visual_genome_relation.json", aro(relation_name="behind"))
    assert Foils(data=data, images=images).choice(0).image.size == (12, 5)
    whole = Foils(data=write_json(tmp_path / "s.json", sugarcrepe()), images=images)
    assert whole.choice(0).image.size == (20, 10)


def test_aro_has_the_mean_of_its_relations(tmp_path, images):
    rows = aro()
    for row, relation in zip(rows, ("behind", "behind", "behind", "on"), strict=True):
        row["relation_name"] = relation
    benchmark = Foils(data=write_json(tmp_path / "r.json", rows), images=images)
    found, predictions = figures(
        benchmark, lambda image, text, prompt: -1.0 if text == "true 3" else -float(text[:4] == "true") - 2
    )
    assert found["total"] == 1 / 4
    assert found["total_macro"] == 1 / 2
    assert predictions[3]["group"] == "on"
    few, _ = figures(Foils(data=write_json(tmp_path / "a.json", aro(attributes=["red", "big"])), images=images))
    assert "total_macro" not in few, "fewer samples than those from which on a pair of attributes counts"


def test_only_validated_samples_of_valse_are_used_and_the_others_are_counted(tmp_path, images, capfd):
    benchmark = Foils(data=write_json(tmp_path / "actions.json", valse()), images=images)
    assert [sample.caption for sample in benchmark.samples] == ["true 0", "true 1", "true 3"]
    (line,) = capfd.readouterr().out.splitlines()
    assert "1 of 4 entries are left out (1 not validated by VALSE's annotators)" in line
    assert "actions.json, test_2: 1 of 3 annotators" in line


def test_another_image_takes_the_place_of_the_own_one_where_there_is_one(tmp_path, images):
    lines = [{**OWN[i // 4 % 2], "foil": f"f {i}"} for i in range(16)]  # half of 16 further on is the same image
    benchmark = Foils(data=write_json(tmp_path / "own.jsonl", lines), images=images)
    assert all(benchmark.samples[i].image != benchmark.samples[benchmark.other(i)].image for i in range(16))
    one = Foils(data=write_json(tmp_path / "one.jsonl", lines[:4]), images=images)
    assert [one.other(i) for i in range(4)] == [0, 1, 2, 3]
    found, _ = run_benchmark(one, FakeModel())
    assert (found["total_shuffled"]["value"], found["total"]["value"]) == (None, pytest.approx(1 / 3))


def test_nothing_is_left_out_without_a_word(tmp_path, images, capfd):
    bad = [
        {"image": "9.png", "caption": "c", "foils": ["f"]},
        {"image": "0.png", "caption": "c", "foils": []},
        {"image": "0.png", "caption": "c", "foils": ["f", " c "]},
        {"image": "0.png", "foils": ["f"]},
        {"image": "0.png", "caption": "c", "foils": [1]},
        7,
    ]
    assert len(Foils(data=write_json(tmp_path / "own.jsonl", OWN + bad), images=images)) == 4
    (line,) = capfd.readouterr().out.splitlines()
    assert "6 of 10 entries are left out" in line
    for reason in (
        "1 without their image",
        "2 without foils",
        "1 with a foil equal to the caption",
        "1 without caption",
    ):
        assert reason in line
    assert "the first is own.jsonl, entry 5: there is no 9.png in" in line
    with pytest.raises(DataError, match="none of its 6 entries can be used") as error:
        Foils(data=write_json(tmp_path / "bad.jsonl", bad), images=images)
    assert "\n" not in str(error.value)


def test_a_file_of_no_known_form_is_refused(tmp_path, images):
    for content in ({"a": {"b": 1}}, [1, 2], 3, {"images": [], "annotations": []}):
        with pytest.raises(DataError, match=r"x\.json"):
            Foils(data=write_json(tmp_path / "x.json", content), images=images)
    with pytest.raises(DataError, match=r"no such file \(\*.json, \*.jsonl\) in that folder"):
        Foils(data=images)


def test_a_name_that_stands_for_two_images_is_no_image(tmp_path, images, capfd):
    write_image(tmp_path / "images" / "vg" / "0_swig.jpg", 3)
    assert len(Foils(data=write_json(tmp_path / "v.json", valse((3,) * 4)), images=images)) == 3
    assert "1 with a name of several images" in capfd.readouterr().out


def test_an_image_that_does_not_decode_is_named(tmp_path, images):
    benchmark = Foils(data=write_json(tmp_path / "own.jsonl", OWN), images=images)
    (tmp_path / "images" / "1.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"1\.png cannot be read: HTML page"):
        figures(benchmark)
