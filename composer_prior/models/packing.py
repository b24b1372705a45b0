"""Several sequences in one row: a language model that computes nothing on padding.

All real tokens of a batch stand in one row, with positions that start anew in each sequence. Everything but attention
works on tokens one by one; for attention alone the row is laid out as padded sequences again, each of which sees only
itself. It is exact, and pays by the share of padding, which is large where captions differ in length: a quarter of the
positions at a batch of 16 with 64 image tokens and captions of a log-normal length around 25.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from composer_prior.models.language import evaluating, hidden_size, is_recurrent, last_hidden_states

ATTENTION = "packed_sdpa"


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


def packed_hidden_states(model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Return ``[B, T, D]`` last hidden states, 0 on padding, of ``[B, T, D]`` embeddings after :func:`enable_packing`.

    ``attention_mask [B, T]`` is 1 on real positions, which come first in each sequence.
    """
    real = attention_mask.bool()
    window = getattr(model.config, "sliding_window", None)
    if window is not None and real.shape[1] > window:
        raise ValueError(f"Packed sequences of {real.shape[1]} tokens exceed the model's attention window of {window}.")
    places = real.flatten().nonzero()[:, 0]  # [N]
    positions = (real.long().cumsum(1) - 1).flatten()[places]
    row = embeddings.flatten(0, 1)[places]  # [N, D]
    # A mask of four dimensions reaches the attention function as it is.
    hidden = last_hidden_states(
        model, inputs_embeds=row[None], position_ids=positions[None], attention_mask=real.long()[None, None]
    )[0]
    return hidden.new_zeros(real.numel(), hidden.shape[1]).index_copy(0, places, hidden).view(*real.shape, -1)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention ``[1, H, N, d] -> [1, N, H, d]`` within each sequence of a packed row.

    ``attention_mask`` is ``[1, 1, B, T]`` int64, 1 on the real positions; any other means usual attention.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    real = attention_mask[0, 0]
    places = real.flatten().nonzero()[:, 0]  # [N]

    def pad(x: Tensor) -> Tensor:
        """``[1, H, N, d] -> [B, H, T, d]``."""
        x = x[0].transpose(0, 1)  # [N, H, d]
        padded = x.new_zeros(real.numel(), *x.shape[1:]).index_copy(0, places, x)
        return padded.view(*real.shape, *x.shape[1:]).transpose(1, 2)

    kwargs["is_causal"] = True  # padding comes after what is real
    out, _ = sdpa_attention_forward(module, pad(query), pad(key), pad(value), None, **kwargs)  # [B, T, H, d]
    return out.flatten(0, 1)[places][None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def _is_exact(model: PreTrainedModel) -> bool:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=model.device)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 4, hidden_size(model), generator=generator).to(model.device, model.dtype)
    with evaluating(model):
        expected = last_hidden_states(model, inputs_embeds=embeddings) * mask[..., None]
        packed = packed_hidden_states(model, embeddings, mask)
    return torch.allclose(packed.float(), expected.float(), atol=1e-3, rtol=1e-2)
