"""Logits of the labels alone: one vector product each, in place of one with the whole vocabulary."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.head import CHUNK_TOKENS, Head, TransformedHead, is_plain_linear, label_mask
from composer_prior.models.reference import left_pack


@torch.no_grad()
def label_logits(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return the logit of each label, ``[B, T]`` float32, 0 without a label.

    Args:
        hidden: ``[B, T, D]`` last hidden states of a causal LM.
        head: maps ``[n, D]`` hidden states to ``[n, V]`` logits.
        labels: ``[B, T]`` int64, not shifted; position 0 cannot be predicted.
    """
    mask = label_mask(labels)
    rows, targets = hidden[:, :-1][mask[:, 1:]], labels[mask]
    given = TransformedHead.of(head)
    if is_plain_linear(given.module):
        logits = (rows.float() * F.embedding(targets, given.module.weight).float()).sum(-1)
        logits = given.transform(logits if given.module.bias is None else logits + given.module.bias[targets])
    else:
        parts = zip(rows.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        logits = torch.cat([given(part).float().gather(1, ids[:, None])[:, 0] for part, ids in parts])
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(mask, logits.float())


def on_text_alone(
    read: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, is_text: Tensor, labels: Tensor
) -> Tensor:
    """Read only the text of a batch, without gaps, and return a value for each label.

    Args:
        read: maps ids and labels ``[B, S]``, padded at the end, to a value of each label, ``[B, S]`` float32.
        input_ids: ``[B, T]`` int64.
        labels: ``[B, T]`` int64.
        is_text: ``[B, T]`` bool.

    Returns:
        ``[B, T]`` float32, 0 without a label, and NaN for a label with no text before it.
    """
    ids, targets, positions, _ = left_pack(input_ids, is_text, labels)
    found = read(ids, targets)
    found[:, 0].masked_fill_(targets[:, 0] != IGNORE_INDEX, torch.nan)
    return torch.zeros(labels.shape, device=labels.device).scatter(1, positions, found)
