"""Logged statistics of the weights of a step, from sums over microbatches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor


def token_sums(weights: Tensor, nll: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return sums over tokens, in float64. The host does not wait for an accelerator, as in :func:`heaviest`.

    Args:
        weights: ``[B, T]``.
        nll: ``[B, T]``, the model's negative log-likelihood of each token.
        mask: ``[B, T]`` bool, True on the tokens.
    """
    terms = {
        "count": mask,
        "weight": weights,
        "squares": weights**2,
        "loss_weighted": weights * nll,
        "loss_unweighted": nll,
    }
    return {name: term.where(mask, 0).sum(dtype=torch.float64) for name, term in terms.items()}


def heaviest(weights: Tensor, count: Tensor) -> Tensor:
    """Return the weight of the heaviest tenth of the tokens in float64, the sum ``top`` of :func:`summary`.

    Args:
        weights: ``[n]``, 0 or more; those of no token are 0.
        count: of the tokens, a tensor without dimensions.
    """
    rising = torch.nn.functional.pad(weights, (0, 1)).sort(descending=True).values.cumsum(0, dtype=torch.float64)
    return rising.gather(0, ((count + 9) // 10 - 1).clamp(min=0).long()[None])[0]


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the logged values: effective sample size, share of the heaviest tenth, and the mean of every further sum.

    Args:
        sums: of :func:`token_sums` and :func:`heaviest` (``top``), and any others over the tokens that are weighted,
            of which there are ``weighted``; without those no mean of the others is returned.

    Returns:
        nothing, if there are no tokens.
    """
    further = dict(sums)
    count, weight, squares, top = (further.pop(name) for name in ("count", "weight", "squares", "top"))
    if not count:
        return {}
    tokens = dict.fromkeys(further, further.pop("weighted"))
    tokens |= dict.fromkeys(("loss_weighted", "loss_unweighted"), count)
    return {
        "effective_sample_size": weight**2 / (count * squares) if squares else 0.0,
        "top_decile_share": top / weight if weight else 0.0,
        **{name: value / tokens[name] for name, value in further.items() if tokens[name]},
    }
