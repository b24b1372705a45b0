"""The recipe at real scale on one rank, from nothing to its end, with every kind of tokenizer.

The reference starts from a pretrained language model with a tokenizer that knows nothing of images.
"""

import pytest
from common.real_scale import RECIPE, captions_of, check, pretrained, smaller
from common.recipes import losses
from common.tokenizers import KINDS
from safetensors.torch import load_file
from transformers import AutoTokenizer

from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_kind_of_tokenizer(here, kind, capsys):
    """Reference, scores and run, on one rank; then again, when all is there and is reused."""
    tokenizer = pretrained(kind, captions_of(here))
    overrides = smaller("parallelism_config=null", "reference.parallelism_config=null", "precision=fp32")
    train(load_recipe(RECIPE, overrides))
    check(capsys.readouterr().out)
    first = losses("runs/prior_vit_l_14_336")
    train(load_recipe(RECIPE, [*overrides, "autoresume=false"]))
    output = capsys.readouterr().out
    assert "Reference: reusing runs/reference_smollm2/model" in output
    assert "Scores: reusing s3://bucket/captions/scores" in output
    assert losses("runs/prior_vit_l_14_336") == first
    saved = AutoTokenizer.from_pretrained("runs/reference_smollm2/model")
    text = "two red hammers, photo 7"
    ids = saved(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(saved) == len(tokenizer) + 2
    weights = load_file("runs/reference_smollm2/model/model.safetensors")
    assert len(weights["model.embed_tokens.weight"]) == -(-len(saved) // 64) * 64
