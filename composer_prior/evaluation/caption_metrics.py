"""Similarity of captions to references: BLEU, ROUGE-L and CIDEr-D on Penn Treebank tokens, as in pycocoevalcap.

The figures are those of Microsoft's COCO caption evaluation (Chen et al. 2015, arXiv 1504.00325), which published
numbers come from: with its quirks, equal on equal tokens. Everything here is a pure function of tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

ORDERS = (1, 2, 3, 4)  # of n-grams
SIGMA = 6.0  # tokens: CIDEr-D's tolerance of a length that differs
BETA = 1.2  # ROUGE-L's weight of recall
_SMALL, _TINY = 1e-9, 1e-15  # keep BLEU of nothing from 0 / 0

# What the evaluation drops; its list has brackets in capitals, so that -lrb- and the like stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "\u2026"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN = {"\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_WRITTEN |= {"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents", "&amp;": "&", "\u2019": "'", "\u2018": "'"}
_WRITTEN |= {"\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--", "\u00a0": " "}
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|jr|sr|st|ave|blvd|rd|mt|ft|vs|etc|inc|corp|co|ltd|bros|gen|gov|sen|rep|capt|col|lt|sgt|rev"
    "|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|est|dept|univ|ph\\.d|al"
)
_DROPPED = re.compile("[\ufe0f\U00010000-\U0010ffff]")  # emojis, which it does not know
_CLITIC = r"'(?:s|m|d|ll|re|ve)(?!\w)"
_TOKEN = re.compile(
    rf"""
    https?://[^\s"<>]+[^\s"<>.,;:!?)] | www\.[^\s"<>]*[^\s"<>.,;:!?)] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?[a-z][^<>\s]*>
    | '(?=tw?(?:is|as)\b)t | (?<='t)(?:is|was)\b | 'n'(?!\w)
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b) | y'(?=all\b)
    | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d) | (?:[^\W\d_]\.)+[^\W\d_]\.(?!\w)
    | [^\W\d_]\.(?=\s+[^\W\d_])(?!\s+(?:the|it|he|she|they|there|this|that|in|i|an?)\b)
    | n't(?!\w) | {_CLITIC} | '\d\ds?(?![\w"])
    | [#@][^\W\d]\w* | \d+:\d\d(?=[ap]m\b) | (?<!\w)[-+]?\d+(?:[.,:/]\d+)+(?:-\w+)*
    | (?<!\w)[-+]?\d+(?:\w|-(?=\w))* | (?:\.\d+)+
    | (?-i:[A-Z]+&[A-Z]+) | c\+\+
    | \w+?(?=n't(?!\w)) | (?:\w|\w[-./'](?=\w))+?(?={_CLITIC}) | \w+(?:(?:[-']|[./](?=[^\W\d]))(?=\w)\w+)*
    | [!?]{{2,}} | \.{{2,}} | -{{2,}} | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> list[str]:
    """Cut a caption into words in lower case as Stanford's PTBTokenizer does, without punctuation.

    Names of files and of versions may be cut otherwise.
    """
    text = _DROPPED.sub("", caption)
    for character, written in _WRITTEN.items():
        text = text.replace(character, written)
    found = (_BRACKETS.get(token, token.lower()) for token in _TOKEN.findall(text))
    return [token for token in found if token not in PUNCTUATION and token != '"' and set(token) - set(".-")]


def ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Count the n-grams of one to four tokens."""
    return Counter(tuple(tokens[i : i + n]) for n in ORDERS for i in range(len(tokens) - n + 1))


def bleu_counts(caption: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the terms that a caption adds to the sums of BLEU (Papineni et al. 2002, section 2).

    Returns:
        ``length``; ``reference_length``, that of the closest reference, the shorter of two; for n from 1 to 4 the
        n-grams there are, ``guess_n``, and those that a reference has, ``correct_n``, none more often than it has.
    """
    length = len(caption)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= ngrams(reference)
    found = ngrams(caption) & most
    counts = {"length": float(length), "reference_length": float(closest)}
    for n in ORDERS:
        counts[f"guess_{n}"] = float(max(0, length - n + 1))
        counts[f"correct_{n}"] = float(sum(count for gram, count in found.items() if len(gram) == n))
    return counts


def bleu(sums: Mapping[str, Any]) -> list[Any]:
    """Return BLEU-1 to BLEU-4 of a corpus, each in [0, 1], from sums of :func:`bleu_counts` of any shape."""
    ratio = (np.asarray(sums["length"]) + _TINY) / (np.asarray(sums["reference_length"]) + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    precisions = [(sums[f"correct_{n}"] + _TINY) / (sums[f"guess_{n}"] + _SMALL) for n in ORDERS]
    return [np.prod(precisions[:n], axis=0) ** (1 / n) * brevity for n in ORDERS]


def rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L in [0, 1] (Lin 2004, equations 2 to 4) of the best precision and recall over references."""
    common = [_longest_common(caption, reference) for reference in references]
    precision = max(common) / max(1, len(caption))
    recall = max(shared / max(1, len(reference)) for shared, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def document_frequency(references: Iterable[Sequence[Sequence[str]]]) -> Counter[tuple[str, ...]]:
    """Return for each n-gram the number of images with it in one of their references, which are tokens."""
    return Counter(gram for some in references for gram in set().union(*map(ngrams, some)))


def cider_d(
    caption: Sequence[str],
    references: Sequence[Sequence[str]],
    frequency: Mapping[tuple[str, ...], int],
    documents: int,
) -> float:
    """Return CIDEr-D in [0, 10] (Vedantam et al. 2015, equation 4), which many papers give times ten.

    Caption and references are tokens; ``frequency`` is :func:`document_frequency` over all images, the ``documents``.
    """
    own = _tf_idf(caption, frequency, documents)
    total = 0.0
    for reference in references:
        other = _tf_idf(reference, frequency, documents)
        # The evaluation takes the number of bigrams for the length.
        apart = max(0, len(caption) - 1) - max(0, len(reference) - 1)
        penalty = math.exp(-(apart**2) / (2 * SIGMA**2))
        for mine, theirs in zip(own, other, strict=True):
            norm = _norm(mine) * _norm(theirs)
            if norm:
                overlap = sum(min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine.keys() & theirs.keys())
                total += penalty * overlap / norm
    return 10 * total / len(ORDERS) / len(references)


def _tf_idf(
    tokens: Sequence[str], frequency: Mapping[tuple[str, ...], int], documents: int
) -> list[dict[tuple[str, ...], float]]:
    """Return the weights of the n-grams, for each n."""
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in ORDERS]
    for gram, count in ngrams(tokens).items():
        weights[len(gram) - 1][gram] = count * (math.log(documents) - math.log(max(1, frequency.get(gram, 0))))
    return weights


def _norm(weights: Mapping[Any, float]) -> float:
    return math.sqrt(sum(weight**2 for weight in weights.values()))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        new = [0]
        for other, (corner, above) in zip(second, pairwise(row), strict=True):
            new.append(corner + 1 if token == other else max(above, new[-1]))
        row = new
    return row[-1]
