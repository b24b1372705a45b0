"""Advice on weights: its figures by hand, and the command on models that exist; on none, README's in test_docs.py."""

import json
import math

import pytest
from common.commands import advise as main
from common.models import small_lm, small_lvlm

from composer_prior.inference.advise import METHODS, advice_of, advise


def prediction(*tokens):
    """A caption of words (text, log P with the image, without it, P_r)."""
    text, ends = "", []
    for word, *_ in tokens:
        text += word
        ends.append(len(text))
    seen, blank, alone = zip(*(values for _, *values in tokens), strict=True)
    return {
        "caption": text,
        "ends": ends,
        "with_image": list(seen),
        "with_another": list(blank),
        "without": list(blank),
        "weights": [1 - p for p in alone],
        "related": None,
    }


CAPTION = prediction(
    ("a", math.log(0.9), math.log(0.9), 0.9),
    (" snail", math.log(0.8), math.log(0.1), 0.1),  # needs the image
    (" by", math.log(0.9), math.log(0.9), 0.9),
    (" Anna", math.log(0.02), math.log(0.02), 0.02),  # nothing foretells it
)


def test_the_figures():
    found = advice_of([CAPTION] * 6)
    assert (found.captions, found.tokens, found.share) == (6, 24, 0.25)
    assert found.viewer_nll == pytest.approx(-(2 * math.log(0.9) + math.log(0.8) + math.log(0.02)) / 4)
    assert found.reference_nll == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) + math.log(0.02)) / 4)
    plain, prior, _, gain = (found.methods[name] for name in METHODS)
    assert plain == pytest.approx(
        {"on_needed": 0.25, "on_predicted": 0.5, "precision": 0.25, "effective_sample_size": 1.0}
    )
    assert prior["on_needed"] == pytest.approx(0.9 / (0.1 + 0.9 + 0.1 + 0.98))
    assert prior["precision"] == 0.0  # the name is heavier than the snail
    weights = [0.1, 0.1 + 0.9 * (1 - 0.1 / 0.8), 0.1, 0.1]
    assert gain["on_needed"] == pytest.approx(weights[1] / sum(weights))
    assert gain["on_predicted"] == pytest.approx(0.2 / sum(weights))
    assert gain["precision"] == 1.0
    assert gain["effective_sample_size"] == pytest.approx(sum(weights) ** 2 / (4 * sum(w * w for w in weights)))
    assert found.favoured == ["anna"]
    reason = "0% of PRIOR's heaviest tokens and 100% of ImageGain's need the image"
    assert found.recommendation.startswith(f"ImageGain with floor=0.1: {reason}. Tokens")
    assert "get 75% of the weight instead of 25%, and those that the text predicts 17% instead of 50%." in str(found)
    assert "PRIOR favours words that the image does not explain: anna" in str(found)


def test_captions_that_the_image_does_not_explain():
    blind = prediction(("a", -0.1, -0.1, 0.9), (" snail", -2.0, -2.0, 0.1))
    found = advice_of([blind])
    assert found.share == 0
    assert found.recommendation.startswith("Next-token prediction is enough")


def test_a_viewer_that_knows_less_than_the_reference():
    worse = prediction(("a", -0.9, -0.9, 0.9), (" snail", -3.0, -9.0, 0.1))
    found = advice_of([worse])
    assert found.share == 0.5
    assert found.recommendation.startswith("Next-token prediction is enough")


def test_tokens_that_another_image_makes_likelier_are_chance():
    noisy = prediction(("a", -2.0, -0.1, 0.9), (" snail", -0.1, -2.0, 0.1))
    assert advice_of([noisy]).share == 0


def test_words_of_several_tokens_are_one_word():
    pieces = prediction(("by", -0.1, -0.1, 0.9), (" Ann", -4.0, -4.0, 0.02), ("elise", -4.0, -4.0, 0.02))
    assert advice_of([pieces] * 5).favoured == ["annelise"]


def test_captions_without_clutter():
    clear = prediction(("a", -0.1, -0.1, 0.9), (" snail", -0.2, -2.5, 0.1))
    assert advice_of([clear]).recommendation.startswith("PRIOR with floor=0.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "a"}, r"^Give reference= and viewer=, or neither"),
        ({"samples": 0}, r"^samples=0: expected at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        advise("nowhere", **options)


def test_models_that_exist(scenes, tokenizer, tmp_path, capsys):
    small_lm(tokenizer, seed=1).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    small_lvlm("patches", tokenizer, seed=2).image_text_model.save_pretrained(tmp_path / "viewer")
    models = [f"{name}={tmp_path / name}" for name in ("reference", "viewer")]
    main([str(scenes / "train"), *models, "samples=12", f"out={tmp_path / 'advice'}"])
    output = capsys.readouterr().out
    assert output.startswith("12 captions, ")
    assert all(name in output for name in METHODS)
    assert (tmp_path / "advice/advice.html").read_text().count("<figure") >= 1
    lines = (tmp_path / "advice/predictions.jsonl").read_text().splitlines()
    assert len(json.loads(lines[-1])["weights"]) > 1
