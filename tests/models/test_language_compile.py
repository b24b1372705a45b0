"""The compiled model is the model."""

import copy
import shutil

import pytest
import torch
from common.models import small_lvlm
from common.programs.one_step import make_samples
from tokenizers import Tokenizer, models
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from composer_prior import ComposerLVLM
from composer_prior.data.batch import CaptionCollator
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


def unlike_batches(model, tokenizer):
    """Twenty batches of two to five samples, of unlike lengths and with unlike numbers of labels."""
    samples = make_samples(model, tokenizer)
    for number in range(20):
        some = [dict(samples[(number + 5 * place) % len(samples)]) for place in range(2 + number % 4)]
        for sample in some:
            end = len(sample["labels"]) - number % 3 * (len(sample["labels"]) > 40)
            sample |= {key: sample[key][:end] for key in ("input_ids", "labels", "image_related")}
        yield CaptionCollator(tokenizer.pad_token_id)(some)


@pytest.mark.parametrize(("family", "pack"), [("encoder", False), ("patches", True)])
def test_batches_of_unlike_lengths_are_traced_once(tokenizer, family, pack):
    """And give losses and gradients of the original. All before the head is one graph, and so is all behind it; the
    other family looks for its patches, and attention in packed rows for its sequences.
    """
    torch.compiler.reset()
    prepare_compile()
    model = small_lvlm(family, tokenizer, options={"pack": pack}, num_hidden_layers=1)
    model._needs_mask = not pack  # on a GPU the language model gets a mask, see last_hidden_states
    original, counter, counts = copy.deepcopy(model), CompileCounter(), []
    compiled = torch.compile(model, dynamic=True, backend=counter)
    for batch in unlike_batches(model, tokenizer):
        losses = [run(batch)["nll"].sum() for run in (compiled, original)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 20
    assert pack or counts[0] == 2
    for ours, expected in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4 * float(expected.grad.abs().max()))


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_losses_of_the_compiled_model(model):
    compiled = torch.compile(model, dynamic=True)
    for batch in make_batches():
        torch.testing.assert_close(compiled(batch)["nll"], model(batch)["nll"], rtol=1e-5, atol=1e-5)
