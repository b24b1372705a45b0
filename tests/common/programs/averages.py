"""FSDP2's gradients over a gloo that averages and one that adds up instead, with the patch of tests/common/gloo.py."""

import json
import sys

import torch
from composer.utils import dist
from torch.distributed import ReduceOp
from torch.distributed.fsdp import fully_shard

import common.gloo  # noqa: F401  the patch

reduce_scatter = torch.distributed.reduce_scatter_tensor


def adds_up(output, input, op=ReduceOp.SUM, group=None, async_op=False):  # as gloo of torch 2.7
    reduce_scatter(output, input, ReduceOp.SUM, group)


def averages(output, input, op=ReduceOp.SUM, group=None, async_op=False):
    adds_up(output, input, op, group)
    if op == ReduceOp.AVG:
        output.div_(torch.distributed.get_world_size(group))


def gradient():
    """Return what FSDP2 makes of gradients 1 and 2 of the two ranks."""
    model = fully_shard(torch.nn.Linear(1, 1, bias=False))
    model(torch.full((1, 1), 1.0 + dist.get_global_rank())).sum().backward()
    return model.weight.grad.full_tensor().item()


def main(out):
    dist.initialize_dist("cpu", timeout=120)
    found = {"its own": gradient()}
    for gloo in (adds_up, averages):
        torch.distributed.reduce_scatter_tensor = gloo
        found[gloo.__name__] = gradient()
    if dist.get_global_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
