"""Stored scores of conversations are what a live reference says of their learned tokens."""

import copy

import numpy as np
import pytest
import torch
from common.chats import TEMPLATES, TOKENIZERS, parts, png, turns, write_chats
from common.models import small_lm
from common.tokenizers import plain_tokenizer
from models.test_conversations import SAMPLES, TEMPLATE, foreign, own
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast

from composer_prior import ReferenceLM, StreamingCaptionDataset
from composer_prior.algorithms.token_weighting.image_tokens import text_positions
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import caption_data_spec
from composer_prior.data.scores import Scores, ScoresError
from composer_prior.data.tokenizer import bos_id, build_tokenizer, placeholder
from composer_prior.scoring.job import ScoreJob
from composer_prior.scoring.score import score_captions


def save_tokenizer(tokenizer, folder):
    """Save it as a class that reads it as it is: Qwen2Tokenizer of transformers 5 makes byte pairs of its words."""
    if isinstance(tokenizer, Qwen2TokenizerFast):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
        )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["patches", "qwen2_vl"])
def test_they_are_what_a_live_reference_says(kind, tokenizer, tmp_path):
    model = foreign(kind) if kind == "qwen2_vl" else own(kind, tokenizer)
    reader = copy.deepcopy(model.tokenizer)
    reference = small_lm(reader, seed=1)
    reference.save_pretrained(tmp_path / "reference")
    save_tokenizer(reader, tmp_path / "reference")
    data = {"local": write_chats(tmp_path / "data", SAMPLES), "max_tokens": 100}
    named = {
        "name": str(tmp_path / "reference"),
        "image_tokens": kind == "patches",
        "chat_template": TEMPLATE.replace("IMAGE", placeholder(reader)),
    }
    out = str(tmp_path / "scores")
    summary = score_captions(ScoreJob(out, str(tmp_path / "reference"), named, data, progress_bar=False))

    def loader(**options):
        given = {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "batch_size": len(SAMPLES)}
        return caption_data_spec(StreamingCaptionDataset(**given, **{**data, **options}), len(SAMPLES)).dataloader

    batch = next(iter(loader(scores=out)))
    labelled = batch["labels"] != IGNORE_INDEX
    assert summary.tokens == labelled.sum()
    is_text, begin = text_positions(batch, model), bos_id(model.tokenizer)
    live = ReferenceLM(reference, reader).logprobs(batch["input_ids"], is_text, batch["labels"], bos=begin)
    torch.testing.assert_close(batch["ref_logprobs"], live, rtol=1e-3, atol=1e-4)  # stored as float16
    assert (batch["ref_logprobs"][~labelled] == 0).all()
    for changes in ({"max_tokens": 99}, {"tokenizer": model.tokenizer}):
        if "tokenizer" in changes:
            model.tokenizer.chat_template += " "
        with pytest.raises(ScoresError, match="chat"):
            StreamingCaptionDataset(
                image_processor=model.image_processor,
                batch_size=1,
                scores=out,
                **{"tokenizer": model.tokenizer, **data, **changes},
            )


def test_bad_samples_have_none_and_a_cut_takes_the_first(tokenizer, tmp_path):
    model = own("patches", tokenizer)
    small_lm(model.tokenizer, seed=1).save_pretrained(tmp_path / "reference")
    model.tokenizer.save_pretrained(tmp_path / "reference")
    bad = ([{"role": "user", "content": "w4"}], [])
    longest = 12  # the images of the first sample alone take more
    data = {"local": write_chats(tmp_path / "data", [SAMPLES[3], bad]), "max_tokens": 100, "on_bad_sample": "skip"}
    named = {"name": str(tmp_path / "reference"), "chat_template": model.tokenizer.chat_template}
    out = str(tmp_path / "scores")
    assert score_captions(ScoreJob(out, str(tmp_path / "reference"), named, data, progress_bar=False)).skipped == 1
    given = {"tokenizer": model.tokenizer, "image_processor": model.image_processor, "batch_size": 1, **data}
    scored = StreamingCaptionDataset(scores=out, **given)
    whole = scored[0]
    scored.max_tokens = len(whole["labels"]) - 2
    cut = scored[0]
    assert np.array_equal(cut["ref_logprobs"], whole["ref_logprobs"][:-2])
    assert (scored[1]["labels"] == IGNORE_INDEX).all()
    assert longest < scored.max_tokens


def plain_reference(name, folder):
    """A language model with the tokenizer and the chat template of a family."""
    words = ["what is it a red cat and below it nothing at all really"] * 20
    tokenizer = plain_tokenizer(TOKENIZERS[name], words)
    tokenizer.chat_template = TEMPLATES[name]
    small_lm(tokenizer, seed=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("ours", "theirs"), [("qwen2", "vicuna"), ("vicuna", "smollm2"), ("mistral", "llama3")])
def test_those_of_another_tokenizer_keep_the_sum_over_each_answer(ours, theirs, tmp_path):
    samples = [
        (turns("What is it?", "A red cat.", "And below?", "Nothing at all,\nreally \u2603"), []),
        (turns("<image>What is it?", "It"), [png(1)]),
        ([{"role": "document", "content": parts("A cat <image> below it")}], [png(2)]),
        ([{"role": "document", "content": "Nothing at all, a cat"}], []),
    ]
    data = {"local": write_chats(tmp_path / "data", samples), "max_tokens": 300}
    named = {"name": plain_reference(ours, tmp_path / "model"), "chat_template": "own"}
    reference = plain_reference(theirs, tmp_path / "reference")
    out = str(tmp_path / "scores")
    score_captions(ScoreJob(out, reference, named, data, progress_bar=False))
    text = StreamingCaptionDataset(tokenizer=build_tokenizer(named), batch_size=1, scores=out, **data)
    again = {"name": reference, "chat_template": "own"}
    job = ScoreJob(str(tmp_path / "own"), reference, again, data, progress_bar=False)
    score_captions(job)  # by the reference's own tokens
    own_text = StreamingCaptionDataset(
        tokenizer=build_tokenizer(job.tokenizer), batch_size=1, scores=str(tmp_path / "own"), **data
    )
    for number, (_, images) in enumerate(samples):
        carried, direct = text[number], own_text[number]
        assert (carried["ref_logprobs"][carried["labels"] != IGNORE_INDEX] < 0).all()
        if not images:  # its own tokens are of the stretches between images, and not of the text in one
            assert float(carried["ref_logprobs"].sum()) == pytest.approx(float(direct["ref_logprobs"].sum()), rel=2e-3)


@pytest.mark.parametrize("kind", ["patches", "qwen2_vl"])
def test_a_cut_text_has_a_score_for_each_token_that_is_left(kind, tokenizer, tmp_path, monkeypatch):
    """Qwen2-VL writes no beginning of sequence, which the scored text has."""
    model = foreign(kind) if kind == "qwen2_vl" else own(kind, tokenizer)
    reader, folder, out = copy.deepcopy(model.tokenizer), str(tmp_path / "reference"), str(tmp_path / "scores")
    reference = small_lm(reader, seed=1)
    reference.save_pretrained(folder)
    save_tokenizer(reader, folder)
    local = write_chats(tmp_path / "data", [(turns("w4", "w5w6w7w8w9"), [])] * 2)
    given = {"local": local, "tokenizer": model.tokenizer, "image_processor": model.image_processor, "batch_size": 1}
    data = {"local": local, "max_tokens": len(StreamingCaptionDataset(**given)[0]["labels"]) - 2}
    template = TEMPLATE.replace("IMAGE", placeholder(reader))
    named = {"name": folder, "image_tokens": kind == "patches", "chat_template": template}
    asked = []
    monkeypatch.setattr(ReferenceLM, "reads", lambda *of: not asked.append(of))
    score_captions(ScoreJob(out, folder, named, data, progress_bar=False))
    assert len(asked) == 1  # it compares two vocabularies
    cut = StreamingCaptionDataset(**given, scores=out, max_tokens=data["max_tokens"])
    batch = next(iter(caption_data_spec(cut, 1).dataloader))
    is_text, begin = text_positions(batch, model), bos_id(model.tokenizer)
    live = ReferenceLM(reference, reader).logprobs(batch["input_ids"], is_text, batch["labels"], bos=begin)
    assert batch["labels"][0, -1] != IGNORE_INDEX
    torch.testing.assert_close(batch["ref_logprobs"], live, rtol=1e-3, atol=1e-4)
    stored = Scores(out, tmp_path)
    count = len(stored[0])
    assert stored.read(0, count - 1, count).tolist() == stored[0].tolist()[:-1]
    for uncut in (None, count - 1):  # a text of other tokens than the scored one
        with pytest.raises(ScoresError, match=f"{count} scores of sample 0 for {count - 2} tokens"):
            stored.read(0, count - 2, uncut)


def test_stored_scores_of_a_viewer_are_refused_by_key(tokenizer, tmp_path):
    local = write_chats(tmp_path, SAMPLES)
    with pytest.raises(ValueError, match=r"dataset.viewer_scores='seen': .* conversations: give .* a live viewer"):
        StreamingCaptionDataset(local=local, tokenizer=tokenizer, batch_size=1, viewer_scores="seen")
