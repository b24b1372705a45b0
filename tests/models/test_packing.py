"""A packed row gives what padded sequences give."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from composer_prior.models import packing
from composer_prior.models.language import last_hidden_states
from composer_prior.models.packing import enable_packing, packed_hidden_states

pytestmark = pytest.mark.usefixtures("device")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 48},
    "gpt2": {},
}


def build(family: str, **arguments):
    torch.manual_seed(17)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family], **arguments)
    return AutoModelForCausalLM.from_config(config).eval()


def make_batch():
    torch.manual_seed(18)
    lengths = torch.tensor([9, 3, 12, 1])
    return torch.randn(4, 12, 32), (torch.arange(12) < lengths[:, None]).long()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_padded_sequences(family: str):
    model = build(family)
    embeddings, mask = make_batch()
    results = []
    for packed in (False, True):
        if packed:
            enable_packing(model)
        model.zero_grad()
        inputs = embeddings.clone().requires_grad_()
        if packed:
            hidden = packed_hidden_states(model, inputs[mask.bool()], mask)
        else:
            hidden = last_hidden_states(model, inputs_embeds=inputs)[mask.bool()]
        hidden.square().sum().backward()
        gradients = [p.grad for p in model.base_model.parameters() if p.grad is not None and p.grad.any()]
        results.append([hidden, inputs.grad, *gradients])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * max(1, float(expected.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_lengths_are_read_once_for_all_layers(family: str, recomputed: bool, monkeypatch):
    """A device is waited for each time, also in recomputation."""
    read, of_mask = [], packing._by_length
    model = build(family).train()
    enable_packing(model)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(packing, "_by_length", lambda mask: read.append(mask) or of_mask(mask))
    embeddings, mask = make_batch()
    packed_hidden_states(model, embeddings[mask.bool()].requires_grad_(), mask).sum().backward()
    assert len(read) == 1


def test_a_sequence_does_not_see_the_others():
    model = build("llama")
    enable_packing(model)
    embeddings, mask = make_batch()
    hidden = packed_hidden_states(model, embeddings[mask.bool()], mask)
    embeddings[0] += 1.0
    changed = packed_hidden_states(model, embeddings[mask.bool()], mask)
    first = int(mask[0].sum())
    assert not torch.allclose(changed[:first], hidden[:first])
    assert torch.equal(changed[first:], hidden[first:])


def test_what_is_not_packed_is_read_as_before():
    model = build("llama")
    ids = torch.randint(0, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left, as for generation
    expected = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    enable_packing(model)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)
    packed = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(packed, generated)


def test_language_model_that_cannot_is_refused():
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="cannot keep packed sequences apart"):
        enable_packing(model)
    assert model.config._attn_implementation != "packed_sdpa"


def test_attention_that_may_do_more_than_sdpa_is_refused():
    """Sinks and caps of the eager attention, which packing would leave out without a word."""
    config = AutoConfig.for_model("gemma2", **SIZES, head_dim=8, num_key_value_heads=2, attn_logit_softcapping=5.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"its attention being 'eager' and not 'sdpa': leave model\.pack false"):
        enable_packing(model)


def test_window_of_attention_is_respected():
    model = build("qwen2")
    enable_packing(model)
    model.config.sliding_window = 8
    embeddings, mask = make_batch()
    with pytest.raises(ValueError, match="attention window of 8"):
        packed_hidden_states(model, embeddings[mask.bool()], mask)
