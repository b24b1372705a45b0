"""How likely texts are behind a common beginning, which goes through the model once."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from composer_prior.models.head import Head, target_logprobs
from composer_prior.models.language import is_recurrent
from composer_prior.models.reference import batches_by_length

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # of one pass, its beginning included


@torch.no_grad()
def continuation_logprobs(
    decoder: Any,
    head: Head,
    prefix: Mapping[str, Tensor],
    texts: Sequence[Sequence[Sequence[int]]],
    batch_tokens: int | None = None,
) -> list[list[list[float]]]:
    """``log P(text[t] | beginning, text[:t])`` of every token of the texts that go on from each of ``P`` beginnings.

    The head is applied on what predicts a token and nowhere else.

    Args:
        decoder: maps tensors to hidden states with a cache of keys and values: the part of a causal LM, or of an
            image-text-to-text model of transformers, that stands under its head. In evaluation mode.
        head: maps ``[n, D]`` hidden states to ``[n, V]`` logits.
        prefix: the decoder's input for the beginnings, of one length ``T``, without padding: ``inputs_embeds``
            ``[P, T, D]``, or ``input_ids`` ``[P, T]`` with the tensors of images; and ``attention_mask`` ``[P, T]``.
        texts: for each beginning the ids of its texts, each at least one token long.
        batch_tokens: positions of one pass, beginnings and padding included. Default: 4,096 on a CPU, else 65,536.

    Returns:
        for each beginning and each of its texts a float per token, in nats.

    Raises:
        ValueError: if the model keeps no keys and values that texts could go on from, and reads no embeddings.
    """
    counts = [len(some) for some in texts]
    ids = [text for some in texts for text in some]
    mask = prefix["attention_mask"]
    device = mask.device
    if not ids:
        return [[] for _ in texts]
    owners = torch.repeat_interleave(torch.tensor(counts))  # [N], the beginning of each text
    lengths = torch.tensor([len(text) for text in ids])
    again = is_recurrent(decoder)
    if again and "inputs_embeds" not in prefix:
        raise ValueError(
            f"{type(decoder).__name__} is recurrent: it keeps nothing that several texts could go on from."
        )
    start = decoder(**prefix, use_cache=not again)
    last = start.last_hidden_state[:, -1]  # [P, D], predicts the first token
    values: list[list[float]] = [[] for _ in ids]
    budget = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    for rows in batches_by_length(lengths + mask.shape[1], budget):
        padded = pad_sequence([torch.tensor(ids[row]) for row in rows.tolist()], batch_first=True).to(device)  # [b, s]
        owner = owners[rows].to(device)
        hidden = torch.cat([last[owner, None], _go_on(decoder, prefix, start, owner, padded[:, :-1])], 1)  # [b, s, D]
        real = (torch.arange(padded.shape[1]) < lengths[rows, None]).to(device)
        found = target_logprobs(hidden[real], head, padded[real]).cpu().split(lengths[rows].tolist())
        for row, scores in zip(rows.tolist(), found, strict=True):
            values[row] = scores.tolist()
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _go_on(decoder: Any, prefix: Mapping[str, Tensor], start: Any, owner: Tensor, ids: Tensor) -> Tensor:
    """Hidden states ``[b, s, D]`` of texts, each behind one of the beginnings."""
    if not ids.shape[1]:
        return start.last_hidden_state[owner, :0]
    mask = prefix["attention_mask"]
    if not isinstance(start.get("past_key_values"), DynamicCache):
        return _anew(decoder, prefix, owner, ids)
    cache = copy.copy(start.past_key_values)
    cache.layers = [copy.copy(layer) for layer in cache.layers]  # what is appended is appended to copies
    cache.batch_select_indices(owner)
    inputs: dict[str, Any] = {"attention_mask": mask.new_ones(len(ids), mask.shape[1] + ids.shape[1])}
    if getattr(decoder, "rope_deltas", None) is not None:  # Qwen-VL: an image takes fewer positions than tokens
        places = torch.arange(mask.shape[1], mask.shape[1] + ids.shape[1], device=ids.device)
        inputs["position_ids"] = (places + decoder.rope_deltas.reshape(-1, 1)[owner]).expand(3, -1, -1)
    return decoder(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).last_hidden_state


def _anew(decoder: Any, prefix: Mapping[str, Tensor], owner: Tensor, ids: Tensor) -> Tensor:
    """Return the same for a model without a cache, such as recurrent ones, by reading prefixes again."""
    if "inputs_embeds" not in prefix:
        raise ValueError(f"{type(decoder).__name__} keeps no keys and values that texts could go on from.")
    embedded = decoder.get_input_embeddings()(ids)
    whole = torch.cat([prefix["inputs_embeds"][owner].to(embedded.dtype), embedded], 1)
    return decoder(inputs_embeds=whole, use_cache=False).last_hidden_state[:, -ids.shape[1] :]


def same(values: Sequence[Any]) -> list[list[int]]:
    """Group the indices of equal values."""
    groups = defaultdict(list)
    for place, value in enumerate(values):
        groups[value].append(place)
    return [*groups.values()]
