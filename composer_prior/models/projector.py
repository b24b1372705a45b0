"""The projector, from the width of a vision tower to that of the language model."""

from typing import Literal

from torch import nn

from composer_prior.models.modeling_prior_lvlm import projector_layers


def build_projector(name: Literal["linear", "mlp"], width_in: int, width_out: int, freeze: bool = False) -> nn.Module:
    """From the tower's width to the LM's: ``linear``, or ``mlp``, two layers with a GELU between (LLaVA-1.5)."""
    return projector_layers(name, width_in, width_out).requires_grad_(not freeze)
