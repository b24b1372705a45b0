"""Several sequences in one row: a language model that computes nothing on padding.

All real tokens of a batch stand in one row, with positions that start anew in each sequence. Everything but attention
works on tokens one by one; for attention alone the row is laid out as sequences again, padded among those of similar
length, each of which sees only itself. It is exact. Each layer copies its queries, keys and values, and the first one
waits for the device a few times. It saves the share of padding, which is large where captions differ in length: a
quarter of the positions at a batch of 16 with 64 image tokens and captions of a log-normal length around 25.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from composer_prior.models.language import evaluating, hidden_size, is_recurrent, last_hidden_states

ATTENTION = "packed_sdpa"
_PARTS = WeakIdKeyDictionary()  # of the mask of a row: found once for all layers, as a device is waited for


def enable_packing(model: PreTrainedModel) -> None:
    """Let a causal LM read packed rows; whatever else it reads, it reads as before.

    Raises:
        ValueError: for an LM in whose attention sequences cannot be kept apart this way.
    """
    before = model.config._attn_implementation
    refusal = f"{type(model).__name__} cannot keep packed sequences apart"
    if is_recurrent(model):  # whose leaks are small at small weights
        raise ValueError(f"{refusal}, since some of its layers are recurrent: leave model.pack false.")
    if before not in ("sdpa", ATTENTION):  # others know caps and sinks, which this one would leave out
        raise ValueError(f"{refusal}, its attention being {before!r} and not 'sdpa': leave model.pack false.")
    try:
        model.set_attn_implementation(ATTENTION)
        works = model.device.type == "meta" or _is_exact(model)  # a skeleton has nothing to compute with
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        works = False
    if not works:
        model.set_attn_implementation(before)
        raise ValueError(f"{refusal}: leave model.pack false.")


def packed_hidden_states(model: PreTrainedModel, row: Tensor, attention_mask: Tensor) -> Tensor:
    """Return ``[N, D]`` last hidden states of the ``[N, D]`` embeddings in a row, after :func:`enable_packing`.

    ``attention_mask [B, T]`` is 1 on the ``N`` real positions, which come first in each sequence.
    """
    real = attention_mask.bool()
    window = getattr(model.config, "sliding_window", None)
    if window is not None and real.shape[1] > window:
        raise ValueError(f"Packed sequences of {real.shape[1]} tokens exceed the model's attention window of {window}.")
    positions = (real.long().cumsum(1) - 1)[real]
    # A mask of four dimensions reaches the attention function as it is.
    return last_hidden_states(
        model, inputs_embeds=row[None], position_ids=positions[None], attention_mask=real.long()[None, None]
    )[0]


@torch.compiler.disable  # the lengths of sequences differ from batch to batch
def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention ``[1, H, N, d] -> [1, N, H, d]`` within each sequence of a packed row.

    ``attention_mask`` is ``[1, 1, B, T]`` int64, 1 on the real positions; any other means usual attention. Sequences of
    similar length are padded to the longest of them, which at most doubles any.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = True  # padding comes after what is real
    given = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, H, d]
    parts, order = [], []
    if attention_mask not in _PARTS:
        _PARTS[attention_mask] = [*_by_length(attention_mask[0, 0])]
    for places, real, inside in _PARTS[attention_mask]:

        def pad(x: Tensor, places: Tensor = places, real: Tensor = real, inside: Tensor = inside) -> Tensor:
            """``[N, H, d] -> [b, H, t, d]``."""
            padded = x.new_zeros(real.numel(), *x.shape[1:]).index_copy(0, inside, x[places])
            return padded.view(*real.shape, *x.shape[1:]).transpose(1, 2)

        q, k, v = map(pad, given)
        out, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)  # [b, t, H, d]
        parts.append(out.flatten(0, 1)[inside])
        order.append(places)
    whole = torch.cat(parts)
    return torch.empty_like(whole).index_copy(0, torch.cat(order), whole)[None], None


def _by_length(real: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for sequences of similar length their places in the row ``[n]``, and which of ``[b, t]`` are real.

    These come as a mask, and as places ``[n]`` when it is flat.
    """
    lengths = real.sum(1)
    starts, kinds = lengths.cumsum(0) - lengths, [(length - 1).bit_length() for length in lengths.tolist()]
    for kind in sorted({*kinds}):
        chosen = torch.tensor([number for number, one in enumerate(kinds) if one == kind], device=real.device)
        inside = torch.arange(int(lengths[chosen].max()), device=real.device)
        mine = inside < lengths[chosen, None]
        yield (starts[chosen, None] + inside)[mine], mine, mine.flatten().nonzero()[:, 0]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def _is_exact(model: PreTrainedModel) -> bool:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=model.device)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 4, hidden_size(model), generator=generator, device="cpu")
    embeddings = embeddings.to(model.device, model.dtype)
    with evaluating(model):
        expected = last_hidden_states(model, inputs_embeds=embeddings)
        packed = packed_hidden_states(model, embeddings[mask.bool()], mask)
    return torch.allclose(packed.float(), expected[mask.bool()].float(), atol=1e-3, rtol=1e-2)
