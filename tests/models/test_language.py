"""Any causal LM of transformers: its own logits against ours, for values and gradients, or one line that refuses it."""

import pytest
import torch
import torch.nn.functional as F
from common.models import full_logits, small_lvlm
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from composer_prior import ComposerLVLM, ReferenceLM
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import build_tokenizer, image_token_ids
from composer_prior.models.build import make_lvlm
from composer_prior.models.head import TransformedHead, labelled_nll
from composer_prior.models.language import (
    build_language_model,
    check_head,
    head_of,
    last_hidden_states,
    prepare_compile,
)
from composer_prior.models.prior_lvlm import modeling_prior_lvlm
from composer_prior.models.vision import build_patches

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DEEPSEEK = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK |= {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {**WINDOWS, "final_logit_softcapping": 30.0},
    "gemma3_text": {**WINDOWS, "final_logit_softcapping": 30.0},
    "vaultgemma": {**WINDOWS, "final_logit_softcapping": 30.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**WINDOWS, "logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 12.0},
    "granitemoe": {"logits_scaling": 3.0, "embedding_multiplier": 12.0, "num_local_experts": 4},
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 4, "output_logit_soft_cap": 30.0},
    "phi": {},
    "phi3": {},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "bloom": {},
    "falcon": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "stablelm": {},
    "starcoder2": {},
    "persimmon": {},
    "nemotron": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "exaone4": WINDOWS,
    "ernie4_5": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "gpt_oss": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**DEEPSEEK, "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    "mamba": {"state_size": 8},
    "rwkv": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
}


def build(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(17)
    settings = {**SIZES, **FAMILIES.get(family, {}), **changes}
    if family == "rwkv":
        settings["attention_hidden_size"] = 32
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def enlarged(model: PreTrainedModel) -> PreTrainedModel:
    """With weights so large that its logits reach what scales and caps are for."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12 if parameter.std() < 0.05 else 4)
        model.get_output_embeddings().weight.mul_(20)
    return model


def losses_and_gradients(model: PreTrainedModel, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(family: str):
    """It is what a GPU is given in the place of none, for the causal kernel."""
    model = build(family)
    ids = torch.randint(3, VOCABULARY, (3, 12))
    without = last_hidden_states(model, input_ids=ids)
    masked = last_hidden_states(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(masked, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_models_own_logits(family: str):
    model = build(family)
    check_head(model, reads_embeddings=True)
    enlarged(model)
    ids = torch.randint(3, VOCABULARY, (3, 12))
    labels = ids.clone()
    labels[:, :3], labels[1, 9:] = IGNORE_INDEX, IGNORE_INDEX
    logits = model(input_ids=ids, use_cache=False).logits
    assert 20 < float(logits.detach().abs().max()) < 400
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected, expected_gradients = losses_and_gradients(model, theirs)
    size = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for inputs in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        nll, _ = labelled_nll(last_hidden_states(model, **inputs), head_of(model), labels)
        loss, gradients = losses_and_gradients(model, nll.sum() / (labels != IGNORE_INDEX).sum())
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        difference = torch.stack([(gradients[name] - wanted).norm() for name, wanted in expected_gradients.items()])
        assert float(difference.norm() / size) < 1e-5


def test_what_a_plain_model_has_for_a_head_is_a_bare_module():
    model = build("llama")
    assert head_of(model) is model.lm_head
    assert head_of(build("gemma3_text", final_logit_softcapping=None)).__class__ is nn.Linear


class Tempered(LlamaForCausalLM):
    """A model of tomorrow, whose logits change in a way that no known name tells."""

    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        output.logits = output.logits.clamp(-50, 50)
        return output


class Narrowed(LlamaForCausalLM):
    """MiniCPM's way: the head gets other hidden states than the decoder gave."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 1.5,), prepend=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Tempered, "Tempered changes its logits after the LM head, which is not supported"),
        (Narrowed, "Narrowed changes its hidden states before the LM head, which is not supported"),
    ],
)
def test_changes_that_no_configuration_names_are_seen_at_small_weights(kind, message):
    model = kind(build("llama", initializer_range=1e-3).config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        check_head(model.train())
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_cap_whose_name_is_not_known_is_seen_at_small_weights(monkeypatch: pytest.MonkeyPatch):
    model = build("gemma2", initializer_range=1e-3)
    check_head(model)
    monkeypatch.setattr(modeling_prior_lvlm, "LOGIT_SOFTCAPS", ())
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits after the LM head"):
        check_head(model)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("modernbert-decoder", {}, "changes its hidden states before the LM head"),
        ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64, "embedding_multiplier": 2.0}, "makes more of token ids"),
        (
            "gemma3n_text",
            {
                **WINDOWS,
                "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "activation_sparsity_pattern": [0.0, 0.0],
                "intermediate_size": [48, 48],
                "laurel_rank": 8,
            },
            "makes more of token ids than the embeddings in whose place images stand, which is not supported",
        ),
    ],
)
def test_language_models_that_cannot_read_images_are_refused_in_one_line(family, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        check_head(build(family, **changes), reads_embeddings=True)
    assert "\n" not in str(error.value)


def test_a_decoder_that_takes_other_arguments_is_refused_in_one_line():
    model = build("llama")
    model.model.forward = lambda input_ids=None, inputs_embeds=None: None
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM cannot be used as a language model: TypeError: .*$"):
        check_head(model)


def test_a_model_that_has_a_vision_tower_is_a_reference_and_no_language_model_for_another():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SIZES, **WINDOWS}
    model = build("gemma3", text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    check_head(model)
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration has a vision or audio tower of its own"):
        check_head(model, reads_embeddings=True)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("phi", {})]
)
def test_embeddings_grow_by_the_mean_to_a_multiple_of_64(family, changes, tokenizer, tmp_path):
    """Also of a model without weights, which has the same shapes and types; files may be in bfloat16."""
    rows = len(tokenizer) - 3
    build(family, **changes, vocab_size=rows).bfloat16().save_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    grown = build_language_model(tokenizer, pretrained=str(tmp_path))
    assert len(tokenizer) <= grown.config.vocab_size < len(tokenizer) + 64
    assert grown.config.vocab_size % 64 == 0
    for theirs, ours in (
        (before.get_input_embeddings(), grown.get_input_embeddings()),
        (before.get_output_embeddings(), grown.get_output_embeddings()),
    ):
        for old, new in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert len(new) == grown.config.vocab_size
            torch.testing.assert_close(new[:rows], old, rtol=0, atol=0)
            torch.testing.assert_close(new[rows:], old.mean(0).expand_as(new[rows:]))
    assert (grown.lm_head.weight is grown.get_input_embeddings().weight) == before.config.tie_word_embeddings
    with torch.device("meta"):
        skeleton = build_language_model(tokenizer, pretrained=str(tmp_path))
    assert {name: (value.shape, value.dtype) for name, value in skeleton.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in grown.state_dict().items()
    }
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float32}


def test_embeddings_that_hold_every_token_stay_as_they_are(tokenizer, tmp_path):
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    assert build_language_model(tokenizer, pretrained=str(tmp_path)).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(attention, tokenizer, tmp_path):
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    source = {"pretrained": str(tmp_path), "attn_implementation": attention}
    with torch.device("meta"):
        skeleton = build_language_model(tokenizer, **source)
    config = {"config": {"model_type": "llama", **SIZES}, "attn_implementation": attention}
    for model in (build_language_model(tokenizer, **source), build_language_model(tokenizer, **config), skeleton):
        assert model.config._attn_implementation == attention


def test_a_capped_reference_scores_as_its_own_logits_do():
    model = enlarged(build("gemma2"))
    ids = torch.randint(3, VOCABULARY, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 2, IGNORE_INDEX)
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[:, 1:-1].gather(2, ids[:, 2:, None])[..., 0]
    reference = ReferenceLM(model)
    torch.testing.assert_close(reference.logprobs(ids, torch.ones_like(ids), labels)[:, 2:], logprobs)
    for scores, wanted in zip(reference.score_texts(ids.tolist(), start=2), logprobs, strict=True):
        torch.testing.assert_close(scores, wanted)


def test_a_capped_language_model_in_an_lvlm(tokenizer, make_batch):
    """Its losses are those of the model's own logits, eager and with an adapter; smoothed losses are refused."""
    from peft import LoraConfig, get_peft_model

    batch = make_batch(small_lvlm("patches", tokenizer))
    settings = {**SIZES, **FAMILIES["gemma2"], "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    lm = enlarged(build_language_model(tokenizer, config={"model_type": "gemma2", **settings})).eval()
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    lvlm, processor = make_lvlm(lm, build_patches(32, patch_size=16, max_side=48), None, tokenizer)
    for wrapped in (lvlm, get_peft_model(lvlm, lora)):
        assert isinstance(head_of(wrapped), TransformedHead)
        with torch.no_grad():
            logits = full_logits(wrapped, batch)
            nll = ComposerLVLM(wrapped, processor)(batch)["nll"]
        has_label = batch["labels"] != IGNORE_INDEX
        expected = F.cross_entropy(logits[:, :-1][has_label[:, 1:]], batch["labels"][has_label], reduction="none")
        torch.testing.assert_close(nll[has_label], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"label_smoothing and an LM that caps its logits at 30\.0 do not combine"):
        ComposerLVLM(lm, tokenizer, label_smoothing=0.1)


def test_smoothed_losses_of_scaled_logits(tokenizer, make_batch):
    batch = make_batch(small_lvlm("patches", tokenizer))
    settings = {**SIZES, **FAMILIES["cohere"], "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    lm = enlarged(build_language_model(tokenizer, config={"model_type": "cohere", **settings}))
    parts = make_lvlm(lm, build_patches(32, patch_size=16, max_side=48), None, tokenizer)
    model = ComposerLVLM(*parts, label_smoothing=0.2).train()
    logits = full_logits(model.model, batch)[:, :-1].transpose(1, 2)
    expected = F.cross_entropy(logits, batch["labels"][:, 1:], label_smoothing=0.2)
    ours = model(batch)["smoothed_nll"].sum() / (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_caps_its_logits(tokenizer):
    prepare_compile()
    model = ComposerLVLM(enlarged(build("gemma2", vocab_size=len(tokenizer))), tokenizer)
    ids = torch.randint(5, 300, (2, 8))
    batch = {"input_ids": ids, "labels": ids.clone()}
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(batch)["nll"], model(batch)["nll"])


def test_a_model_on_the_meta_device_is_taken_at_its_word():
    with torch.device("meta"):
        model = build("gemma2")
    check_head(model, reads_embeddings=True)
    assert head_of(model).softcap == 30.0
    assert isinstance(model, Gemma2ForCausalLM)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_a_padded_table_has_rows_for_begin_as_the_mean_of_what_was_learned(beside, tied, tmp_path):
    """As Qwen's: 151,936 rows for 151,665 tokens; but a model of ours has learned them."""
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", "a", "cat", "sits"])}, "<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    model = build("llama", vocab_size=64, tie_word_embeddings=tied)
    with torch.no_grad():
        model.get_input_embeddings().weight[:4] *= 50
    folder = tmp_path / ("tokenizer" if beside else "model")
    model.save_pretrained(folder)
    tokenizer = build_tokenizer({"name": str(tmp_path / "tokenizer")})
    started = build_language_model(tokenizer, pretrained=str(folder), freeze=True)
    ids = list(image_token_ids(tokenizer))
    pairs = [(model.get_input_embeddings(), started.get_input_embeddings())]
    pairs.append((model.get_output_embeddings(), started.get_output_embeddings()))
    for before, after in pairs:
        learned = before.weight[:4] if beside else before.weight[[i for i in range(64) if i not in ids]]
        torch.testing.assert_close(after.weight[ids], learned.mean(0).expand(2, -1))
        others = [i for i in range(64) if i not in ids]
        assert torch.equal(after.weight[others], before.weight[others])
    with torch.no_grad():
        started.get_input_embeddings().weight[ids] = 7.0  # what training has made of them
    started.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    again = build_language_model(tokenizer, pretrained=str(tmp_path / "ours"))
    assert (again.get_input_embeddings().weight[ids] == 7).all()
