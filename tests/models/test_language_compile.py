"""The compiled model is the model."""

import copy
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from composer_prior import ComposerLVLM
from composer_prior.data.tokenizer import add_image_tokens
from composer_prior.models.language import prepare_compile

pytestmark = pytest.mark.slow

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.fixture
def model():
    words = {token: i for i, token in enumerate(SPECIAL.values())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<eos>")), **SPECIAL)
    add_image_tokens(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(17)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **sizes))
    prepare_compile()
    prepare_compile()  # once is enough
    return ComposerLVLM(lm, tokenizer)


def make_batches():
    batches = [torch.randint(0, 64, (3, length)) for length in (7, 12, 9)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in batches]


def test_losses_and_gradients_of_the_traced_model(model):
    original = copy.deepcopy(model)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for batch in make_batches():
        losses = [run(batch)["nll"].mean() for run in (compiled, original)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for ours, expected in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_losses_of_the_compiled_model(model):
    compiled = torch.compile(model, dynamic=True)
    for batch in make_batches():
        torch.testing.assert_close(compiled(batch)["nll"], model(batch)["nll"], rtol=1e-5, atol=1e-5)
