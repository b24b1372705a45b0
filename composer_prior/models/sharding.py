"""FSDP2: its configuration and checks, wrapping, and what a sharded model needs afterwards.

With FSDP2 the first rank alone has weights before a model is sharded; those of the others are on the meta device.
"""

import os
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from composer.distributed.activation_checkpointing import generate_composer_model_check_fn
from composer.models import ComposerModel
from composer.utils import ParallelismConfig, dist
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from composer_prior.models.language import causal_lm_of, named_weights, parts_of

# Names a Python file that makes FSDP2 average gradients over gloo; FSDP2 is then accepted on CPUs. For tests.
ON_CPU = "COMPOSER_PRIOR_FSDP2_ON_CPU"


@dataclass
class ShardingConfig(FSDP2Config):
    """FSDP2's configuration in Composer, with several copies of the model (HSDP) as Composer's FSDP1 has them.

    Args:
        data_parallel_replicate_degree: copies of the model, each sharded among as many ranks; None: one among all.
    """

    device_mesh: Any = field(default=None, init=False)  # Composer makes it
    data_parallel_replicate_degree: int | None = None


def build_parallelism(config: Mapping[str, Any] | None, planned: bool = False) -> ParallelismConfig | None:
    """Build Composer's configuration of sharding from ``{fsdp2: {...}}``, which Composer ignores in a dict.

    Args:
        config: the recipe's ``parallelism_config``.
        planned: for a run on another machine, which has GPUs. Default: ``False``.

    Raises:
        ValueError: for values with which Composer fails later or which it ignores, and without a GPU.
    """
    fsdp2 = None if config is None else config.get("fsdp2")
    if fsdp2 is None:
        return None
    if not (planned or torch.cuda.is_available() or ON_CPU in os.environ):
        raise ValueError("fsdp2 needs GPUs; leave parallelism_config out to train with DDP.")
    built = ShardingConfig(**fsdp2)
    for name, accepted in (("mixed_precision", ("DEFAULT", "PURE", "FULL")), ("state_dict_type", ("sharded", "full"))):
        value = getattr(built, name)
        if value not in accepted:
            raise ValueError(f"fsdp2.{name}={value!r}: expected {' or '.join(accepted)}")
    copies, ranks = built.data_parallel_replicate_degree, dist.get_world_size()
    if copies is not None and (copies < 1 or ranks % copies):
        raise ValueError(f"fsdp2.data_parallel_replicate_degree={copies}: expected a divisor of the {ranks} ranks")
    return ParallelismConfig(fsdp2=built)


def check_checkpointing(parallelism: Mapping[str, Any] | None, model: ComposerModel) -> None:
    """Raise a ValueError for activation checkpointing or offloading that matches no part of a model.

    Composer ignores it. ``parallelism`` is the recipe's ``parallelism_config``; the model needs no weights.
    """
    fsdp2 = (parallelism or {}).get("fsdp2") or {}
    asked = [key for key in ("activation_checkpointing", "activation_cpu_offload") if fsdp2.get(key)]
    if asked and not any(map(generate_composer_model_check_fn(model), model.modules())):
        raise ValueError(
            f"parallelism_config.fsdp2.{asked[0]}=true matches no part of {type(model).__name__}: its language model "
            "names no transformer blocks. Leave the key out, or give the model an activation_checkpointing_fn."
        )


def prepare_sharded(model: nn.Module) -> None:
    """Give a model that FSDP2 may have sharded what it still needs: all tensors, and a frozen tower apart."""
    if ON_CPU in os.environ and not torch.cuda.is_available():
        runpy.run_path(os.environ[ON_CPU])
    lvlm: Any = getattr(model, "model", None)
    if lvlm is not None and isinstance(causal_lm_of(lvlm), PreTrainedModel):
        sharded = isinstance(lvlm, FSDPModule)
        if sharded and dist.get_world_size() > 1:
            share_tensor_attributes(lvlm, causal_lm_of(lvlm).device)
        tower = parts_of(lvlm).get("vision")
        trained = {name.partition(".")[0] for name, weight in named_weights(lvlm) if weight.requires_grad}
        if tower is not None and "vision" not in trained:  # a projector in it may be trained
            for module in tower.modules():
                frozen = not any(parameter.requires_grad for parameter in module.parameters())
                if isinstance(module, FSDPModule) and frozen:  # a backward pass does not reach it
                    module.set_unshard_in_backward(False)  # so that it is not gathered again


def shard_from_first_rank(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Shard a model block by block, each when it has the first rank's weights; then no other block is whole.

    The model, ``root``, is on the meta device but for the first rank. No block is within another.
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
        torch.distributed.broadcast(value, 0)
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
                torch.distributed.broadcast(shared, 0)
                setattr(module, name, shared)
