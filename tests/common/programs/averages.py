"""FSDP2's gradients over a gloo that averages, one that adds up instead, and one that is wrong whatever it is asked."""

import json
import sys

import torch
from composer.utils import dist
from torch.distributed import ReduceOp
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from composer_prior.training.builders import average_over_gloo

reduce_scatter = torch.distributed.reduce_scatter_tensor
factors = _fsdp_collectives._get_gradient_divide_factors


def adds_up(output, input, op=ReduceOp.SUM, group=None, async_op=False):  # as gloo of torch 2.7
    reduce_scatter(output, input, ReduceOp.SUM, group)


def averages(output, input, op=ReduceOp.SUM, group=None, async_op=False):
    adds_up(output, input, op, group)
    if op == ReduceOp.AVG:
        output.div_(torch.distributed.get_world_size(group))


def is_wrong(output, input, op=ReduceOp.SUM, group=None, async_op=False):
    averages(output, input, op, group)
    output.mul_(3)


def gradient():
    """Print FSDP2's reduction of gradients 1 and 2 of the two ranks, or its refusal."""
    _fsdp_collectives._get_gradient_divide_factors = factors
    model = fully_shard(torch.nn.Linear(1, 1, bias=False))
    state = torch.get_rng_state()
    try:
        average_over_gloo(model)
    except RuntimeError as error:
        return str(error)
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.full((1, 1), 1.0 + dist.get_global_rank())).sum().backward()
    return model.weight.grad.full_tensor().item()


def main(out):
    dist.initialize_dist("cpu", timeout=120)
    found = {"its own": gradient()}
    for gloo in (adds_up, averages, is_wrong):
        torch.distributed.reduce_scatter_tensor = gloo
        found[gloo.__name__] = gradient()
    if dist.get_global_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
