"""Language models with recurrent layers: what padding, packing, beams and a cache would change is right or refused."""

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from composer_prior import ComposerLVLM, ImageTextModel
from composer_prior.models.build import lvlm_skeleton, make_lvlm
from composer_prior.models.language import check_head, head_of
from composer_prior.models.packing import enable_packing
from composer_prior.models.vision import build_patches

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
LINEAR = {f"linear_{name}": size for name, size in [("num_value_heads", 4), ("num_key_heads", 2)]}
FAMILIES = {
    "lfm2": {"full_attn_idxs": [1], "block_ff_dim": 48, "block_multiple_of": 8},
    "minimax": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8},
    "qwen3_next": {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **LINEAR, **EXPERTS}
    | {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "jamba": {**EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"use_mamba_kernels": False},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 48}
    | {"layer_types": ["mamba", "attention"]},
}
NO_EMBEDDINGS = {
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
}


def build(family, rows, std=0.3):
    torch.manual_seed(17)
    config = AutoConfig.for_model(family, vocab_size=rows, **SIZES, **(FAMILIES | NO_EMBEDDINGS)[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1 and std:
            torch.nn.init.normal_(weight, std=std)
    return model


def pictures():
    sizes = [(32, 32), (48, 16), (16, 16), (48, 48), (48, 16)]
    return [Image.effect_noise(size, 60 + 20 * number).convert("RGB") for number, size in enumerate(sizes)]


@pytest.mark.parametrize("family", [*FAMILIES, *NO_EMBEDDINGS])
def test_packing_is_refused_whatever_the_weights(family, tokenizer):
    with pytest.raises(ValueError, match="cannot keep packed sequences apart, since some of its layers are recurrent"):
        enable_packing(build(family, 64, std=0))
    config = {"model_type": family, **SIZES, **(FAMILIES | NO_EMBEDDINGS)[family]}
    with pytest.raises(ValueError, match="since some of its layers are recurrent: leave"):
        lvlm_skeleton(tokenizer, {"config": config}, pack=True)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_captions_and_likelihoods_are_those_of_single_images(family, tokenizer):
    language = build(family, len(tokenizer))
    model = ImageTextModel(*make_lvlm(language, build_patches(32, patch_size=16, max_side=48), None, tokenizer))
    images = pictures()
    alone = [model.generate_captions([one], max_new_tokens=8)[0] for one in images]
    assert model.generate_captions(images, max_new_tokens=8) == alone
    assert [c.text for c in model.generate(model.inputs(images), 8, probabilities=True)] == alone
    with pytest.raises(ValueError, match=r"num_beams=3: .* is recurrent, and its states follow no beam; use 1"):
        model.generate_captions(images[:1], num_beams=3)
    texts = [[[5, 6, 7], [8]], [[9, 10]], [[5, 6], [7, 8], [9]], [[11]], [[5, 12, 13]]]
    found = model.text_logprobs(images, texts)
    for one, some, values in zip(images, texts, found, strict=True):
        start = model.model.model.embed(**{k: v for k, v in model.inputs([one]).items() if k != "attention_mask"})
        for text, scores in zip(some, values, strict=True):
            ids = torch.tensor([text])
            whole = torch.cat([start, language.get_input_embeddings()(ids)], 1)
            logits = language(inputs_embeds=whole, use_cache=False).logits[0, start.shape[1] - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids.T)[:, 0]
            torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-4)


class NoEmbeddings(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)


def test_what_cannot_generate_from_images_is_refused_before_training(tokenizer):
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SIZES)
    tower = build_patches(32, patch_size=16, max_side=48)
    with pytest.raises(ValueError, match=r"NoEmbeddings cannot caption images \(its generate takes no inputs_embeds\)"):
        make_lvlm(NoEmbeddings(config), tower, None, tokenizer)
    ComposerLVLM(NoEmbeddings(config), tokenizer)  # on text alone it generates nothing


def test_states_that_one_batch_leaves_to_the_next_are_refused():
    model = LlamaForCausalLM(AutoConfig.for_model("llama", vocab_size=64, **SIZES))
    check_head(model, reads_embeddings=True)
    assert head_of(model) is model.lm_head
    model.model.layers[0].recurrent_states = None
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps the states of one batch for the next"):
        check_head(model)
