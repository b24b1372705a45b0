"""Preparation of the models for ``torch.compile``, also on the CPU."""

from typing import Any

import torch
from transformers import masking_utils


def prepare_compile() -> None:
    """Keep transformers' search for packed sequences out of compiled graphs.

    Traced, it makes every attention mask a full one, in code that the C++ compiler refuses (torch 2.7).
    """
    module: Any = masking_utils
    search = module.find_packed_sequence_indices
    if not getattr(search, "kept_out", False):
        module.find_packed_sequence_indices = torch.compiler.disable(search)
        module.find_packed_sequence_indices.kept_out = True
