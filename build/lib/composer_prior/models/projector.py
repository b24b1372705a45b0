"""The projector, from the width of a vision tower to that of the language model."""

from typing import Literal

from torch import nn


def build_projector(name: Literal["linear", "mlp"], width_in: int, width_out: int, freeze: bool = False) -> nn.Module:
    """From the tower's width to the LM's: ``linear``, or ``mlp``, two layers with a GELU between (LLaVA-1.5)."""
    if name == "linear":
        projector: nn.Module = nn.Linear(width_in, width_out)
    elif name == "mlp":
        projector = nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
    else:
        raise ValueError(f"model.projector.name={name!r}: expected `linear` or `mlp`.")
    return projector.requires_grad_(not freeze)
