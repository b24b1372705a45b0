"""What a model takes from the image: on models whose answer is known, and data that know what the image determines."""

import numpy as np
import pytest
from common.judged import Blind
from common.models import small_lm, small_lvlm
from PIL import Image

from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.evaluation.benchmark import run_benchmark
from composer_prior.evaluation.image_dependence import ImageDependence
from composer_prior.models.reference import ReferenceLM


class Sees(Blind):
    """Finds letters of related spans more likely by 2 nats with their own image, and less likely by 1 with another."""

    def __init__(self, samples):
        self.spans = {sample.captions[0]: (sample.image.tobytes(), sample.spans) for sample in samples}

    def logprobs(self, images, texts, prompt=None, end=True):
        scores = super().logprobs(images, texts, prompt, end)
        for image, (score,), (text,) in zip(images, scores, texts, strict=True):
            own, spans = self.spans[text]
            if len(set(Image.Image.getdata(image))) == 1:
                continue  # without an image
            change = 2.0 if image.tobytes() == own else -1.0
            for start, end_ in spans:
                for place in range(start, end_):
                    score.values[place] += change
        return scores


@pytest.fixture(scope="module")
def benchmark(scenes, tokenizer, tmp_path_factory):
    reference = tmp_path_factory.mktemp("reference")
    small_lm(tokenizer).save_pretrained(reference)
    tokenizer.save_pretrained(reference)
    return ImageDependence(str(scenes / "validation"), str(reference))


def values(figures):
    return {name: one["value"] for name, one in figures.items()}


def test_what_the_image_determines_is_told_from_the_rest(benchmark):
    figures, predictions = run_benchmark(benchmark, Sees([benchmark.samples[i] for i in range(24)]))
    found = values(figures)
    assert found["dependence_related"] == pytest.approx(2.0)
    assert found["dependence_other"] == pytest.approx(0.0)
    assert found["precision_of_dependence"] == 1.0
    related = np.concatenate([prediction["related"] for prediction in predictions])
    assert found["dependence"] == pytest.approx(2 * related.mean())
    assert found["dependence_shuffled"] == pytest.approx(-related.mean())
    assert found["own_minus_another"] == pytest.approx(3 * related.mean())
    words = {one["word"]: one["dependence"] for one in benchmark.details(predictions)["words"]}
    assert words["background"] == pytest.approx(0.0)
    assert words["small"] == pytest.approx(10.0)  # five letters of two nats


def test_who_ignores_the_image_takes_nothing_from_it(benchmark):
    found = values(run_benchmark(benchmark, Blind())[0])
    assert found["dependence"] == found["dependence_shuffled"] == found["own_minus_another"] == 0.0
    assert "rank_correlation" not in found  # nothing to rank


def test_weights_are_those_of_the_reference(benchmark, scenes, tokenizer, tmp_path):
    model = small_lvlm("patches", tokenizer).eval().image_text_model
    figures, predictions = run_benchmark(benchmark, model)
    reference = ReferenceLM(small_lm(tokenizer), tokenizer)
    data = StreamingCaptionDataset(
        tokenizer=tokenizer, image_processor=None, batch_size=1, local=str(scenes / "validation")
    )
    for number in (0, 11, 23):
        sample = data[number]
        labels, mask = sample["labels"][None], (sample["labels"] != -100)[None]
        logprobs = reference.logprobs(sample["input_ids"][None], mask | True, labels)[mask]
        assert predictions[number]["weights"] == pytest.approx((1 - logprobs.exp()).tolist(), abs=1e-5)
        assert predictions[number]["related"] == sample["image_related"][mask[0]].tolist()
    found = values(figures)
    assert -1 <= found["rank_correlation"] <= 1
    assert 0 < found["precision_of_chance"] < 1
    page = benchmark.page(predictions, "<title>")
    assert "&lt;title&gt;" in page
    assert page.count("<figure>") == 24
