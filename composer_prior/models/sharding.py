"""Weights that the first rank alone has loaded, brought to the others, whose models are on the meta device."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict


def fill_from_first_rank(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the sharded model of every rank its part of the weights of the first.

    Args:
        model: after ``fully_shard``; on the meta device, but for the first rank.
        weights: whole and by name, of the first rank.
        device: where the model computes.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)
    for buffer in model.buffers():  # those that are in no state dict too
        dist.broadcast(buffer, 0)
    share_tensor_attributes(model, device)


def share_tensor_attributes(model: nn.Module, device: torch.device) -> None:
    """Give every rank the tensors that modules of the first keep in plain attributes, as rotary frequencies are."""
    for module in model.modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, Tensor):
                shared = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
                dist.broadcast(shared, 0)
                setattr(module, name, shared)
