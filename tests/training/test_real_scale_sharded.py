"""The recipe at real scale on two ranks, which keep a part of the model each."""

from pathlib import Path

import torch
from common.real_scale import RECIPE, captions_of, check, pretrained, smaller
from common.recipes import ROOT, fork_ranks, launch

from composer_prior.training.checkpoints import find_weights, read_weights


def test_on_two_ranks_sharded(here):
    pretrained("smollm2", captions_of(here))
    check(launch(here, str(ROOT / "train.py"), str(RECIPE), *smaller("precision=fp32")))
    checkpoint = Path("runs/prior_vit_l_14_336/checkpoints/ep1-ba2")
    assert {path.name for path in checkpoint.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_on_two_ranks_sharded_in_bf16(here):
    """The precision that ships: FSDP2 lowers the weights, and captions at the end are made with them."""
    pretrained("llama2", captions_of(here))
    check(fork_ranks(here, str(ROOT / "tests/common/programs/bf16_train.py"), str(RECIPE), *smaller()))
    weights, _ = read_weights(find_weights("runs/prior_vit_l_14_336"))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
