"""PRIOR in Composer's Trainer: the loss, what the reference sees, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from common.chats import write_chats
from common.models import small_lm, small_lvlm
from composer import Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from models.test_conversations import SAMPLES, foreign, own

from composer_prior import PRIOR, ComposerLVLM, ReferenceLM, StreamingCaptionDataset, importance_weights
from composer_prior.algorithms.token_weighting.image_tokens import text_positions
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import caption_data_spec
from composer_prior.data.tokenizer import bos_id, image_token_ids, train_tokenizer


def fit(model, spec, algorithms=(), duration="3ba", **changes):
    """Train a few steps on the CPU and return the trainer and the losses."""
    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        max_duration=duration,
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        algorithms=list(algorithms),
        loggers=[memory],
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=0,
        device="cpu",
        **changes,
    )
    trainer.fit()
    return trainer, [value for _, value in memory.data["loss/train/total"]], memory


def weighted_loss(nll, weights, labels):
    """The paper's loss, by hand."""
    return float((nll.double() * weights.double()).sum() / (labels != IGNORE_INDEX).sum())


def test_alpha_zero_is_bitwise_next_token_prediction(tokenizer, make_spec, reference, lvlm):
    family = "encoder" if type(lvlm.model.model.vision_tower).__name__ == "OpenCLIPTower" else "patches"
    runs = []
    for algorithms in ((), (PRIOR(reference, alpha=0.0),)):
        model = small_lvlm(family, tokenizer)
        trainer, losses, _ = fit(model, make_spec(model), algorithms, device_train_microbatch_size=3)
        runs.append((losses, [p.clone() for p in trainer.state.model.parameters()]))
    (plain, plain_weights), (weighted, weights) = runs
    assert len(plain) == 3
    assert plain == weighted
    assert all(torch.equal(a, b) for a, b in zip(plain_weights, weights, strict=True))


@pytest.mark.parametrize("normalization", ["sequence", "none"])
@pytest.mark.parametrize("stored", [False, True])
def test_the_first_loss_is_the_formula(lvlm, make_spec, make_batch, reference, normalization, stored):
    batch = make_batch(lvlm)
    ref_logprobs = reference.logprobs(
        batch["input_ids"], batch["attention_mask"], batch["labels"], image_token_ids(lvlm.tokenizer)
    )
    weights = importance_weights(ref_logprobs, batch["labels"] != IGNORE_INDEX, 1.5, normalization, 0.2)
    with torch.no_grad():
        expected = weighted_loss(lvlm.eval()(batch)["nll"], weights, batch["labels"])
    spec = make_spec(lvlm)
    if stored:
        collate = spec.dataloader.collate_fn
        spec.dataloader.collate_fn = lambda samples: {**collate(samples), "ref_logprobs": ref_logprobs}
    algorithm = PRIOR(None if stored else reference, alpha=1.5, normalization=normalization, floor=0.2)
    _, losses, memory = fit(lvlm.train(), spec, [algorithm], duration="1ba")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    logged = {name: values[-1][1] for name, values in memory.data.items() if name.startswith("prior/")}
    kept = weights[batch["labels"] != IGNORE_INDEX].double()
    assert logged["prior/loss_weighted"] == pytest.approx(expected, rel=1e-5)
    assert logged["prior/reference_nll"] == pytest.approx(-float(ref_logprobs.sum()) / len(kept), rel=1e-5)
    assert logged["prior/effective_sample_size"] == pytest.approx(
        float(kept.sum() ** 2 / (len(kept) * (kept**2).sum()))
    )
    top = kept.sort(descending=True).values[: math.ceil(len(kept) / 10)].sum() / kept.sum()
    assert logged["prior/top_decile_share"] == pytest.approx(float(top), rel=1e-6)
    # The train metrics, which do not know of weights, have measured the plain loss.
    assert logged["prior/loss_unweighted"] == pytest.approx(float(memory.data["metrics/train/loss"][-1][1]), rel=1e-5)


def test_tokens_are_weighted_between_start_and_end_only(tokenizer, make_spec, reference):
    model = small_lvlm("patches", tokenizer)
    _, _, memory = fit(model, make_spec(model), [PRIOR(reference, start="1ba", end="3ba")], duration="5ba")
    plain = [value for _, value in memory.data["metrics/train/loss"]]
    totals = [value for _, value in memory.data["loss/train/total"]]
    equal = [math.isclose(a, b, rel_tol=1e-6) for a, b in zip(plain, totals, strict=True)]
    assert equal == [True, False, False, True, True]
    assert len(memory.data["prior/loss_weighted"]) == 2


def test_start_and_end_as_shares_of_the_run(tokenizer, make_spec, reference):
    model = small_lvlm("patches", tokenizer)
    _, _, memory = fit(model, make_spec(model), [PRIOR(reference, start="0.5dur")], duration="4ba")
    assert [int(step.batch) for step, _ in memory.data["prior/loss_weighted"]] == [2, 3]


def test_the_reference_sees_text_only_and_learns_nothing(lvlm, make_spec, reference):
    seen = []
    embeddings = reference.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = [p.clone() for p in reference.model.parameters()]
    trainer, _, _ = fit(lvlm, make_spec(lvlm), [PRIOR(reference)], duration="2ba")
    assert seen
    assert not any(torch.isin(ids, torch.tensor(image_token_ids(lvlm.tokenizer))).any() for ids in seen)
    assert all(p.grad is None and not p.requires_grad for p in reference.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, reference.model.parameters(), strict=True))
    assert not reference.model.training
    ours = {id(p) for p in reference.model.parameters()}
    assert not any(id(p) in ours for p in trainer.state.model.parameters())
    assert not any(id(p) in ours for group in trainer.state.optimizers[0].param_groups for p in group["params"])


def test_the_reference_is_not_in_the_checkpoint(tmp_path, tokenizer, make_spec, reference):
    model = small_lvlm("patches", tokenizer)
    sizes = {}
    for name, algorithms in (("plain", []), ("prior", [PRIOR(reference)])):
        trainer, _, _ = fit(model, make_spec(model), algorithms, duration="1ba")
        checkpoint = trainer.save_checkpoint(str(tmp_path / f"{name}.pt"))
        sizes[name] = (tmp_path / f"{name}.pt").stat().st_size
        state = torch.load(checkpoint, weights_only=False)["state"]["model"]
        assert set(state) == set(model.state_dict())
    reference_bytes = sum(p.numel() * p.element_size() for p in reference.model.parameters())
    assert sizes["prior"] - sizes["plain"] < reference_bytes / 10


def test_weights_leave_the_batch_after_the_loss(tokenizer, make_spec, reference):
    from composer.core import Callback

    class Spy(Callback):
        def after_backward(self, state, logger):
            assert "token_weights" not in state.batch

    model = small_lvlm("patches", tokenizer)
    fit(model, make_spec(model), [PRIOR(reference)], duration="1ba", callbacks=[Spy()])


def test_the_batch_that_a_loader_made_stays_as_it_is(lvlm, make_spec, make_batch, reference, monkeypatch):
    spec, batch, scored = make_spec(lvlm), make_batch(lvlm), 0
    spec.dataloader.collate_fn = lambda samples: batch  # the same dict in every step
    keys, really = set(batch), reference.logprobs

    def logprobs(*arguments, **rest):
        nonlocal scored
        scored += 1
        return really(*arguments, **rest)

    monkeypatch.setattr(reference, "logprobs", logprobs)
    fit(lvlm, spec, [PRIOR(reference)], duration="3ba")
    assert set(batch) == keys
    assert scored == 3


def test_a_language_model_on_text_alone(tokenizer, make_spec, make_batch, reference):
    model = ComposerLVLM(small_lm(tokenizer), tokenizer)
    batch = make_batch(None)
    ref_logprobs = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"])
    weights = importance_weights(ref_logprobs, batch["labels"] != IGNORE_INDEX)
    with torch.no_grad():
        logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    nll = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for row, position in (batch["labels"] != IGNORE_INDEX).nonzero().tolist():
        nll[row, position] = -logits[row, position - 1].log_softmax(-1)[batch["labels"][row, position]]
    _, losses, _ = fit(model, make_spec(None), [PRIOR(reference)], duration="1ba")
    assert losses[0] == pytest.approx(weighted_loss(nll, weights, batch["labels"]), rel=1e-5)


def test_a_hugging_face_model_is_taken_as_reference(tokenizer, tmp_path):
    lm = small_lm(tokenizer)
    assert isinstance(PRIOR(lm).reference, ReferenceLM)
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = PRIOR(str(tmp_path)).reference
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), loaded.model.parameters(), strict=True))


@pytest.mark.parametrize("arguments", [{"alpha": -1.0}, {"floor": 1.0}, {"normalization": "x"}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PRIOR(**arguments)


def test_a_batch_without_scores_is_refused(tokenizer, make_spec):
    model = small_lvlm("patches", tokenizer)
    with pytest.raises(ValueError, match="neither `ref_logprobs` in the batch nor a reference"):
        fit(model, make_spec(model), [PRIOR()])


@pytest.mark.parametrize("bad", [math.nan, 0.5])
def test_bad_scores_are_refused(tokenizer, make_spec, bad):
    model = small_lvlm("patches", tokenizer)
    spec = make_spec(model)
    collate = spec.dataloader.collate_fn
    spec.dataloader.collate_fn = lambda samples: (
        lambda batch: {**batch, "ref_logprobs": torch.full(batch["labels"].shape, bad)}
    )(collate(samples))
    with pytest.raises(ValueError, match="NaN or positive"):
        fit(model, spec, [PRIOR()])


def test_a_reference_with_another_vocabulary_is_refused(tokenizer, make_spec):
    model = small_lvlm("patches", tokenizer)
    other = train_tokenizer(["entirely different words"] * 3, 300)
    with pytest.raises(ValueError, match=r"another vocabulary than the model: \d+ of its tokens, such as"):
        fit(model, make_spec(model), [PRIOR(ReferenceLM(small_lm(other), other))])
    bare = ComposerLVLM(small_lm(tokenizer), tokenizer)
    bare.tokenizer = None
    with pytest.raises(ValueError, match="another vocabulary than the model: 300 and 600 tokens"):
        fit(bare, make_spec(None), [PRIOR(small_lm(tokenizer, vocab_size=300))])


def test_a_model_that_ignores_weights_is_refused(tokenizer, make_spec, reference):
    model = HuggingFaceModel(small_lm(tokenizer), tokenizer=tokenizer, use_logits=True)
    message = r"PRIOR needs a model that applies token_weights .* HuggingFaceModel does not: wrap .* ComposerLVLM\("
    with pytest.raises(ValueError, match=message) as error:
        fit(model, make_spec(None), [PRIOR(reference)])
    assert "\n" not in str(error.value)


def test_scores_of_a_stream_without_weights_are_not_looked_at():
    prior = PRIOR(streams={"pages": None})
    prior._names = ["captions", "pages"]
    labels = torch.tensor([[IGNORE_INDEX, 5, 6]] * 2)
    logprobs = torch.tensor([[0.0, math.log(0.25), math.log(0.5)], [0.0, math.nan, 1.0]])
    batch = {"labels": labels, "ref_logprobs": logprobs, "stream": torch.tensor([0, 1])}
    state = SimpleNamespace(batch=batch, model=None)
    mask = labels != IGNORE_INDEX
    prior.begin_batch(state, mask)
    weights, weighted = prior._weights(state, mask)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.75, 0.5], [0.0, 0.0, 0.0]]))
    assert weighted.tolist() == [[False, True, True], [False, False, False]]
    state.batch["stream"] = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="2 reference log-probabilities are NaN or positive"):
        prior.begin_batch(state, mask)


class Seen(Callback):
    """Keep the weights and the reference's log-probabilities of the last batch, by sample."""

    def before_loss(self, state, logger):
        numbers = state.batch["sample_id"].tolist()
        self.weights, self.scores = (
            dict(zip(numbers, state.batch[key].clone(), strict=True)) for key in ("token_weights", "ref_logprobs")
        )


@pytest.mark.parametrize("streams", [None, {"chats": {}}, {"chats": None}])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ["patches", "qwen2_vl"])
def test_samples_without_an_image_have_weight_1_unless_their_stream_has_settings(
    kind, stored, streams, tokenizer, tmp_path
):
    model = foreign(kind) if kind == "qwen2_vl" else own(kind, tokenizer)
    model.image_related_metrics = False
    reference = ReferenceLM(small_lm(model.tokenizer, seed=1), model.tokenizer)
    data = StreamingCaptionDataset(
        streams={"chats": {"local": write_chats(tmp_path, SAMPLES)}},
        tokenizer=model.tokenizer,
        image_processor=model.image_processor,
        batch_size=len(SAMPLES),
        shuffle=False,
    )
    spec = caption_data_spec(data, len(SAMPLES))
    batch = next(iter(spec.dataloader))
    text, begin = text_positions(batch, model), bos_id(model.tokenizer)
    scores = reference.logprobs(batch["input_ids"], text, batch["labels"], bos=begin)
    if stored:
        collate = spec.dataloader.collate_fn
        spec.dataloader.collate_fn = lambda samples: {**collate(samples), "ref_logprobs": scores}
    seen = Seen()
    alpha = 300.0  # so that weights of a random reference are far from equal
    method = PRIOR(None if stored else reference, alpha, streams=streams)
    fit(model, spec, [method], "1ba", callbacks=[seen])
    mask = batch["labels"] != IGNORE_INDEX
    expected = importance_weights(scores, mask, alpha)
    assert batch["sample_id"].tolist() == [*range(len(SAMPLES))]
    for number, (_, images) in enumerate(SAMPLES):
        weighted = streams == {"chats": {}} or (streams is None and bool(images))
        wanted = expected[number] if weighted else mask[number].float()
        torch.testing.assert_close(seen.weights[number], wanted, rtol=1e-5, atol=1e-5)
        if not stored:  # what is not weighted is not scored
            torch.testing.assert_close(seen.scores[number], scores[number] * weighted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[1], mask[1].float(), atol=0.01)
