"""Caption metrics: by hand, at their maxima, and beside pycocoevalcap, which published figures come from."""

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.evaluation.caption_metrics import (
    bleu,
    bleu_counts,
    cider_d,
    document_frequency,
    ngrams,
    rouge_l,
    tokenize,
)

WORDS = ("a", "cat", "dog", "on", "mat", "red")
SENTENCE = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9)
CORPUS = st.lists(
    st.tuples(st.lists(st.sampled_from(WORDS), max_size=9), st.lists(SENTENCE, min_size=1, max_size=4)),
    min_size=2,  # of a single image, pycocoevalcap's scorer takes the average length
    max_size=8,
)
WRITTEN = {  # as Stanford's PTBTokenizer 3.4.1 cuts them
    "A man's hand; the dogs' toys aren't there.": "a man 's hand the dogs toys are n't there",
    "I cannot, won't and don't: they're mom's & dad's iPhones!": (
        "i can not wo n't and do n't they 're mom 's & dad 's iphones"
    ),
    "Two 3-year-old kids -- half-eaten pizza - ...": "two 3-year-old kids half-eaten pizza",
    "Mr. Smith of the U.S. at 10:30 a.m. for $3.50 (cheap)": (
        "mr. smith of the u.s. at 10:30 a.m. for $ 3.50 -lrb- cheap -rrb-"
    ),
    "A b&w photo, AT&T, 1950's, a 5'10\" man at 9:15pm": "a b & w photo at&t 1950 's a 5 10 man at 9:15 pm",
    "The sign says \"no parking\", 'stop' and No. 5.": "the sign says no parking stop and no. 5",
    "red/white w/ a tv/monitor, bus #23 and #tag": "red/white w / a tv/monitor bus # 23 and #tag",
    "What?! Plan B. The end. J. R. Tolkien": "what ?! plan b the end j. r. tolkien",
    "clip art #716271 | 4 May 2010, 1,000 caf\u00e9s\u2026 \u201cquoted\u201d": (
        "clip art # 716271 | 4 may 2010 1,000 caf\u00e9s quoted"
    ),
    "'twas gonna rain, y'all; c++ [x] {y} <tag> www.flickr.com/a?b": (
        "'t was gon na rain y' all c++ -lsb- x -rsb- -lcb- y -rcb- <tag> www.flickr.com/a?b"
    ),
}


def scores(corpus):
    """All figures of (caption, references) pairs of tokens."""
    counts = [bleu_counts(caption, references) for caption, references in corpus]
    frequency = document_frequency(references for _, references in corpus)
    return {
        "bleu": bleu({name: sum(one[name] for one in counts) for name in counts[0]}),
        "rouge_l": [rouge_l(caption, references) for caption, references in corpus],
        "cider_d": [cider_d(caption, references, frequency, len(corpus)) for caption, references in corpus],
    }


@pytest.mark.parametrize("caption", WRITTEN)
def test_words_are_cut_as_in_the_penn_treebank(caption):
    assert tokenize(caption) == WRITTEN[caption].split()


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's PTBTokenizer needs Java")
def test_words_are_cut_as_stanfords_tokenizer_cuts_them():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    captions = [*WRITTEN, *(make_sample("train", i, canvas=32)["caption"] for i in range(200))]
    found = tokenizer.PTBTokenizer().tokenize({i: [{"caption": one}] for i, one in enumerate(captions)})
    assert {one: tokenize(one) for one in captions} == {one: found[i][0].split() for i, one in enumerate(captions)}


def test_a_caption_equal_to_its_reference_scores_the_maximum():
    captions = ["a red cat on a mat", "two dogs eat an old shoe", "one bird above the sea"]
    found = scores([(tokenize(one), [tokenize(one)]) for one in captions])
    np.testing.assert_allclose(found["bleu"], 1, atol=1e-6)
    np.testing.assert_allclose(found["rouge_l"], 1)
    np.testing.assert_allclose(found["cider_d"], 10)


def test_a_caption_that_shares_no_word_with_its_references_scores_nothing():
    corpus = [(["x", "y", "z"], [["a", "cat", "on", "a", "mat"]]), ([], [["two", "dogs", "eat"]])]
    found = scores(corpus)
    assert max(found["bleu"]) < 1e-6
    assert found["rouge_l"] == found["cider_d"] == [0, 0]


def test_no_word_counts_more_often_than_a_reference_has_it():
    references = [["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    counts = bleu_counts(["the"] * 7, references)  # the example of Papineni et al., section 2.1
    assert (counts["correct_1"], counts["guess_1"]) == (2, 7)
    assert counts["reference_length"] == 7
    assert bleu_counts(["a", "b", "c"], [["a"] * 2, ["a"] * 4])["reference_length"] == 2, "of two, the shorter"


def test_a_short_caption_pays_for_its_brevity():
    counts = bleu_counts(["a", "cat"], [["a", "cat", "on", "a", "mat"]])
    assert bleu(counts)[0] == pytest.approx(math.exp(1 - 5 / 2), rel=1e-6)


def test_figures_of_a_small_corpus():
    """Values of pycocoevalcap 1.2."""
    corpus = [
        ("a red cat on the mat", ["a red cat sat on a mat", "the cat is red"]),
        ("two dogs run", ["two dogs run in the park", "dogs run", "some dogs"]),
        ("a bird", ["a bird above the sea", "one white bird"]),
        ("white dogs dogs run run", ["white dogs run", "two white dogs"]),
    ]
    found = scores([(tokenize(caption), [tokenize(one) for one in references]) for caption, references in corpus])
    np.testing.assert_allclose(found["bleu"], [0.875, 0.71443451, 0.50344838, 7.108e-05], atol=1e-6)
    np.testing.assert_allclose(found["rouge_l"], [0.75870647, 1.0, 0.53043478, 0.78540773], atol=1e-6)
    np.testing.assert_allclose(found["cider_d"], [2.48720417, 2.3983912, 1.96627468, 2.33493114], atol=1e-6)


@settings(deadline=None)
@given(CORPUS)
def test_figures_are_those_of_pycocoevalcap(corpus):
    bleus = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason="pycocoevalcap is not installed")
    ciders = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    rouges = pytest.importorskip("pycocoevalcap.rouge.rouge")
    theirs, cider, rouge = bleus.BleuScorer(n=4), ciders.CiderScorer(n=4, sigma=6.0), rouges.Rouge()
    lines = [(" ".join(caption), [" ".join(one) for one in references]) for caption, references in corpus]
    for line in lines:
        theirs += line
        cider += line
    found = scores(corpus)
    np.testing.assert_allclose(found["bleu"], theirs.compute_score(option="closest")[0], atol=1e-6)
    np.testing.assert_allclose(found["cider_d"], cider.compute_score()[1], atol=1e-6)
    np.testing.assert_allclose(found["rouge_l"], [rouge.calc_score([one], some) for one, some in lines], atol=1e-6)


@given(CORPUS)
def test_bleu_of_sums_of_any_shape(corpus):
    counts = [bleu_counts(caption, references) for caption, references in corpus]
    sums = {name: np.array([[one[name] for one in counts]]) for name in counts[0]}
    found = np.array(bleu(sums))
    assert found.shape == (4, 1, len(corpus))
    np.testing.assert_allclose(found[:, 0, 0], bleu(counts[0]))
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_ngrams_have_one_to_four_tokens():
    assert ngrams(["a", "b", "a", "b", "a"])[("a", "b")] == 2
    assert max(map(len, ngrams(list("abcdef")))) == 4
    assert not ngrams([])


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="aA1.,-'&/\"!?#@ <>", max_size=60))
def test_any_text_becomes_words_in_lower_case(text):
    found = tokenize(text)
    assert all(
        word and word == word.lower() and word not in {".", ",", "-", "--", "...", "!", "?", "'", '"'} for word in found
    )
    assert tokenize(text + " .") == found, "a full stop is no word"
