"""ImageGain: its weights against float64, a live viewer against a stored one, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.models import small_lm, small_lvlm
from common.training import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from composer_prior import PRIOR, ReferenceLM, importance_weights
from composer_prior.algorithms.image_gain.image_gain import ImageGain
from composer_prior.algorithms.image_gain.weights import gain_weights, raw_weights
from composer_prior.algorithms.vig.vig import VIG
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import BadSampleError, StreamingCaptionDataset
from composer_prior.data.mds import read_column
from composer_prior.data.scores import Scores, ScoresError
from composer_prior.data.tokenizer import image_token_ids, train_tokenizer
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.viewer import Viewer
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.score import score_beside_images, score_captions

LOGPROBS = st.floats(-30, 0, width=32)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(LOGPROBS, LOGPROBS, st.booleans()), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.sampled_from(["sequence", "batch", "none"]),
)
def test_the_weights_are_those_of_a_loop(tokens, alpha, floor, normalization):
    viewer, reference, mask = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    raw = []
    for p_v, p_r, m in tokens:
        gain = -math.expm1(p_r - max(p_r, p_v))
        raw.append((floor + (1 - floor) * gain**alpha) if m else 0.0)
    total, count = sum(raw), sum(m for *_, m in tokens)
    scale = 1.0 if normalization == "none" else count / total if total > 0 else None
    expected = [1.0 * m if scale is None else w * scale for w, (*_, m) in zip(raw, tokens, strict=True)]
    found = gain_weights(viewer, reference, mask, alpha, normalization, floor)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_a_viewer_that_knows_everything_gives_priors_weights():
    mask = torch.tensor([[True, True, False]])
    reference = torch.tensor([[-0.1, -3.0, 0.0]])
    found = gain_weights(torch.zeros(1, 3), reference, mask, floor=0.2)
    assert torch.equal(found, importance_weights(reference, mask, floor=0.2))


def test_a_viewer_that_sees_nothing_gives_next_token_prediction():
    mask, reference = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[-0.1, -3.0, -torch.inf]])
    assert torch.equal(gain_weights(reference, reference, mask, floor=0.1), torch.ones(1, 3))
    assert torch.equal(raw_weights(reference - 1.0, reference, mask, 1.0, 0.1), torch.full((1, 3), 0.1))


@pytest.mark.parametrize("bad", [math.nan, 0.5])
def test_log_probabilities_that_are_none_are_refused(bad):
    logprobs, mask = torch.tensor([[-1.0, bad]]), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^1 viewer log-probabilities are NaN or positive, the first at row 0"):
        gain_weights(logprobs, torch.full((1, 2), -1.0), mask)
    with pytest.raises(ValueError, match=r"^1 reference log-probabilities are NaN or positive"):
        gain_weights(torch.full((1, 2), -1.0), logprobs, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": "me"}, "over='me': expected 'reference' or 'model'"),
        ({"over": "model", "reference": small_lm}, "over='model' compares with the trained model itself"),
        ({"over": "model", "normalization": "batch"}, "normalization='batch' needs weights before the forward pass"),
        ({"floor": 1.0}, r"floor=1\.0"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        ImageGain(**arguments)
    assert "\n" not in str(error.value)


# the algorithm --------------------------------------------------------------------------------------------------------


def viewer_of(family: str, tokenizer: Any, seed: int = 5) -> ImageTextModel:
    return small_lvlm(family, tokenizer, seed).image_text_model


def expected_loss(model: Any, batch: Any, weights: torch.Tensor) -> float:
    with torch.no_grad():
        nll = model.eval()(batch)["nll"]
    model.train()
    return float((nll * weights).sum() / (batch["labels"] != IGNORE_INDEX).sum())


@pytest.mark.parametrize("family", ["encoder", "patches"])
@pytest.mark.parametrize("microbatch", [8, 3])
def test_a_live_viewer(family, microbatch, tokenizer, make_spec, make_batch, reference):
    model, viewer = small_lvlm(family, tokenizer), viewer_of(family, tokenizer)
    batch = make_batch(model)
    mask = batch["labels"] != IGNORE_INDEX
    theirs = Viewer(viewer, batch_size=3).logprobs(batch)
    image_ids = image_token_ids(tokenizer)
    text = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], image_ids)
    weights = gain_weights(theirs, text, mask, alpha=2.0, floor=0.2)
    expected = expected_loss(model, batch, weights)
    algorithm = ImageGain(viewer, reference, alpha=2.0, floor=0.2)
    _, logged = fit(model, make_spec(model), [algorithm], device_train_microbatch_size=microbatch)
    assert float(logged["loss/train/total"][0][1]) == pytest.approx(expected, rel=1e-5)
    assert logged["image_gain/viewer_nll"][0][1] == pytest.approx(float(-theirs[mask].mean()), rel=1e-5)
    assert {"image_gain/reference_nll", "image_gain/effective_sample_size"} <= {*logged}


@pytest.mark.parametrize("microbatch", [8, 3])
def test_vig(microbatch, tokenizer, make_spec, make_batch, reference):
    model, viewer = small_lvlm("patches", tokenizer), viewer_of("patches", tokenizer)
    batch = make_batch(model)
    mask = batch["labels"] != IGNORE_INDEX
    text = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], image_token_ids(tokenizer))
    gains = Viewer(viewer).logprobs(batch) - text
    means = [float(row[keep].double().mean()) for row, keep in zip(gains, mask, strict=True)]
    least = sorted(means)[2]  # of eight captions, six are the first 70 %, rounded up
    weights = mask & (gains >= least) & (torch.tensor(means) >= least)[:, None]
    assert weights.any(1).sum() == 6
    expected = expected_loss(model, batch, weights * (mask.sum() / weights.sum()))
    algorithm = VIG(viewer, reference)
    _, logged = fit(model, make_spec(model), [algorithm], device_train_microbatch_size=microbatch)
    assert float(logged["loss/train/total"][0][1]) == pytest.approx(expected, rel=1e-5)
    assert {"vig/viewer_nll", "vig/reference_nll", "vig/effective_sample_size"} <= {*logged}


def test_over_the_model_itself(tokenizer, make_spec, make_batch):
    model, viewer = small_lvlm("patches", tokenizer), viewer_of("patches", tokenizer)
    batch = make_batch(model)
    mask = batch["labels"] != IGNORE_INDEX
    with torch.no_grad():
        own = -model.eval()(batch)["nll"]
    weights = gain_weights(Viewer(viewer).logprobs(batch), own, mask)
    expected = expected_loss(model, batch, weights)
    _, logged = fit(model, make_spec(model), [ImageGain(viewer, over="model")])
    assert float(logged["loss/train/total"][0][1]) == pytest.approx(expected, rel=1e-5)
    assert "image_gain/reference_nll" not in logged


def test_the_viewer_is_not_trained_or_saved(tokenizer, make_spec, reference):
    model, viewer = small_lvlm("patches", tokenizer), viewer_of("patches", tokenizer)
    before = {key: value.clone() for key, value in viewer.model.state_dict().items()}
    algorithm = ImageGain(viewer, reference)
    fit(model, make_spec(model), [algorithm], duration="2ba")
    assert all(torch.equal(value, before[key]) for key, value in viewer.model.state_dict().items())
    assert not algorithm.viewer.model.training
    assert "viewer" not in algorithm.state_dict()


@pytest.mark.parametrize(
    ("viewer", "message"),
    [
        (lambda tokenizer: viewer_of("encoder", tokenizer), "The viewer has another image_processor than the model"),
        (
            lambda _: viewer_of("patches", train_tokenizer(["a snail"] * 9, 300)),
            "The viewer has another tokenizer than the model",
        ),
        (lambda _: None, "ImageGain found neither `viewer_logprobs` in the batch nor a viewer"),
    ],
)
def test_viewers_that_cannot_read_the_batch_are_refused(tokenizer, make_spec, reference, viewer, message):
    model = small_lvlm("patches", tokenizer)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        fit(model, make_spec(model), [ImageGain(viewer(tokenizer), reference)])
    assert "\n" not in str(error.value)


# stored scores --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A viewer's folder, with the tokenizer of the captions beside it."""
    folder = tmp_path_factory.mktemp("viewer")
    viewer_of("patches", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def job_of(saved: Path, data: Path, out: Path, **dataset: Any) -> ScoreJob:
    return ScoreJob(
        str(out),
        viewer=str(saved / "model"),
        tokenizer={"name": str(saved / "tokenizer")},
        dataset={"local": str(data), "max_caption_tokens": 20, **dataset},
        unit_samples=20,
        progress_bar=False,
    )


def test_stored_scores_are_those_of_a_live_viewer(saved, tokenizer, scenes, tmp_path, make_spec, reference):
    summary = score_captions(job_of(saved, scenes / "train", tmp_path / "scores"))
    assert (summary.samples, summary.skipped, summary.reused) == (96, 0, False)
    assert Scores(str(tmp_path / "scores"), tmp_path).metadata.column == "viewer_logprobs"
    model = small_lvlm("patches", tokenizer)
    batch = next(iter(make_spec(model, viewer_scores=str(tmp_path / "scores"), max_caption_tokens=20).dataloader))
    live = Viewer.of(str(saved / "model")).logprobs(batch)
    torch.testing.assert_close(batch["viewer_logprobs"], live, rtol=2**-11, atol=1e-4)
    losses = []
    for viewer, scores in ((str(saved / "model"), None), (None, str(tmp_path / "scores"))):
        model = small_lvlm("patches", tokenizer)
        spec = make_spec(model, max_caption_tokens=20, shuffle=True, viewer_scores=scores)
        _, logged = fit(model, spec, [ImageGain(viewer, reference)], duration="4ba")
        losses.append([float(value) for _, value in logged["loss/train/total"]])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3)  # stored as float16
    assert score_captions(job_of(saved, scenes / "train", tmp_path / "scores")).reused


def test_another_image_processing_is_another_viewer(saved, scenes, tmp_path):
    copy = tmp_path / "viewer"
    shutil.copytree(saved, copy)
    score_captions(job_of(copy, scenes / "validation", tmp_path / "scores"))
    file = copy / "model/preprocessor_config.json"
    if not file.exists():  # transformers 5 keeps it in the file of the whole processor
        file = copy / "model/processor_config.json"
    settings = json.loads(file.read_text())
    settings.get("image_processor", settings)["vision"]["max_side"] = 64
    file.write_text(json.dumps(settings))
    with pytest.raises(ScoresError, match="what differs: the viewer's config"):
        score_captions(job_of(copy, scenes / "validation", tmp_path / "scores"))


def test_scores_of_a_viewer_are_not_a_references(saved, scenes, tmp_path, tokenizer):
    score_captions(job_of(saved, scenes / "validation", tmp_path / "scores"))
    with pytest.raises(ScoresError, match=r"column \('viewer_logprobs' there, 'ref_logprobs' here\)"):
        StreamingCaptionDataset(
            local=str(scenes / "validation"),
            tokenizer=tokenizer,
            batch_size=1,
            max_caption_tokens=20,
            scores=str(tmp_path / "scores"),
        )


def test_a_killed_job_goes_on_with_the_missing_units(saved, scenes, tmp_path):
    whole, cut = job_of(saved, scenes / "train", tmp_path / "a"), job_of(saved, scenes / "train", tmp_path / "b")
    score_captions(whole)
    score_captions(cut)
    for name in ("index.json", "shard.00002.000.mds"):
        (tmp_path / "b" / name).unlink()
    assert score_captions(cut).samples == 20
    found, expected = (Scores(str(tmp_path / name), tmp_path) for name in "ab")
    for i in range(96):
        np.testing.assert_array_equal(found[i], expected[i])


def test_an_image_that_does_not_decode(saved, tmp_path, tokenizer):
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "data"), columns={"image": "bytes", "caption": "str"}) as writer:
        writer.write({"image": b"no image", "caption": "a snail"})
        writer.write({"image": b"no image", "caption": "a fox"})
    with pytest.raises(BadSampleError, match=r"^sample 0 \(number 0 of .*: the image cannot be decoded"):
        score_captions(job_of(saved, tmp_path / "data", tmp_path / "scores"))
    summary = score_captions(job_of(saved, tmp_path / "data", tmp_path / "skipped", on_bad_sample="skip"))
    assert (summary.samples, summary.skipped) == (2, 2)


def test_a_viewer_of_another_tokenizer_is_read_by_characters(tokenizer, scenes):
    data = StreamingCaptionDataset(
        local=str(scenes / "train"), tokenizer=tokenizer, batch_size=1, max_caption_tokens=500
    )
    captions = read_column(data, "caption", range(4))
    images = [data.image_and_caption(i)[0] for i in range(4)]
    stranger = viewer_of("patches", train_tokenizer([*captions, "a snail"], 400))
    scores = score_beside_images(images, captions, data.format, stranger)
    for image, caption, values in zip(images, captions, scores, strict=True):
        ((own,),) = stranger.logprobs([image], [[caption]])
        assert len(values) == len(tokenizer(caption, add_special_tokens=False)["input_ids"]) + 1
        assert float(values.sum()) == pytest.approx(sum(own.values), abs=1e-3)  # no probability is lost
        assert float(values[-1]) == pytest.approx(own.values[-1], abs=1e-4)


def test_the_prompt_is_that_of_the_viewers_training(tokenizer, scenes):
    viewer = viewer_of("patches", tokenizer)
    viewer.processor.prompt = "look: "
    data = StreamingCaptionDataset(local=str(scenes / "train"), tokenizer=tokenizer, batch_size=1, prompt="say: ")
    image, caption = data.image_and_caption(0)
    (found,) = score_beside_images([image], [caption], data.format, viewer)
    ((own,),) = viewer.logprobs([image], [[caption]], prompt="look: ")
    np.testing.assert_allclose(found, own.values, atol=1e-5)


def test_a_job_needs_one_model():
    for arguments in ({}, {"reference": "a", "viewer": "b"}):
        with pytest.raises(ValueError, match=r"^Give a reference, or a viewer in its place\."):
            ScoreJob("out", **arguments)


def test_another_image_makes_other_scores(tokenizer, scenes):
    viewer = viewer_of("encoder", tokenizer)
    data = StreamingCaptionDataset(local=str(scenes / "train"), tokenizer=tokenizer, batch_size=1)
    image, caption = data.image_and_caption(0)
    seen, blank = (
        score_beside_images([one], [caption], data.format, viewer)[0] for one in (image, Image.new("RGB", (9, 9)))
    )
    assert not np.allclose(seen, blank, atol=1e-3)


def test_prior_and_image_gain_are_refused_together(tokenizer, make_spec, reference: ReferenceLM):
    model = small_lvlm("patches", tokenizer)
    with pytest.raises(ValueError, match="PRIOR and ImageGain both weight the tokens"):
        fit(model, make_spec(model), [PRIOR(reference), ImageGain(viewer_of("patches", tokenizer), reference)])
