"""PRIOR with LoRA: through Composer's ``peft_config``, and on the language model inside an LVLM."""

import pytest
import torch
from common.models import FAMILIES, small_lm, small_lvlm
from composer import Trainer
from composer.core import Callback
from composer.models import HuggingFaceModel
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from composer_prior import LVLM, PRIOR, ComposerLVLM, ReferenceLM, importance_weights
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.language import head_of, last_hidden_states

TOLERANCE = 1e-5


def lora(**changes):
    """With both of its matrices random, so that it changes the model and both get gradients."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(
        **{"r": 4, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM", **changes}
    )


class Gradients(Callback):
    """Keep the gradients that the optimizer is about to use, by name."""

    def after_train_batch(self, state, logger):
        self.value = {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}


def fit(model, spec, algorithms, microbatch=None):
    """One step."""
    gradients = Gradients()
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration="1ba",
        optimizers=torch.optim.SGD(trainable, lr=0.1),
        algorithms=algorithms,
        callbacks=[gradients],
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        device="cpu",
        seed=0,
    )
    trainer.fit()
    return trainer, gradients.value


def flat(gradients):
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert float((flat(ours) - flat(expected)).norm() / flat(expected).norm()) <= TOLERANCE


def formula_gradients(model, nll, batch, ref_logprobs):
    """Gradients of the formula by plain autograd."""
    mask = batch["labels"] != IGNORE_INDEX
    weights = importance_weights(ref_logprobs, mask)
    model.zero_grad()
    ((nll * weights).sum() / mask.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def dense_nll(logits, labels):
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return torch.nn.functional.pad(nll, (1, 0))


@pytest.fixture
def reference(reference):
    """That of all tests, made so sure of some tokens that weights are far from equal."""
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(5)
    return reference


@pytest.mark.parametrize("microbatch", [None, 3])
def test_composers_peft_config(tokenizer, make_spec, make_batch, reference, microbatch):
    model = HuggingFaceModel(small_lm(tokenizer), tokenizer=tokenizer, use_logits=True, peft_config=lora())
    batch = make_batch(None)
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"])
    logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = formula_gradients(model, dense_nll(logits, batch["labels"]), batch, scores)
    trainer, gradients = fit(model, make_spec(None), [PRIOR(reference)], microbatch)
    assert all("lora_" in name for name in gradients)
    assert len(gradients) == 12
    assert_same(gradients, expected)
    # Composer keeps the adapters alone.
    assert all("lora_" in name for name in trainer.state.model.state_dict())


def wrapped_lvlm(family, tokenizer, wrap, **settings):
    model = small_lvlm(family, tokenizer).model
    lvlm = LVLM(model.vision, model.projector, wrap(model.language), tokenizer, **settings)
    return ComposerLVLM(lvlm)


def peft_model(lm):
    return get_peft_model(lm, lora())


def injected(lm):
    """Transformers' own way, which leaves the model's class as it is."""
    lm.add_adapter(lora())
    return lm


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("wrap", [peft_model, injected])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_of_an_lvlm(tokenizer, make_spec, make_batch, reference, family, wrap, pack):
    model = wrapped_lvlm(family, tokenizer, wrap, pack=pack)
    batch = make_batch(model)
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], model.image_token_ids)
    logits = model.model.language(inputs_embeds=model.model.embed(batch)).logits
    expected = formula_gradients(model, dense_nll(logits, batch["labels"]), batch, scores)
    _, gradients = fit(model, make_spec(model), [PRIOR(reference)], 3)
    assert sum("lora_" in name for name in gradients) == 12
    assert not any("language" in name and "lora_" not in name for name in gradients)
    assert_same(gradients, expected)


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
)
def test_an_adapted_head(tokenizer, make_spec, make_batch, reference, changes):
    model = wrapped_lvlm("patches", tokenizer, lambda lm: get_peft_model(lm, lora(**changes)))
    batch = make_batch(model)
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], model.image_token_ids)
    logits = model.model.language(inputs_embeds=model.model.embed(batch)).logits
    expected = formula_gradients(model, dense_nll(logits, batch["labels"]), batch, scores)
    _, gradients = fit(model, make_spec(model), [PRIOR(reference)])
    assert any("lm_head" in name for name in gradients)
    assert_same(gradients, expected)


def test_hidden_states_and_head_of_a_peft_model(tokenizer):
    model = get_peft_model(small_lm(tokenizer), lora())
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        logits = head_of(model)(last_hidden_states(model, input_ids=ids))
        assert torch.equal(logits, model(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.allclose(logits, model(input_ids=ids).logits)


def test_captions_of_a_peft_model(tokenizer):
    from PIL import Image

    model = wrapped_lvlm("patches", tokenizer, peft_model).model
    assert len(model.generate([Image.new("RGB", (48, 32))], max_new_tokens=4)) == 1


def test_a_reference_with_an_adapter(tokenizer, make_batch):
    lm = get_peft_model(small_lm(tokenizer, seed=1), lora())
    batch = make_batch(None)
    arguments = batch["input_ids"], batch["attention_mask"], batch["labels"]
    scores = PRIOR(lm).reference.logprobs(*arguments)
    assert torch.allclose(scores, ReferenceLM(lm.merge_and_unload()).logprobs(*arguments), atol=1e-4)


def test_prompt_tuning_is_refused(tokenizer, make_batch):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = wrapped_lvlm("patches", tokenizer, lambda lm: get_peft_model(lm, config))
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adds virtual tokens .* use LoRA"):
        model(make_batch(model))
