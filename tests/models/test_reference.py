"""The reference's scores against a plain loop over tokens."""

import pytest
import torch
from common.models import small_lm
from common.recipes import ROOT, fork_ranks

from composer_prior import ReferenceLM
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.models.reference import left_pack


def looped_logprobs(model, ids, keep, labels):
    """``log P(labels[t] | kept tokens before t)`` with one forward pass per label."""
    logprobs = torch.zeros(ids.shape, dtype=torch.float64)
    for row, position in (labels != IGNORE_INDEX).nonzero().tolist():
        text = ids[row, :position][keep[row, :position]]
        logits = model(input_ids=text[None]).logits[0, -1].double()
        logprobs[row, position] = logits.log_softmax(-1)[labels[row, position]]
    return logprobs


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_the_text_alone(lvlm, make_batch, reference, batch_size):
    batch = make_batch(lvlm, batch_size=5)
    reference.batch_size = batch_size
    keep = batch["attention_mask"].bool() & ~torch.isin(
        batch["input_ids"], torch.tensor(image_token_ids(lvlm.tokenizer))
    )
    with torch.no_grad():
        expected = looped_logprobs(reference.model, batch["input_ids"], keep, batch["labels"])
    scores = reference.logprobs(
        batch["input_ids"], batch["attention_mask"], batch["labels"], image_token_ids(lvlm.tokenizer)
    )
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert (scores[batch["labels"] != IGNORE_INDEX] < 0).all()


def test_a_caption_without_a_token_before_it_starts_after_bos(tokenizer, reference):
    ids = torch.tensor([[7, 8, 9], [5, 6, 0]])
    labels = torch.tensor([[7, 8, 9], [IGNORE_INDEX, 6, IGNORE_INDEX]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    scores = reference.logprobs(ids, mask, labels)
    bos = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        logits = reference.model(input_ids=torch.cat([bos, ids[:1]], 1)).logits.log_softmax(-1)
    expected = logits[0, :3].gather(1, ids[0][:, None])[:, 0]
    torch.testing.assert_close(scores[0], expected, rtol=1e-5, atol=1e-5)


def test_packing_moves_kept_tokens_to_the_left():
    ids = torch.tensor([[1, 9, 9, 2, 3], [4, 5, 9, 6, 0]])
    keep = torch.tensor([[True, False, False, True, True], [True, True, False, True, False]])
    packed, labels, positions, lengths = left_pack(ids, keep, ids * 10)
    assert packed.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert labels.tolist() == [[10, 20, 30], [40, 50, 60]]
    assert positions.tolist() == [[0, 3, 4], [0, 1, 3]]
    assert lengths.tolist() == [3, 3]


def test_tokens_that_the_reference_does_not_know_may_stand_for_the_image(tokenizer):
    """Embeddings of the trained model grow for image tokens; the reference's do not."""
    reference = ReferenceLM(small_lm(tokenizer, vocab_size=20))
    ids = torch.tensor([[1, 500, 500, 7, 8], [1, 500, 500, 500, 9]])
    labels = torch.tensor([[IGNORE_INDEX] * 3 + [7, 8], [IGNORE_INDEX] * 4 + [9]])
    scores = reference.logprobs(ids, torch.ones_like(ids), labels, drop_token_ids=[500])
    alone = reference.logprobs(torch.tensor([[1, 9]]), torch.ones(1, 2), torch.tensor([[IGNORE_INDEX, 9]]))
    assert scores[1, 4] == pytest.approx(float(alone[0, 1]), abs=1e-6)


def test_nothing_to_score(reference):
    ids = torch.tensor([[1, 5, 6]])
    scores = reference.logprobs(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE_INDEX))
    assert scores.tolist() == [[0.0, 0.0, 0.0]]


def test_each_row_begins_with_the_bos_that_is_asked_for(reference):
    """A row without one gets it, whatever the others have; nothing is put before a text unless it is asked for."""
    ids = torch.tensor([[1, 5, 6, 7], [500, 5, 6, 7]])
    labels = torch.tensor([[IGNORE_INDEX, 5, 6, 7]] * 2)
    scores = reference.logprobs(ids, torch.ones_like(ids), labels, [500], bos=1)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-6)
    whole = reference.logprobs(ids[:1], torch.ones(1, 4), labels[:1])
    torch.testing.assert_close(scores[:1], whole, rtol=0, atol=1e-6)
    bare, text = torch.tensor([[9, 5, 6, 7]]), torch.tensor([[9, 5, 6]])
    log_softmax = reference.model(text).logits.log_softmax(-1)[0]
    found = reference.logprobs(bare, torch.ones(1, 4), labels[:1])[0, 1:]
    torch.testing.assert_close(found, log_softmax[range(3), [5, 6, 7]], rtol=0, atol=1e-5)


def test_ranks_of_a_sharded_reference_may_have_unlike_numbers_of_captions(tmp_path):
    """As they have on packed rows; each pass gathers weights on all ranks, and one that is missing hangs the others."""
    fork_ranks(tmp_path, ROOT / "tests/common/programs/sharded_reference.py", tmp_path / "tokens.pt", timeout=120)
    assert torch.load(tmp_path / "tokens.pt") == [1 + 2 + 3, 1 + 2 + 3 + 4 + 5 + 6 + 1 + 2 + 3]
