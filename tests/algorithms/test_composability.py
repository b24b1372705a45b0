"""PRIOR beside every algorithm of Composer: the table of the method card, and those that need a closer look."""

import importlib.util
import inspect
from pathlib import Path

import composer.algorithms
import pytest
import torch
import torch.nn.functional as F
from common import training
from common.models import FAMILIES, full_logits, small_lm, small_lvlm
from composer import Trainer
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    AugMix,
    ColOut,
    CutOut,
    GradientClipping,
    LayerFreezing,
    LowPrecisionLayerNorm,
    RandAugment,
)
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import (
    LPLayerNorm,
    apply_low_precision_layernorm,
)
from composer.core import Algorithm, Callback, Precision

from composer_prior import PRIOR, ComposerLVLM, importance_weights, selective_backprop_keys
from composer_prior.algorithms.token_weighting.stacking import refusal
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import decode_image
from composer_prior.data.streams import CheckedDataset
from composer_prior.data.tokenizer import image_token_ids

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "tools" / "composability.py"


def load_script():
    spec = importlib.util.spec_from_file_location("composability", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


composability = load_script()
CASES = {f"{case.name}-{index}": case for index, case in enumerate(composability.cases())}


@pytest.fixture
def reference(reference):
    """That of all tests, made so sure of some tokens that weights are far from equal."""
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(5)
    return reference


@pytest.fixture(scope="module")
def card():
    """The rows of the table of PRIOR's card, which holds for every method."""
    text = composability.CARD.read_text()
    return text[text.index(composability.BEGIN) : text.index(composability.END)].splitlines()


def test_every_algorithm_has_a_row(card):
    classes = [getattr(composer.algorithms, name) for name in composer.algorithms.__all__]
    expected = {c.__name__ for c in classes if inspect.isclass(c) and issubclass(c, Algorithm)}
    assert len(expected) == 28
    assert expected <= {case.name for case in CASES.values()}
    assert len(card) == 3 + len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_table_of_the_card(name, card):
    """The script runs both orders on both families; here the one with the one and the other with the other."""
    case = CASES[name]
    results = {
        family: composability.run("prior", case, family, order)
        for family, order in zip(composability.FAMILIES, composability.ORDERS, strict=True)
    }
    assert composability.table_row(case, results) in card


OTHER_METHODS = [name for name in composability.METHODS if name != "prior"]
# What may come between a method and its loss: other inputs, other weights, two passes, fewer samples, another head.
TELLING = ("Factorize-9", "LabelSmoothing-16", "SAM-24", "SelectiveBackprop-25", "MixUp-20")


@pytest.mark.parametrize("method", OTHER_METHODS)
@pytest.mark.parametrize("name", TELLING)
def test_the_table_holds_for_the_other_methods(method, name, card):
    """Rows that differ most; `python tools/composability.py METHOD` runs all of them."""
    case, orders = CASES[name], dict(zip(composability.FAMILIES, composability.ORDERS, strict=True))
    results = {family: composability.run(method, case, family, order) for family, order in orders.items()}
    assert composability.table_row(case, results) in card


class Record(Callback):
    """What the model was after each step, and the gradients that each pass left for the optimizer."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def after_train_batch(self, state, logger):
        self.gradients.append({name: p.grad.clone() for name, p in state.model.named_parameters() if p.requires_grad})

    def batch_end(self, state, logger):
        self.weights.append(copied(state.model))


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fit(model, spec, algorithms, duration="4ba", lr=0.5, **changes):
    record = Record()
    trainer, logged = training.fit(model, spec, algorithms, duration, [record], lr, **changes)
    return record, logged, trainer


def assert_close(ours, expected, rtol=1e-5):
    assert ours.keys() == expected.keys()
    ours, expected = (torch.cat([x[name].flatten().double() for name in sorted(x)]) for x in (ours, expected))
    assert float((ours - expected).norm() / expected.norm()) <= rtol


def text_scores(reference, model, batch):
    drop = image_token_ids(model.tokenizer)
    return reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], drop)


def formula_gradients(model, batch, reference):
    scores = text_scores(reference, model, batch)
    mask = batch["labels"] != IGNORE_INDEX
    model.zero_grad()
    ((model(batch)["nll"] * importance_weights(scores, mask)).sum() / mask.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_ema_averages_the_weights(lvlm, make_spec, reference):
    ema = EMA(half_life=None, smoothing=0.75, update_interval="1ba")
    record, _, _ = fit(lvlm, make_spec(lvlm), [PRIOR(reference), ema])
    average = record.weights[0]  # it starts at the end of the first batch
    for weights in record.weights:
        average = {name: 0.75 * average[name] + 0.25 * value for name, value in weights.items()}
    assert_close(dict(ema.ema_model.named_parameters_dict), average, rtol=1e-6)


def test_swa_averages_the_weights(lvlm, make_spec, reference):
    swa = SWA(swa_start="0.5dur", swa_end="0.99dur", update_interval="1ba")
    record, _, _ = fit(lvlm, make_spec(lvlm), [swa, PRIOR(reference)])
    (*_, second, third, _), gradients = record.weights, record.gradients[3]
    fourth = {name: value - 0.5 * gradients[name] for name, value in third.items()}
    assert_close(copied(lvlm), {name: (second[name] + third[name] + fourth[name]) / 3 for name in second}, rtol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_gradient_clipping_scales_the_formulas_gradient(lvlm, make_spec, make_batch, reference, first):
    expected = formula_gradients(lvlm, make_batch(lvlm), reference)
    norm = torch.cat([grad.double().flatten() for grad in expected.values()]).norm()
    clipping = [GradientClipping("norm", clipping_threshold=float(norm) / 10)]
    prior = [PRIOR(reference)]
    algorithms = clipping + prior if first else prior + clipping
    record, _, _ = fit(lvlm, make_spec(lvlm), algorithms, "1ba", device_train_microbatch_size=3)
    assert_close(record.gradients[0], {name: grad / 10 for name, grad in expected.items()})


def test_layer_freezing_freezes_and_the_rest_learns(lvlm, make_spec, reference):
    freezing = LayerFreezing(freeze_start=0.0, freeze_level=0.5)
    record, logged, _ = fit(lvlm, make_spec(lvlm, batch_size=48), [PRIOR(reference), freezing], "4ep")
    frozen = {name for name, p in lvlm.named_parameters() if not p.requires_grad}
    before, last = record.weights[-3:-1]  # the last epoch has two steps, after which more is frozen
    held = {name for name in last if torch.equal(before[name], last[name])}
    assert held
    assert held <= frozen
    assert "model.lm_head.weight" not in frozen
    assert "model.lm_head.weight" in last
    assert len(logged["prior/loss_weighted"]) == 8


@pytest.mark.parametrize("microbatch", [None, 3])
def test_sam_weights_both_passes_and_logs_the_first(lvlm, make_spec, make_batch, reference, microbatch):
    batch = make_batch(lvlm)
    start = copied(lvlm)
    here = formula_gradients(lvlm, batch, reference)
    norm = torch.cat([grad.double().flatten() for grad in here.values()]).norm()
    with torch.no_grad():
        for name, p in lvlm.named_parameters():
            p += 0.5 * here[name] / norm
    there = formula_gradients(lvlm, batch, reference)
    lvlm.load_state_dict(start, strict=False)
    spec = make_spec(lvlm)
    record, logged, _ = fit(
        lvlm, spec, [PRIOR(reference), SAM(rho=0.5)], "1ba", device_train_microbatch_size=microbatch
    )
    assert_close(record.gradients[0], here)
    assert_close(record.gradients[1], there, rtol=1e-4)  # the second point itself carries the rounding of the first
    assert_close(record.weights[0], {name: start[name] - 0.5 * there[name] for name in start})
    assert len(logged["prior/loss_weighted"]) == 1
    logged, total = logged["prior/loss_weighted"][0][1], logged["loss/train/total"][0][1]
    assert logged == pytest.approx(float(total), rel=1e-5)


def test_selective_backprop_drops_whole_samples(lvlm, make_spec, make_batch, reference):
    class Seen(Callback):
        def before_forward(self, state, logger):
            self.batch = {key: value.clone() for key, value in state.batch.items()}

    lvlm.image_related_metrics = False
    seen = Seen()
    selecting = composability.selective_backprop(**selective_backprop_keys(lvlm))
    batch = make_batch(lvlm)
    trainer = Trainer(
        model=lvlm,
        train_dataloader=make_spec(lvlm),
        max_duration="1ba",
        optimizers=torch.optim.SGD(lvlm.parameters(), lr=0.1),
        algorithms=[PRIOR(reference), selecting],
        callbacks=[seen],
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    rows = [batch["sample_id"].tolist().index(i) for i in seen.batch["sample_id"].tolist()]
    assert len(set(rows)) == len(rows) == 4
    for key, value in batch.items():
        assert torch.equal(seen.batch[key], value[rows]), key


def test_losses_per_sample(lvlm, make_batch):
    batch = make_batch(lvlm)
    outputs = lvlm(batch)
    losses = lvlm.loss(outputs, (torch.empty(0), batch["labels"]), reduction="none")
    for row in range(len(losses)):
        one = outputs["nll"][row][batch["labels"][row] != IGNORE_INDEX]
        assert float(losses[row]) == pytest.approx(float(one.mean()), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_label_smoothing_is_torchs(tokenizer, make_batch, family):
    model = small_lvlm(family, tokenizer, options={"label_smoothing": 0.2}, tie_word_embeddings=family == "patches")
    batch = make_batch(model)
    model.loss(model(batch), batch).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = full_logits(model.model, batch)[:, :-1].transpose(1, 2)
    expected = F.cross_entropy(logits, batch["labels"][:, 1:], label_smoothing=0.2)
    expected.backward()
    assert float(model.loss(model(batch), batch)) == pytest.approx(float(expected), rel=1e-5)
    assert_close(ours, {name: p.grad for name, p in model.named_parameters()})
    assert "smoothed_nll" not in model.eval()(batch)


def test_label_smoothing_refuses_what_it_cannot_do(tokenizer):
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0: expected a share in \[0, 1\)"):
        ComposerLVLM(small_lm(tokenizer), tokenizer, label_smoothing=1.0)


def test_low_precision_layernorm_under_autocast(tokenizer, make_batch, reference):
    """Composer has no amp on the CPU: its surgery by hand, and the loss under torch's own autocast."""
    model = small_lvlm("encoder", tokenizer)
    apply_low_precision_layernorm(model, Precision.AMP_BF16)
    assert any(isinstance(module, LPLayerNorm) for module in model.modules())
    assert refusal(LowPrecisionLayerNorm(), model) is None
    batch = make_batch(model)
    scores = text_scores(reference, model, batch)
    mask = batch["labels"] != IGNORE_INDEX
    weights = importance_weights(scores, mask)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(model(batch), {**batch, "token_weights": weights})
        logits = full_logits(model.model, batch)[:, :-1].double()
    nll = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    assert float(loss) == pytest.approx(float((nll * weights[:, 1:]).sum() / mask.sum()), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_that_are_cut_are_refused(tokenizer, make_batch, family):
    model = small_lvlm(family, tokenizer)
    batch = make_batch(model)
    cut = {key: batch[key][:, :3] for key in ("input_ids", "labels", "attention_mask")}
    with pytest.raises(ValueError, match=r"The images have \d+ features and input_ids \d+ image tokens"):
        model({**batch, **cut})


@pytest.mark.parametrize("algorithm", [RandAugment(), AugMix(), ColOut(batch=False)], ids=lambda a: type(a).__name__)
def test_algorithms_transform_the_images_of_the_data_set(lvlm, make_spec, algorithm):
    """Beside a transform that is there already, and before the image processor."""
    spec = make_spec(lvlm, transform=turn)
    trainer = Trainer(
        model=lvlm, train_dataloader=spec, algorithms=[algorithm], max_duration="1ba", progress_bar=False, device="cpu"
    )
    trainer.fit()
    data = spec.dataloader.dataset
    first, added = data.transform.transforms
    assert first is turn
    assert type(added).__module__.startswith("composer.algorithms")
    image = decode_image(CheckedDataset.get_item(data, 3)["image"])
    key = "pixel_values" if "pixel_values" in data[3] else "pixel_patches"
    data.transform = turn
    assert torch.equal(data[3][key], lvlm.image_processor(turn(image)).tensors[key])
    assert not torch.equal(data[3][key], lvlm.image_processor(image).tensors[key])


def turn(image):
    return image.rotate(90, expand=True)


def test_keys_of_tuples_are_refused(tokenizer):
    assert "input_key=0, but batches are dicts" in refusal(CutOut(), small_lvlm("encoder", tokenizer))


def test_refusals_are_one_line(tokenizer):
    for family in FAMILIES:
        model = small_lvlm(family, tokenizer)
        for case in CASES.values():
            for algorithm in case.build(model):
                assert "\n" not in (refusal(algorithm, model) or "")
