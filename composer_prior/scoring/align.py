"""Carry log-probabilities of one tokenizer's tokens over to those of another, by characters.

Each tokenizer cuts a text of ``n`` characters into consecutive stretches, one for each token. The log-probability of a
token is spread evenly over its stretch. A token of the other tokenizer gets the sum over its own stretch, so that a
token which straddles a boundary is shared in proportion to its characters. The sum over the text is the same for both.

- White space that a tokenizer leaves out of a token's offsets belongs to the token after it, or, at the end of the
  text, to the last one.
- Byte-level tokens inside one character share that character evenly.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def token_edges(offsets: Sequence[tuple[int, int]], length: int) -> NDArray[np.float64]:
    """Return the edges between the tokens' stretches of the text.

    Args:
        offsets: first and last character (exclusive) of each token, as a fast tokenizer gives them.
        length: characters of the text.

    Returns:
        ``[tokens + 1]`` float64, increasing from 0 to ``length``; token ``i`` has the stretch from edge ``i`` to edge
        ``i + 1``. ``[0]`` without tokens.

    Examples:
        >>> token_edges([(0, 3), (4, 7)], 7)  # white space belongs to the token after it
        array([0., 3., 7.])
        >>> token_edges([(0, 3)], 5)  # and at the end to the last one
        array([0., 5.])
        >>> token_edges([(0, 1), (0, 1), (1, 2)], 2)  # two bytes of one character
        array([0. , 0.5, 1. , 2. ])
    """
    if not offsets:
        return np.zeros(1)
    stretches = _stretches(offsets, length)
    ends = [*(start for start, _ in stretches[1:]), length]
    edges = [0.0]
    for (start, tokens), end in zip(stretches, ends, strict=True):
        edges += [start + number / tokens * (end - start) for number in range(1, tokens + 1)]
    return np.array(edges)


def _stretches(offsets: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the start of each stretch, and the number of tokens that share it.

    A token that adds no character shares the stretch of the token before, if it is a byte of that token's last
    character, or else, if its characters are still to come, that of the token after.
    """
    furthest = max(end for _, end in offsets)
    stretches: list[tuple[int, int]] = []
    reached, waited = 0, False  # end of the tokens before, and whether the last of them waits for characters
    for start, end in offsets:
        now = length if end == furthest else max(end, reached)
        waits = now == reached <= start
        if stretches and (waited or (now == reached and not waits)):
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
        else:
            stretches.append((reached, 1))
        reached, waited = now, waits
    if len(stretches) > 1 and stretches[-1][0] >= length:  # nothing is left for the last one
        (start, tokens), (_, more) = stretches[-2:]
        stretches[-2:] = [(start, tokens + more)]
    return stretches


def align_logprobs(
    logprobs: NDArray[np.float32], edges: NDArray[np.float64], to_edges: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return log-probabilities of the tokens between ``to_edges``, from those of the tokens between ``edges``.

    Args:
        logprobs: ``[m]`` float32, finite, at most 0.
        edges: ``[m + 1]``, of :func:`token_edges`.
        to_edges: ``[n + 1]``, of the same text; may end before it.

    Returns:
        ``[n]`` float32, at most 0; ``logprobs`` themselves, bit for bit, where the edges are the same.

    Raises:
        ValueError: if ``logprobs`` and ``edges`` differ in number, or the text has no reference tokens.
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
