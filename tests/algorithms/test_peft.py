"""PRIOR with LoRA: on a language model that reads text alone, and on the language model inside an LVLM."""

import pytest
import torch
from common.models import FAMILIES, full_logits, small_lm, small_lvlm
from composer import Trainer
from composer.core import Callback
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image

from composer_prior import PRIOR, ComposerLVLM, ImageTextModel, ReferenceLM, importance_weights
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.models.language import head_of, last_hidden_states, parts_of

TOLERANCE = 1e-5


LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"  # and nothing of the tower or the projector


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
def test_a_language_model_on_text_alone(tokenizer, make_spec, make_batch, reference, microbatch):
    model = ComposerLVLM(get_peft_model(small_lm(tokenizer), lora()), tokenizer)
    batch = make_batch(None)
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"])
    logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = formula_gradients(model, dense_nll(logits, batch["labels"]), batch, scores)
    trainer, gradients = fit(model, make_spec(None), [PRIOR(reference)], microbatch)
    assert all("lora_" in name for name in gradients)
    assert len(gradients) == 12
    assert_same(gradients, expected)
    assert gradients.keys() <= trainer.state.model.state_dict().keys()


def wrapped_lvlm(family, tokenizer, wrap, **settings):
    whole = small_lvlm(family, tokenizer)
    model = wrap(whole.model)
    for part in ("vision", "projector"):  # PEFT has frozen all but its adapters
        parts_of(model)[part].requires_grad_(True)
    return ComposerLVLM(model, whole.processor, **settings)


def peft_model(model):
    return get_peft_model(model, lora(target_modules=LANGUAGE))


def injected(model):
    """Transformers' own way, which leaves the model's class as it is."""
    model.add_adapter(lora(target_modules=LANGUAGE))
    return model


def text_scores(reference, model, batch):
    drop = image_token_ids(model.tokenizer)
    return reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], drop)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("wrap", [peft_model, injected])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_of_an_lvlm(tokenizer, make_spec, make_batch, reference, family, wrap, pack):
    model = wrapped_lvlm(family, tokenizer, wrap, pack=pack)
    batch = make_batch(model)
    scores = text_scores(reference, model, batch)
    logits = full_logits(model.model, batch)
    expected = formula_gradients(model, dense_nll(logits, batch["labels"]), batch, scores)
    _, gradients = fit(model, make_spec(model), [PRIOR(reference)], 3)
    assert sum("lora_" in name for name in gradients) == 12
    assert not any("language" in name and "lora_" not in name for name in gradients)
    assert any("vision_tower" in name for name in gradients)
    assert any("multi_modal_projector" in name for name in gradients) == (family == "encoder")
    assert_same(gradients, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*language_model.*\.q_proj|.*lm_head"},
        {"target_modules": LANGUAGE, "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_an_adapted_head(tokenizer, make_spec, make_batch, reference, changes):
    model = wrapped_lvlm("patches", tokenizer, lambda whole: get_peft_model(whole, lora(**changes)))
    batch = make_batch(model)
    scores = text_scores(reference, model, batch)
    logits = full_logits(model.model, batch)
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
    model = wrapped_lvlm("patches", tokenizer, peft_model)
    images, texts = [Image.new("RGB", (48, 32))], [[[20, 30, 40]]]
    (caption,) = model.image_text_model.generate_captions(images, max_new_tokens=4)
    ((values,),) = model.image_text_model.text_logprobs(images, texts)
    ((bare,),) = small_lvlm("patches", tokenizer).image_text_model.text_logprobs(images, texts)
    assert values != pytest.approx(bare, abs=1e-2)
    merged = ImageTextModel(model.model.merge_and_unload(), model.processor)
    ((expected,),) = merged.text_logprobs(images, texts)
    assert values == pytest.approx(expected, abs=1e-4)
    assert merged.generate_captions(images, max_new_tokens=4) == [caption]


def test_a_reference_with_an_adapter(tokenizer, make_batch):
    lm = get_peft_model(small_lm(tokenizer, seed=1), lora())
    batch = make_batch(None)
    arguments = batch["input_ids"], batch["attention_mask"], batch["labels"]
    scores = PRIOR(lm).reference.logprobs(*arguments)
    assert torch.allclose(scores, ReferenceLM(lm.merge_and_unload()).logprobs(*arguments), atol=1e-4)


@pytest.mark.parametrize("pack", [False, True])
def test_prompt_tuning_is_refused(tokenizer, make_batch, pack):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    whole = small_lvlm("patches", tokenizer)
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adds virtual tokens .* use LoRA"):
        ComposerLVLM(get_peft_model(whole.model, config), whole.processor, pack=pack)(make_batch(whole))
