"""What two ranks have of a model after FSDP2, and of a sharded reference; run by tests/training/test_sharding.py."""

import sys

import torch
from composer import Trainer
from composer.utils import dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer

from composer_prior.algorithms.prior.prior import PRIOR
from composer_prior.data.tokenizer import add_image_tokens
from composer_prior.models.sharding import build_parallelism, prepare_sharded
from composer_prior.training.builders import build_model


def model_config(folder):
    vision = {"name": "open_clip", "architecture": "prior-vit-tiny", "image_size": 24, "freeze": True}
    return {"name": "lvlm", "language": {"pretrained": folder}, "vision": vision, "projector": {"name": "mlp"}}


def sharded_model(folder, tokenizer):
    """Of each rank, what it had before and after; of the first, the whole weights and tensors outside of them too."""
    torch.manual_seed(dist.get_global_rank())  # the ranks would draw different weights
    parallelism = {"fsdp2": {"activation_checkpointing": True}}
    model = build_model(model_config(folder), tokenizer, parallelism)
    on_meta = [parameter.is_meta for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    trainer = Trainer(model=model, parallelism_config=build_parallelism(parallelism), device="cpu", progress_bar=False)
    model = trainer.state.model
    prepare_sharded(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    modules = dict(model.named_modules())
    return {
        "on_meta": set(on_meta),
        "before": before,
        "after": get_model_state_dict(model, options=options),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "attributes": {
            f"{name}.{key}": value.clone()
            for name, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        },
        "units": [name for name, module in modules.items() if isinstance(module, FSDPModule)],
        "gathered_in_backward": [
            name
            for name, module in modules.items()
            if isinstance(module, FSDPModule) and module._get_fsdp_state()._fsdp_param_group.unshard_in_backward
        ],
        "checkpointed": [name for name, module in modules.items() if isinstance(module, CheckpointWrapper)],
        "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    }


def sharded_reference(folder, tokenizer):
    """Log-probabilities by a reference of which each rank has a part, and the units that it is in."""
    prior = PRIOR(folder, shard_reference=True)
    prior.reference.shard("cpu")
    ids = torch.arange(24).view(3, 8) + 8
    logprobs = prior.reference.logprobs(ids, torch.ones_like(ids), ids)
    again = prior.reference.logprobs(ids, torch.ones_like(ids), ids)
    assert torch.equal(logprobs, again)
    names = [name for name, module in prior.reference.model.named_modules() if isinstance(module, FSDPModule)]
    parts = [parameter.to_local().numel() for parameter in prior.reference.model.parameters()]
    return {"ids": ids, "logprobs": logprobs, "units": names, "part": sum(parts)}


def main(folder, out):
    dist.initialize_dist("cpu", timeout=120)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_image_tokens(tokenizer)
    found = {"model": sharded_model(folder, tokenizer), "reference": sharded_reference(folder, tokenizer)}
    torch.save(found, f"{out}/rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
