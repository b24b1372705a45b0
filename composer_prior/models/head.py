"""The language-model head and the loss, on the positions that have a label only.

Labels follow Hugging Face: not shifted, so the hidden state at position ``t`` predicts ``labels[:, t + 1]``. Every
per-token tensor here is aligned with ``labels``.

The logits of all tokens would be the largest tensor of a training step by far. Here they are made a block of the
vocabulary at a time, ``[n, v]``, forward and again backward: each block of the head's weight is read once and its
gradient written once, and what is held of the logits stays under a constant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from composer_prior.data.batch import IGNORE_INDEX

try:  # the extra `cuda`
    from cut_cross_entropy import linear_cross_entropy
except ImportError:
    linear_cross_entropy = None

# Logits held at once. On a CPU a block stays in the cache and below malloc's threshold for fresh pages from the system.
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
BLOCK_MULTIPLE = {"cpu": 1, "cuda": 128}
# Probabilities kept from forward to backward, which spares computing their blocks twice.
KEPT_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}
# Tokens whose logits are held at once where the head is more than a linear layer.
CHUNK_TOKENS = 256


@dataclass  # frozen, torch.compile could not make one
class TransformedHead:
    """A head whose logits the language model changes, as Cohere, Granite and Gemma 2 do."""

    module: Any  # maps ``[n, D]`` hidden states to ``[n, V]`` logits
    scale: float = 1.0  # factor of the logits
    softcap: float | None = None  # the scaled logits ``x`` become ``softcap * tanh(x / softcap)``

    @classmethod
    def of(cls, head: "Head") -> "TransformedHead":
        """Return the head; a bare module becomes one without a transformation of its logits."""
        return head if isinstance(head, cls) else cls(head)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.transform(self.module(hidden))

    def transform(self, logits: Tensor) -> Tensor:
        """Scale and cap the module's logits."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


Head: TypeAlias = nn.Module | TransformedHead  # maps ``[n, D]`` hidden states to ``[n, V]`` logits


def labelled_nll(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the labels, applying the head where there is a label and nowhere else.

    Args:
        hidden: ``[B, T, D]`` last hidden states of a causal LM.
        head: maps ``[n, D]`` hidden states to ``[n, V]`` logits.
        labels: ``[B, T]`` int64, ``IGNORE_INDEX`` where there is none; position 0 cannot be predicted.

    Returns:
        ``[B, T]`` float32 (float64 for float64 hidden states) negative log-likelihood in nats, 0 without a label, and
        ``[B, T]`` bool, True where the label is the most likely token.
    """
    rows, targets, mask = labelled(hidden, labels)
    nll, correct = linear_nll(rows, head, targets)
    return nll.new_zeros(labels.shape).masked_scatter(mask, nll), torch.zeros_like(mask).masked_scatter(mask, correct)


def linear_nll(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of a target per hidden state, never holding the logits of all.

    Call it inside the forward pass of the model: there FSDP has the head's weight together.

    Args:
        hidden: ``[n, D]`` hidden states; ``n`` may be 0.
        head: maps ``[n, D]`` hidden states to ``[n, V]`` logits.
        targets: ``[n]`` int64.

    Returns:
        ``[n]`` float32 (float64 for float64 hidden states) in nats, differentiable once, and ``[n]`` bool, True where
        the target is the most likely token.
    """
    return _implementation(hidden, head)(hidden, head, targets)


@torch.no_grad()
def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the log-probability of each target, ``[n]`` float32, with the arguments of :func:`linear_nll`."""
    return -linear_nll(hidden, head, targets)[0]


@torch.no_grad()
def label_logits(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return the logit of each label, ``[B, T]`` float32, 0 without a label: one vector product each.

    The arguments are those of :func:`labelled_nll`.
    """
    rows, targets, mask = labelled(hidden, labels)
    given = TransformedHead.of(head)
    if is_plain_linear(given.module):
        logits = (rows.float() * F.embedding(targets, given.module.weight).float()).sum(-1)
        logits = given.transform(logits if given.module.bias is None else logits + given.module.bias[targets])
    else:
        parts = zip(rows.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        logits = torch.cat([given(part).float().gather(1, ids[:, None])[:, 0] for part, ids in parts])
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(mask, logits.float())


def logits_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood ``[B, T]`` float32 of labels under full logits ``[B, T, V]``, 0 without a label.

    Raises:
        ValueError: if logits and labels are not aligned.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not aligned: expected [B, T, V] and "
            "[B, T], with the image positions inside both."
        )
    rows, targets, mask = labelled(logits, labels)
    nll = F.cross_entropy(rows.float(), targets, reduction="none")
    return nll.new_zeros(labels.shape).masked_scatter(mask, nll)


def weighted_mean(nll: Tensor, weights: Tensor | None, labels: Tensor) -> Tensor:
    """Sum of ``weights * nll`` over the labelled tokens divided by their number; weights of None count as 1."""
    count = (labels != IGNORE_INDEX).sum().clamp(min=1)
    return (nll if weights is None else nll * weights).sum() / count


def label_mask(labels: Tensor) -> Tensor:
    """``[B, T]`` bool: positions with a label that something stands before."""
    mask = labels != IGNORE_INDEX
    mask[:, 0] = False
    return mask


def labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states ``[n, D]`` that predict labels, the labels ``[n]``, and their places ``[B, T]`` bool.

    Args:
        hidden: ``[B, T, D]``.
        labels: ``[B, T]`` int64, not shifted.
    """
    mask = label_mask(labels)
    places = mask.flatten().nonzero()[:, 0]  # once: the host waits for an accelerator to know how many there are
    return hidden.flatten(0, 1).index_select(0, places - 1), labels.flatten().index_select(0, places), mask


def _implementation(hidden: Tensor, head: Head) -> Callable[[Tensor, Any, Tensor], tuple[Tensor, Tensor]]:
    module = TransformedHead.of(head).module
    if not is_plain_linear(module):
        return _any_head
    if linear_cross_entropy is not None and module.bias is None and _kernel_takes(hidden):
        return _cut_cross_entropy
    return _linear_head


def _kernel_takes(hidden: Tensor) -> bool:
    return hidden.is_cuda and len(hidden) > 0 and _product_dtype(hidden) in (torch.bfloat16, torch.float16)


def is_plain_linear(head: nn.Module) -> bool:
    """Return True if the head is its weight and bias alone, without an adapter, a hook such as FSDP's, or shards."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and type(head.weight) in (Tensor, nn.Parameter, FakeTensor)  # the last in a plan
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def _any_head(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By chunks of tokens, whose logits the backward pass computes anew."""
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    parts = [checkpoint(_dense, h, head, t, use_reentrant=False) for h, t in chunks]
    nll, correct = zip(*parts, strict=True)
    return torch.cat(nll), torch.cat(correct)


def _dense(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = _at_least_float32(head(hidden))
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


def _cut_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Run the library's kernel, and another pass for the most likely token, which the kernel does not return."""
    hidden, weight, _, softcap = _cast(hidden, head)
    assert linear_cross_entropy is not None
    nll = linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none")
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return nll.float(), _blockwise(hidden, weight, None, targets, softcap, kept_elements=0)[1]


def _linear_head(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight, bias, softcap = _cast(hidden, head)
    if hidden.device.type == "cpu" and len(targets) and not 0 <= targets.min() <= targets.max() < len(weight):
        raise IndexError(f"A target lies outside of the vocabulary of {len(weight)} tokens.")
    if torch.is_grad_enabled():
        return _LinearNLL.apply(hidden, weight, bias, targets, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        return _blockwise(hidden, weight, bias, targets, softcap, kept_elements=0)[:2]


class _LinearNLL(torch.autograd.Function):
    """Cross-entropy of a linear head. One product forward; backward two, and one for what was not kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        kept_elements = KEPT_ELEMENTS.get(hidden.device.type, 0)
        with torch.autocast(hidden.device.type, enabled=False):
            nll, correct, shares, slopes, kept = _blockwise(hidden, weight, bias, targets, softcap, kept_elements)
        ctx.softcap = softcap
        ctx.save_for_backward(hidden, weight, bias, targets, shares, slopes, *kept)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        """With ``p`` the probabilities: ``grad * (p - onehot) @ W`` and ``(p - onehot).T @ (grad * hidden)``.

        Under a soft cap each of ``p - onehot`` is times the cap's slope there.
        """
        if grad is None:
            return None, None, None, None, None
        hidden, weight, bias, targets, shares, slopes, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        target_grad = grad if slopes is None else grad * slopes  # [n]
        grad_hidden = -_at_least_float32(weight[targets]) if needs_hidden else None  # [n, D]
        if grad_hidden is not None and slopes is not None:
            grad_hidden.mul_(slopes[:, None])
        grad_weight = torch.empty_like(weight) if needs_weight else None  # [V, D]
        grad_bias = torch.empty_like(bias) if needs_bias else None  # [V]
        with torch.autocast(hidden.device.type, enabled=False):
            for number, block in enumerate(_blocks(len(hidden), len(weight), hidden.device)):
                if number < len(kept):
                    p = kept[number]
                else:
                    p = _logits(hidden, weight, bias, ctx.softcap, block)
                    slope = _slope(p, ctx.softcap)
                    p = _times(torch.softmax(p, 1, out=p), slope)
                p = p.to(hidden.dtype)  # [n, v], the probabilities within the block, times the cap's slopes
                share = shares[number, :, None]  # [n, 1], the probability of the block
                if grad_hidden is not None:
                    grad_hidden.addcmul_((p @ weight[block]).to(grad_hidden.dtype), share)
                row_scale = grad[:, None] * share
                if grad_weight is not None:
                    scaled = (hidden * row_scale).to(hidden.dtype)
                    grad_weight[block] = p.T @ scaled
                if grad_bias is not None:
                    grad_bias[block] = (row_scale.to(p.dtype).T @ p)[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad[:, None]).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, -(hidden * target_grad[:, None]).to(weight.dtype))
        if grad_bias is not None:
            grad_bias.index_add_(0, targets, -target_grad.to(grad_bias.dtype))
        return grad_hidden, grad_weight, grad_bias, None, None


def _blockwise(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, kept_elements: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Return what the backward pass needs of the head's blocks.

    Returns:
        negative log-likelihood ``[n]``; ``[n]`` True if the target is the most likely token; the probability of each
        block ``[blocks, n]``; the cap's slope at the targets ``[n]``; and the probabilities within the first blocks
        ``[n, v]`` times the cap's slopes, as far as memory allows.
    """
    tops, top_tokens, sums, kept = [], [], [], []
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    target_logits = torch.full(targets.shape, torch.nan, dtype=dtype, device=hidden.device)
    for block in _blocks(len(hidden), len(weight), hidden.device):
        logits = _logits(hidden, weight, bias, softcap, block)  # [n, v]
        local = (targets - block.start)[:, None]
        inside = (local >= 0) & (local < logits.shape[1])
        values = logits.gather(1, local.clamp(0, logits.shape[1] - 1))
        target_logits = torch.where(inside, values, target_logits[:, None])[:, 0]
        top, index = logits.max(1, keepdim=True)
        kept_elements -= logits.numel()
        slope = _slope(logits, softcap) if kept_elements >= 0 else None
        torch.softmax(logits, 1, out=logits)
        tops.append(top[:, 0])
        top_tokens.append(index[:, 0] + block.start)
        sums.append(logits.gather(1, index)[:, 0].reciprocal())  # of exp(logits - top): the top's own term is 1
        if kept_elements >= 0:
            kept.append(_times(logits, slope))
    top, best = torch.stack(tops).max(0)  # [n], relative to which the sums are exact however large the logits are
    block_sums = torch.stack(sums) * (torch.stack(tops) - top).exp()  # [blocks, n]
    total = block_sums.sum(0)
    correct = torch.stack(top_tokens).gather(0, best[None])[0] == targets
    nll = (top - target_logits) + total.log()
    return nll, correct, block_sums / total, _slope(target_logits, softcap), kept


def _blocks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Split the vocabulary into blocks of equal size except the last; on a GPU, of whole tiles of matrix products."""
    kind = device.type if device.type in BLOCK_ELEMENTS else "cuda"
    count = -(-vocabulary // max(256, BLOCK_ELEMENTS[kind] // max(tokens, 1)))
    size = -(-vocabulary // (count * BLOCK_MULTIPLE[kind])) * BLOCK_MULTIPLE[kind]
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, block: slice) -> Tensor:
    logits = _at_least_float32(hidden @ weight[block].T)
    if bias is not None:
        logits.add_(bias[block])
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """Return the derivative of the cap from its output; None without a cap."""
    return None if softcap is None else 1 - (capped / softcap).square_()


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x.mul_(factor)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _cast(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None, float | None]:
    """Return the factors of ``head(hidden)`` under autocast too, the scale in the hidden states, and its cap."""
    given = TransformedHead.of(head)
    weight, bias, dtype = given.module.weight, given.module.bias, _product_dtype(hidden)
    if given.scale != 1:
        hidden, bias = hidden * given.scale, None if bias is None else bias * given.scale
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), given.softcap


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
