"""Floating-point operations of a run, against those that its layers must do."""

import pytest
import torch
from common.models import small_lvlm
from common.training import fit

from composer_prior import PRIOR
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.training.monitors import ComputeMonitor


def count(model, spec, monitor, duration="1ba", algorithms=(), **changes):
    """``compute/flops`` after each step, and the trainer."""
    trainer, logged = fit(model, spec, algorithms, duration, [monitor], **changes)
    return [flops for _, flops in logged["compute/flops"]], trainer


def by_hand(model, batch):
    """A forward and a backward pass of a patch-embedding model: each product thrice, but the first layer's twice."""
    language, patches = model.model.causal_lm, batch["pixel_patches"]
    rows = batch["input_ids"].numel()
    layers = [m for name, m in language.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    linear = 3 * sum(2 * m.weight.numel() * rows for m in layers)
    config = language.config
    batch_size, length = batch["input_ids"].shape
    # Two products of queries, keys and values, all pairs of positions; the backward pass has five.
    attention = config.num_hidden_layers * (2 + 5) * 2 * batch_size * length**2 * config.hidden_size
    head = 3 * 2 * language.lm_head.weight.numel() * int((batch["labels"] != IGNORE_INDEX).sum())
    embedding = model.model.model.vision_tower
    weights = sum(p.numel() for p in embedding.parameters() if p.ndim == 2)
    return linear + attention + head + 2 * 2 * weights * patches.shape[0] * patches.shape[1]


def test_a_step_is_counted(tokenizer, make_spec, make_batch):
    model = small_lvlm("patches", tokenizer)
    flops, _ = count(model, make_spec(model), ComputeMonitor(interval=1))
    assert flops[0] == pytest.approx(by_hand(model, make_batch(model)), rel=0.02)


def test_steps_between_are_reckoned_by_their_tokens(tokenizer, make_spec):
    every, _ = count(
        small_lvlm("patches", tokenizer), make_spec(small_lvlm("patches", tokenizer)), ComputeMonitor(1), "6ba"
    )
    few, _ = count(
        small_lvlm("patches", tokenizer), make_spec(small_lvlm("patches", tokenizer)), ComputeMonitor(3), "6ba"
    )
    assert few[0] == every[0]
    assert few[1] != every[1]
    assert few == sorted(few)
    assert few[-1] == pytest.approx(every[-1], rel=0.1)


def test_a_live_reference_is_counted(tokenizer, make_spec, reference):
    counts = []
    for algorithms in ([], [PRIOR(reference)]):
        model = small_lvlm("encoder", tokenizer)
        flops, _ = count(model, make_spec(model), ComputeMonitor(), algorithms=algorithms)
        counts += flops
    assert counts[1] > counts[0]


def test_microbatches_change_little(tokenizer, make_spec):
    """Their padding differs."""
    counts = []
    for microbatch in (None, 3):
        model = small_lvlm("patches", tokenizer)
        flops, _ = count(model, make_spec(model), ComputeMonitor(), device_train_microbatch_size=microbatch)
        counts += flops
    assert counts[1] == pytest.approx(counts[0], rel=1e-3)


def test_the_count_goes_on_after_a_resumption(tokenizer, make_spec, tmp_path):
    model = small_lvlm("patches", tokenizer)
    whole, _ = count(model, make_spec(model), ComputeMonitor(1), "4ba")
    model = small_lvlm("patches", tokenizer)
    _, trainer = count(model, make_spec(model), ComputeMonitor(1), "2ba")
    checkpoint = trainer.save_checkpoint(str(tmp_path / "half.pt"))
    trainer.close()
    resumed, _ = count(
        small_lvlm("patches", tokenizer), make_spec(model), ComputeMonitor(1), "4ba", load_path=checkpoint
    )
    assert resumed == whole[2:]
