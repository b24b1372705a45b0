"""FSDP2 by block, for a model whose weights the first rank alone has; those of the others are on the meta device."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard


def shard_from_first_rank(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Shard a model block by block, each when it has the first rank's weights; then no other block is whole.

    Args:
        root: the model, on the meta device but for the first rank.
        blocks: units of their own, none within another.
        device: where the model computes.
    """
    within = {module for block in blocks for module in block.modules()}
    for unit in (*blocks, root):
        _fill([module for module in unit.modules() if unit is not root or module not in within], device)
        fully_shard(unit)
    share_tensor_attributes(root, device)


def _fill(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Give modules the weights and buffers of the first rank; what several share, they share afterwards."""
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            places.setdefault(tensor, []).append((module, name))
    for tensor, where in places.items():
        value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
        dist.broadcast(value, 0)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        for module, name in where:
            setattr(module, name, value)


def share_tensor_attributes(model: nn.Module, device: torch.device) -> None:
    """Give every rank the tensors that modules of the first keep in plain attributes, as rotary frequencies are."""
    for module in model.modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, Tensor):
                shared = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
                dist.broadcast(shared, 0)
                setattr(module, name, shared)
