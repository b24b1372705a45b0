"""The gradient of a step is the formula's, however the batch is cut: microbatches, ranks, shards."""

from functools import cache
from itertools import product

import pytest
import torch
from common.models import FAMILIES, small_lm, small_lvlm
from common.programs.one_step import NORMALIZATIONS, STRATEGIES, make_samples, step_gradients
from common.recipes import ROOT, launch

from composer_prior import ReferenceLM, importance_weights
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator

TOLERANCE = 1e-5


def relative_difference(ours, expected):
    assert ours.keys() == expected.keys()
    ours, expected = (torch.cat([g[name].double().flatten() for name in sorted(expected)]) for g in (ours, expected))
    return float((ours - expected).norm() / expected.norm())


@cache
def formula_gradients(family, tokenizer, normalization):
    """The formula on the whole batch with plain autograd: no Composer, no microbatches, no algorithm."""
    model = small_lvlm(family, tokenizer)
    batch = CaptionCollator(tokenizer.pad_token_id)(make_samples(model, tokenizer))
    reference = ReferenceLM(small_lm(tokenizer, seed=1), tokenizer)
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], model.image_token_ids)
    mask = batch["labels"] != IGNORE_INDEX
    weights = importance_weights(scores, mask, 1.5, normalization, 0.1)
    ((model(batch)["nll"] * weights).sum() / mask.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("microbatch", [None, 1, 3, 5])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_microbatches(tokenizer, family, normalization, microbatch):
    ours = step_gradients(family, tokenizer, normalization, microbatch)
    assert relative_difference(ours, formula_gradients(family, tokenizer, normalization)) <= TOLERANCE


@pytest.fixture(scope="module")
def two_ranks(tokenizer, tmp_path_factory):
    """Gradients of the same steps on two ranks of Composer's launcher, DDP and FSDP2 over gloo."""
    folder = tmp_path_factory.mktemp("two_ranks")
    tokenizer.save_pretrained(folder / "tokenizer")
    program = ROOT / "tests/common/programs/one_step.py"
    launch(None, program, folder / "tokenizer", folder / "gradients.pt")
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize(("strategy", "family", "normalization"), [*product(STRATEGIES, FAMILIES, NORMALIZATIONS)])
def test_two_ranks(tokenizer, two_ranks, strategy, family, normalization):
    ours = two_ranks[strategy, family, normalization]
    assert relative_difference(ours, formula_gradients(family, tokenizer, normalization)) <= TOLERANCE
