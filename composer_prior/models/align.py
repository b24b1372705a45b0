"""Scores of one tokenizer's tokens, carried over to the tokens of another through the characters that both stand for.

Each tokenizer cuts a text of ``n`` characters into consecutive stretches, one for each token. The log-probability of a
token is spread evenly over its stretch, and that of a token of the other tokenizer is what lies in its own stretch: the
sum over the tokens that make up its characters, where one that straddles a boundary is shared in proportion to its
characters. The sum over the text is the same with both.

- White space that a tokenizer leaves out of a token's offsets belongs to the token after it, or, at the end of the
  text, to the last one.
- Byte-level tokens inside one character share that character evenly.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def token_edges(offsets: Sequence[tuple[int, int]], length: int) -> NDArray[np.float64]:
    """Where each token's stretch of the text begins and ends.

    Args:
        offsets: first and last character (exclusive) of each token, as a fast tokenizer gives them.
        length: characters of the text.

    Returns:
        ``[tokens + 1]`` float64, increasing from 0 to ``length``; token ``i`` has the stretch from edge ``i`` to edge
        ``i + 1``. ``[0]`` without tokens.
    """
    if not offsets:
        return np.zeros(1)
    starts, ends = np.array(offsets, dtype=np.float64).T
    ends = np.maximum.accumulate(ends)
    ends[ends == ends[-1]] = length
    before = np.append(0, ends[:-1])
    # Tokens without a stretch of their own share one: with the token before, if they are bytes of its last character,
    # or else with the one after.
    empty = ends == before
    waiting = empty & (starts >= before)
    begins = (~empty | waiting) & ~np.append(False, waiting[:-1])
    begins[0] = True
    last = int(begins.nonzero()[0][-1])
    begins[last] = last == 0 or before[last] < length
    group = begins.cumsum() - 1  # [tokens]
    group_start = before[begins]
    group_end = np.append(group_start[1:], length)
    place = np.arange(1, len(ends) + 1) - begins.nonzero()[0][group]  # 1 for the first token of a group
    share = place / np.bincount(group)[group]
    return np.append(0, group_start[group] + share * (group_end - group_start)[group])


def align_logprobs(
    logprobs: NDArray[np.float32], edges: NDArray[np.float64], to_edges: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Log-probabilities of the tokens between ``to_edges``, from those of the tokens between ``edges``.

    Args:
        logprobs: ``[m]`` float32, finite, at most 0.
        edges: ``[m + 1]``, of :func:`token_edges`.
        to_edges: ``[n + 1]``, of the same text; may stop before its end.

    Returns:
        ``[n]`` float32, at most 0; ``logprobs`` themselves, bit for bit, where the edges are the same.

    Raises:
        ValueError: if ``logprobs`` and ``edges`` do not fit each other, or nothing stands for the text.
    """
    if len(edges) != len(logprobs) + 1:
        raise ValueError(f"{len(logprobs)} log-probabilities do not fit {len(edges)} edges; one more edge is expected.")
    if len(edges) == 1 < len(to_edges):
        raise ValueError(f"The reference's tokenizer has no token for a text of {len(to_edges) - 1} tokens.")
    shared = len(to_edges) <= len(edges) and np.array_equal(edges[: len(to_edges)], to_edges)
    if shared:
        return logprobs[: len(to_edges) - 1]
    cumulative = np.append(0, np.cumsum(logprobs, dtype=np.float64))
    return np.minimum(np.diff(np.interp(to_edges, edges, cumulative)), 0).astype(np.float32)
