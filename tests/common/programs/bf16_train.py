"""``train.py`` without Composer's refusal of bf16 on a CPU, so that FSDP2's policy is what a GPU gets."""

import sys

import composer.core.precision
import composer.distributed.prepare_distributed
import composer.trainer.trainer

from composer_prior.commands.cli import main

if __name__ == "__main__":
    for module in (composer.core.precision, composer.distributed.prepare_distributed, composer.trainer.trainer):
        module._validate_precision = lambda precision, device: None
    main(["train", *sys.argv[1:]])
