"""Captions against references: every published form, known maxima, categories, and what is refused."""

import json

import numpy as np
import pytest
from common.data import tile, write_tiles
from common.fakes import FakeModel, shade, write_image, write_json
from streaming import MDSWriter

from composer_prior import registry
from composer_prior.data.messages import DataError
from composer_prior.data.streams import CheckedDataset
from composer_prior.evaluation.benchmark import reasons, run_benchmark
from composer_prior.evaluation.captioning import Captioning

TEXTS = ("a red cat sits on a mat", "two dogs run in the park", "one white bird above the sea")


def coco(folder, **more):
    """Annotations of three images, numbers 0 to 2."""
    images = [{"id": 10 + i, "file_name": f"COCO_val2014_{i:012}.jpg", **more.get("image", {})} for i in range(3)]
    for i, image in enumerate(images):
        write_image(folder / "val2014" / image["file_name"], i)
    annotations = [{"image_id": 10 + i, "id": i, "caption": text} for i, text in enumerate(TEXTS)]
    return {"images": images, "annotations": annotations}


def karpathy(folder, name="dataset_coco.json"):
    splits = ("train", "test", "test")
    images = []
    for i, (text, split) in enumerate(zip(TEXTS, splits, strict=True)):
        write_image(folder / "val2014" / f"{i}.jpg", i)
        place = {"filepath": "val2014", "cocoid": 10 + i} if "coco" in name else {}
        images.append({"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": text}], **place})
    return write_json(folder / name, {"images": images, "dataset": "coco"})


def figures(benchmark, caption=lambda image: TEXTS[shade(image)]):
    found, predictions = run_benchmark(benchmark, FakeModel(caption))
    return {name: figure["value"] for name, figure in found.items()}, predictions


def is_maximum(found):
    assert found["cider_d"] == pytest.approx(10)
    assert [found[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1] * 4)
    assert found["rouge_l"] == pytest.approx(1)


def test_captions_equal_to_their_references_score_the_maximum(tmp_path):
    data = write_json(tmp_path / "captions_val2014.json", coco(tmp_path))
    benchmark = Captioning(data=data)
    found, predictions = figures(benchmark)
    is_maximum(found)
    assert benchmark.details(predictions) == {"words": pytest.approx(19 / 3)}
    assert predictions[1]["references"] == [TEXTS[1]]
    wrong, _ = figures(benchmark, lambda image: TEXTS[(shade(image) + 1) % 3])
    assert wrong["cider_d"] < 1
    assert wrong["bleu_4"] < 1e-3


@pytest.mark.parametrize("name", ["dataset_coco.json", "dataset_flickr30k.json"])
def test_karpathys_splits(tmp_path, name):
    data = karpathy(tmp_path, name)
    benchmark = Captioning(data=data)
    assert [sample.references for sample in benchmark.images.samples] == [(TEXTS[1],), (TEXTS[2],)]
    is_maximum(figures(benchmark)[0])
    assert len(Captioning(data=data, split="train")) == 1
    with pytest.raises(DataError, match=r"split=val: .* has the splits test, train\."):
        Captioning(data=data, split="val")


def test_the_domains_of_nocaps_are_categories_with_documents_of_their_own(tmp_path):
    content = coco(tmp_path)
    for image, domain in zip(content["images"], ("in-domain", "out-domain", "out-domain"), strict=True):
        image["domain"] = domain
    benchmark = Captioning(data=write_json(tmp_path / "nocaps.json", content))
    found, _ = figures(benchmark)
    is_maximum(found)
    assert found["cider_d/out-domain"] == pytest.approx(10)
    assert found["cider_d/in-domain"] is None, "the words of the only image tell it from no other"
    assert found["bleu_4/in-domain"] == pytest.approx(1)
    mixed, _ = figures(benchmark, lambda image: TEXTS[0])
    assert (mixed["rouge_l/in-domain"], mixed["rouge_l/out-domain"] < 0.5) == (1, True)


@pytest.mark.parametrize("several", [False, True])
def test_an_mds_folder(tmp_path, several):
    write_tiles(tmp_path / "validation", 3, several=several)
    benchmark = Captioning(data=str(tmp_path), split="validation")

    def caption(image):
        return f"a tile of shade {image.getpixel((0, 0))[1]}" + " é☃" * (not several)

    found, predictions = figures(benchmark, caption)
    assert len(predictions[0]["references"]) == 1 + several
    assert (found["bleu_4"], found["rouge_l"]) == pytest.approx((1, 1))
    with pytest.raises(DataError, match=r"has no index.json; give split= validation"):
        Captioning(data=str(tmp_path))


def write_mds(folder, **options):
    """Three images with further columns; ``captions`` says more than ``caption``."""
    columns = {"image": "bytes", "caption": "str", "captions": "json", "score": "float32"}
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for number, text in enumerate(TEXTS):
            captions = [text, f"{text} again"]
            writer.write({"image": tile(number), "caption": text, "captions": captions, "score": np.float32(number)})
    return str(folder)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd:3"}], ids=["plain", "compressed"])
def test_an_mds_folder_with_further_columns_and_both_kinds_of_captions(tmp_path, options):
    benchmark = Captioning(data=write_mds(tmp_path, **options))
    assert [sample.references for sample in benchmark.images.samples] == [(text, f"{text} again") for text in TEXTS]
    assert benchmark.images.image(2).getpixel((0, 0)) == (40, 2, 60)


def test_of_an_mds_folder_the_captions_alone_are_read(tmp_path, monkeypatch):
    data = write_mds(tmp_path)
    monkeypatch.setattr(CheckedDataset, "get_item", lambda *_: pytest.fail("a whole sample is read"))
    assert len(Captioning(data=data)) == 3


def test_a_truncated_shard_is_an_error_and_no_sample_is_left_out(tmp_path):
    data = write_mds(tmp_path)
    (shard,) = tmp_path.glob("*.mds")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=rf"{shard} has {len(whole) - 40} bytes instead of {len(whole)}"):
        Captioning(data=data)
    shard.write_bytes(whole)
    benchmark = Captioning(data=data)
    shard.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=rf"{tmp_path}: sample 2 cannot be read"):
        benchmark.images.image(2)


def test_document_frequencies_are_those_of_all_images_where_only_the_first_are_captioned(tmp_path):
    benchmark = Captioning(data=write_json(tmp_path / "captions.json", coco(tmp_path)))
    found, _ = run_benchmark(benchmark, FakeModel(lambda image: TEXTS[0]), limit=1)
    assert found["cider_d"]["value"] == pytest.approx(10)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[:1] * 3, ["."]], ids=["one image", "alike", "no words"])
def test_cider_that_tells_no_image_from_another_is_undefined(tmp_path, texts):
    content = coco(tmp_path)
    content["images"] = content["images"][: len(texts)]
    for one, text in zip(content["annotations"], texts, strict=False):
        one["caption"] = text
    benchmark = Captioning(data=write_json(tmp_path / "captions.json", content))
    found, _ = run_benchmark(benchmark, FakeModel(lambda image: texts[0]))
    assert found["cider_d"] == {"value": None, "low": None, "high": None}
    assert reasons(benchmark, found) == {"cider_d": "no n-gram of the references tells one image from another"}
    if texts[0] == TEXTS[0]:
        assert [found[name]["value"] for name in ("bleu_1", "bleu_4", "rouge_l")] == pytest.approx([1, 1, 1])


def test_the_interval_of_a_category_is_that_of_its_own_images(tmp_path):
    """Resamples without any image of a category say nothing of it; of one image there is no interval."""
    content = coco(tmp_path)
    for image, domain in zip(content["images"], ("in-domain", "out-domain", "out-domain"), strict=True):
        image["domain"] = domain
    benchmark = Captioning(data=write_json(tmp_path / "nocaps.json", content))
    found, _ = run_benchmark(benchmark, FakeModel(lambda image: TEXTS[shade(image)]))
    assert found["bleu_4/in-domain"] == {"value": pytest.approx(1), "low": None, "high": None}
    assert [found["bleu_4/out-domain"][bound] for bound in ("low", "high")] == pytest.approx([1, 1])


def test_what_cannot_be_used_is_counted_and_named(tmp_path, capfd):
    content = coco(tmp_path)
    (tmp_path / "val2014" / content["images"][1]["file_name"]).unlink()
    del content["annotations"][0]
    benchmark = Captioning(data=write_json(tmp_path / "captions.json", content))
    assert len(benchmark) == 1
    (line,) = capfd.readouterr().out.splitlines()
    assert "2 of 3 entries are left out (1 without a caption, 1 without their image)" in line
    assert "captions.json, entry 1" in line
    content["annotations"] = content["annotations"][:1]
    with pytest.raises(DataError, match="none of its 3 entries can be used"):
        Captioning(data=write_json(tmp_path / "captions.json", content))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "is empty"),
        ("{", "it is no JSON"),
        ('{"a": 1}\n{"b"', "line 2 is no JSON"),
        ('{"images": [], "annotations": []}', "expected images and their captions"),
        ('{"images": [{"id": 1}], "annotations": [{"bbox": 1}]}', "expected images and their captions"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(tmp_path, written, message):
    file = tmp_path / "captions.json"
    file.write_text(written)
    with pytest.raises(DataError, match=message) as error:
        Captioning(data=str(file))
    assert "\n" not in str(error.value)
    assert "captions.json" in str(error.value)


def test_options_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens=0: expected int of at least 1"):
        registry.check("benchmark", "captioning", {"data": "x", "max_new_tokens": 0}, "benchmarks.captioning")
    with pytest.raises(ValueError, match="max_new_tokens=0: expected int of at least 1"):
        Captioning(data="x", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"benchmarks\.captioning needs data"):
        registry.check("benchmark", "captioning", {}, "benchmarks.captioning")
    with pytest.raises(DataError, match="there is no such file"):
        registry.build("benchmark", "captioning", {"data": str(tmp_path / "no.json")}, "benchmarks.captioning")


def test_the_fingerprint_is_that_of_the_samples(tmp_path):
    content = coco(tmp_path)
    first, again = (Captioning(data=write_json(tmp_path / name, content)).fingerprint for name in ("a.json", "b.json"))
    content["annotations"][0]["caption"] += "!"
    assert first == again
    assert first != Captioning(data=write_json(tmp_path / "a.json", content)).fingerprint
    assert json.dumps(first)
