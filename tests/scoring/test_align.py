"""Log-probabilities carried from one tokenizer's tokens to another's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from composer_prior.data.tokenizer import train_tokenizer
from composer_prior.scoring.align import align_logprobs, token_edges

CAPTIONS = [
    "a red snail, beside two crêpes 🐌",
    "  the umbrella is under a 傘 and 🧑‍🚀",
    "stock photo - dogs and cats\n",
] * 4


def llama_like() -> PreTrainedTokenizerFast:
    """A prefix space, white space as ``▁``, and bytes for characters that it does not know."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.ByteFallback()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(["a red snail beside two cats", "the umbrella is under a dog"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """Whole words, without white space."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": train_tokenizer([], 261),
    "bpe": train_tokenizer(CAPTIONS, 320),
    "llama": llama_like(),
    "words": words(),
}
texts = st.text(st.sampled_from("ab dogsnail  é傘🐌🧑‍🚀\n.,"), min_size=1, max_size=40).filter(str.strip)


def edges_of(name: str, text: str) -> np.ndarray:
    encoding = TOKENIZERS[name](text, add_special_tokens=False, return_offsets_mapping=True)
    return token_edges(encoding["offset_mapping"], len(text))


def scores(n: int, seed: int = 0) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(3, n).astype(np.float32)


@pytest.mark.parametrize(
    ("offsets", "length", "expected"),
    [
        ([(0, 1), (1, 5)], 5, [0, 1, 5]),
        ([(0, 1), (2, 5)], 5, [0, 1, 5]),  # the white space belongs to the token after it
        ([(0, 2), (3, 5)], 7, [0, 2, 7]),  # at the end, to the last
        ([(0, 1), (2, 2), (3, 6)], 6, [0, 1, 2, 6]),  # a token of white space alone, trimmed
        ([(0, 1), (1, 2), (1, 2), (1, 2), (1, 2)], 2, [0, 1, 1.25, 1.5, 1.75, 2]),  # four bytes of one character
        ([(0, 0), (0, 1), (0, 1)], 2, [0, 2 / 3, 4 / 3, 2]),  # a prefix that stands for nothing in the text
        ([(0, 3), (3, 3)], 3, [0, 1.5, 3]),  # a suffix that stands for nothing
        ([(0, 0), (0, 0)], 3, [0, 1.5, 3]),
        ([], 0, [0]),
    ],
)
def test_edges(offsets: list[tuple[int, int]], length: int, expected: list[float]) -> None:
    np.testing.assert_allclose(token_edges(offsets, length), expected)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_every_token_has_a_stretch_of_the_text(name: str, text: str) -> None:
    edges = edges_of(name, text)
    assert edges[0] == 0
    assert edges[-1] == len(text)
    assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("other", TOKENIZERS)
@given(text=texts, seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_the_text_keeps_its_log_probability(name: str, other: str, text: str, seed: int) -> None:
    edges, to_edges = edges_of(name, text), edges_of(other, text)
    logprobs = scores(len(edges) - 1, seed)
    aligned = align_logprobs(logprobs, edges, to_edges)
    assert aligned.dtype == np.float32
    assert len(aligned) == len(to_edges) - 1
    assert (aligned <= 0).all()
    np.testing.assert_allclose(aligned.sum(dtype=np.float64), logprobs.sum(dtype=np.float64), rtol=1e-5)


@given(text=texts, cut=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_the_same_tokens_keep_their_bits(text: str, cut: int) -> None:
    edges = edges_of("bpe", text)
    logprobs = scores(len(edges) - 1)
    kept = min(cut, len(logprobs))
    np.testing.assert_array_equal(align_logprobs(logprobs, edges, edges[: kept + 1]), logprobs[:kept])


def test_whole_words_get_the_sum_of_their_pieces() -> None:
    text = "a snail, red"
    edges, to_edges = edges_of("bytes", text), edges_of("words", text)
    logprobs = scores(len(text))
    np.testing.assert_allclose(
        align_logprobs(logprobs, edges, to_edges),
        [logprobs[0], logprobs[1:7].sum(), logprobs[7], logprobs[8:].sum()],
        rtol=1e-6,
    )


def test_a_token_that_straddles_is_shared_in_proportion_to_its_characters() -> None:
    logprobs = np.array([-4, -1], dtype=np.float32)
    aligned = align_logprobs(logprobs, np.array([0.0, 4, 5]), np.array([0.0, 1, 5]))
    np.testing.assert_allclose(aligned, [-1, -4])


def test_log_probabilities_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 log-probabilities do not fit 2 edges"):
        align_logprobs(scores(2), np.array([0.0, 4]), np.array([0.0, 4]))
    with pytest.raises(ValueError, match="no token for a text of 1"):
        align_logprobs(scores(0), np.zeros(1), np.array([0.0, 4]))
