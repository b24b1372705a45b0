"""Floating-point operations of a run, against those that its layers must do."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from common.models import small_lvlm
from common.programs.one_step import make_reference, make_samples, make_viewer
from common.training import figures_by_stream, fit
from composer.callbacks import SpeedMonitor
from composer.core import Callback, DataSpec
from torch.utils.data import DataLoader

from composer_prior import PRIOR, importance_weights, registry
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator, count_tokens
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.training.monitors import ComputeMonitor, PlanMonitor, StreamMonitor, flop_counter


def count(model, spec, monitor, duration="1ba", algorithms=(), **changes):
    """``compute/flops`` after each step, and the trainer."""
    trainer, logged = fit(model, spec, algorithms, duration, [monitor], **changes)
    return [flops for _, flops in logged["compute/flops"]], trainer


@pytest.mark.parametrize("interval", [1, 20])
def test_composers_speed_monitor_shows_the_utilization(tokenizer, make_spec, interval):
    model = small_lvlm("patches", tokenizer)
    monitors = [ComputeMonitor(interval), SpeedMonitor(window_size=2, gpu_flops_available=1e12)]
    _, logged = fit(model, make_spec(model), (), "6ba", monitors)
    flops = [value for _, value in logged["compute/flops"]]
    seconds = [3600 * value for _, value in logged["time/train"]]
    *_, (_, utilization) = logged["throughput/device/mfu"]
    assert utilization == pytest.approx((flops[5] - flops[3]) / (seconds[5] - seconds[3]) / 1e12, rel=1e-4)


@pytest.mark.parametrize(
    ("measured", "ranks", "said"),
    [
        (1.1, 1, "Peak memory of a GPU: 1.10 GiB, planned 1.00 GiB (1.10 x).\n"),
        (1.2, 1, "planned 1.00 GiB (1.20 x). They differ by more than 15 %: was the plan made with the recipe and"),
        (1.2, 8, "The plan is of 8 GPUs and a microbatch of 4, not of 1 and 4.\n"),
    ],
)
def test_memory_is_shown_beside_the_plan(tmp_path, monkeypatch, capsys, measured, ranks, said):
    plan = {"memory": {"weights": 2**29, "activations": 2**29}, "world_size": ranks, "microbatch": 4}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    monitor = PlanMonitor(str(tmp_path / "plan.json"))
    peak = [2**40]  # of a reference that was trained before
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", peak.clear)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max([int(measured * 2**30), *peak]))
    device = SimpleNamespace(name="gpu", tensor_to_device=lambda tensor: tensor)
    state = SimpleNamespace(device=device, device_train_microbatch_size=4)
    monitor.fit_start(state, None)
    monitor.batch_end(state, None)
    assert capsys.readouterr().out == ""
    monitor.batch_end(state, None)
    assert said in capsys.readouterr().out
    monitor.batch_end(state, None)
    assert capsys.readouterr().out == ""


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("[]")
    for name in ("plan.json", "missing.json"):
        with pytest.raises(
            ValueError, match=rf"plan=.*{name}: not the file of a plan .*composer-prior plan RECIPE.yaml"
        ):
            PlanMonitor(str(tmp_path / name))


def by_hand(model, batch):
    """A forward and a backward pass of a patch-embedding model: each product thrice, but the first layer's twice."""
    language, patches = model.model.causal_lm, batch["pixel_patches"]
    rows = batch["input_ids"].numel()
    layers = [m for name, m in language.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    linear = 3 * sum(2 * m.weight.numel() * rows for m in layers)
    config = language.config
    batch_size, length = batch["input_ids"].shape
    # Two products of queries, keys and values, all pairs of positions; the backward pass has five.
    attention = config.num_hidden_layers * (2 + 5) * 2 * batch_size * length**2 * config.hidden_size
    head = 3 * 2 * language.lm_head.weight.numel() * int((batch["labels"] != IGNORE_INDEX).sum())
    embedding = model.model.model.vision_tower
    weights = sum(p.numel() for p in embedding.parameters() if p.ndim == 2)
    return linear + attention + head + 2 * 2 * weights * patches.shape[0] * patches.shape[1]


def test_a_step_is_counted(tokenizer, make_spec, make_batch):
    model = small_lvlm("patches", tokenizer)
    flops, _ = count(model, make_spec(model), ComputeMonitor(interval=1))
    assert flops[0] == pytest.approx(by_hand(model, make_batch(model)), rel=0.02)


@pytest.mark.parametrize("family", ["encoder", "tiles", "merged_naflex"])
def test_a_frozen_tower_is_counted_as_a_trained_one(family, tokenizer, make_batch):
    """In evaluation mode and without gradients PyTorch has one operation for the whole of attention."""
    model, counts = small_lvlm(family, tokenizer), []
    batch = make_batch(model)
    images = {key: batch[key] for key in ("pixel_values", "pixel_patches", "patch_mask", "image_grid") if key in batch}
    for trained in (True, False):
        model.model.model.vision_tower.requires_grad_(trained)
        with flop_counter() as counter:
            model.train().model.model.get_image_features(**images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_grouped_queries_are_counted_as_repeated_keys():
    query, key = torch.empty(2, 8, 5, 4), torch.empty(2, 2, 5, 4)
    counts = flop_counter().flop_registry  # called by hand: on the CPU, torch 2.7 repeats the keys itself
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        forward, backward = (
            counts[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{end}")] for end in ("", "_backward")
        )
        for keys in (key, key.repeat_interleave(4, dim=1)):
            assert forward(query, keys, keys, out_val=query) == 4 * 2 * 8 * 5 * 5 * 4
            assert backward(query, query, keys, keys, out_val=query) == 2.5 * 4 * 2 * 8 * 5 * 5 * 4


def test_steps_between_are_reckoned_by_their_tokens(tokenizer, make_spec):
    every, _ = count(
        small_lvlm("patches", tokenizer), make_spec(small_lvlm("patches", tokenizer)), ComputeMonitor(1), "6ba"
    )
    few, _ = count(
        small_lvlm("patches", tokenizer), make_spec(small_lvlm("patches", tokenizer)), ComputeMonitor(3), "6ba"
    )
    assert few[0] == every[0]
    assert few[1] != every[1]
    assert few == sorted(few)
    assert few[-1] == pytest.approx(every[-1], rel=0.1)


def test_a_live_reference_is_counted(tokenizer, make_spec, reference):
    counts = []
    for algorithms in ([], [PRIOR(reference)]):
        model = small_lvlm("encoder", tokenizer)
        flops, _ = count(model, make_spec(model), ComputeMonitor(), algorithms=algorithms)
        counts += flops
    assert counts[1] > counts[0]


def test_microbatches_change_little(tokenizer, make_spec):
    """Their padding differs."""
    counts = []
    for microbatch in (None, 3):
        model = small_lvlm("patches", tokenizer)
        flops, _ = count(model, make_spec(model), ComputeMonitor(), device_train_microbatch_size=microbatch)
        counts += flops
    assert counts[1] == pytest.approx(counts[0], rel=1e-3)


def test_the_count_goes_on_after_a_resumption(tokenizer, make_spec, tmp_path):
    model = small_lvlm("patches", tokenizer)
    whole, _ = count(model, make_spec(model), ComputeMonitor(1), "4ba")
    model = small_lvlm("patches", tokenizer)
    _, trainer = count(model, make_spec(model), ComputeMonitor(1), "2ba")
    checkpoint = trainer.save_checkpoint(str(tmp_path / "half.pt"))
    trainer.close()
    resumed, _ = count(
        small_lvlm("patches", tokenizer), make_spec(model), ComputeMonitor(1), "4ba", load_path=checkpoint
    )
    assert resumed == whole[2:]


NAMES = ["captions", "chat", "text"]


def streams_spec(model, batch_size, names=NAMES):
    """Twelve samples of three streams in batches."""
    samples = make_samples(model, model.tokenizer)
    samples.stream_names = names
    loader = DataLoader(samples, batch_size, collate_fn=CaptionCollator(model.tokenizer.pad_token_id))
    return DataSpec(
        loader, get_num_samples_in_batch=lambda batch: len(batch["labels"]), get_num_tokens_in_batch=count_tokens
    )


@pytest.mark.parametrize("microbatch", [None, 5])
def test_figures_of_each_stream(tokenizer, reference, microbatch):
    """Of a step from the model before it, of a validation in uneven batches from the model after it, and resumed."""
    model = small_lvlm("patches", tokenizer)
    (batch,) = streams_spec(model, 12).dataloader
    ids = batch["input_ids"], batch["attention_mask"], batch["labels"], image_token_ids(tokenizer)
    scores, mask = reference.logprobs(*ids), batch["labels"] != IGNORE_INDEX
    weights = importance_weights(scores, mask, 2.0)
    weights[batch["stream"] == 1] = importance_weights(scores, mask, 2.0, floor=0.5)[batch["stream"] == 1]
    weights[batch["stream"] == 2] = mask[batch["stream"] == 2].float()
    with torch.no_grad():
        expected = figures_by_stream(batch, model(batch), NAMES, weights, scores)
    method = PRIOR(reference, 2.0, streams={"chat": {"floor": 0.5}, "text": None})
    evaluated = {"eval_dataloader": streams_spec(model, 5), "device_train_microbatch_size": microbatch}
    trainer, logged = fit(model, streams_spec(model, 12), [method], "2ba", [StreamMonitor()], **evaluated)
    assert {name: float(logged[name][0][1]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert "prior/text/reference_nll" not in logged
    weighted = mask & (batch["stream"] != 2)[:, None]
    assert logged["prior/reference_nll"][0][1] == pytest.approx(-float(scores[weighted].mean()), rel=1e-5)
    tokens = {name: logged[f"metrics/train/{name}/tokens"] for name in NAMES}
    assert [[count for _, count in of] for of in tokens.values()] == [[n, 2 * n] for (_, n), _ in tokens.values()]
    with torch.no_grad():
        after = figures_by_stream(batch, model.eval()(batch), NAMES, weights, scores)
    for name in NAMES:
        kinds = ("accuracy", "tokens", "share")
        own = {kind: logged[f"metrics/eval/{name}/{kind}"][-1][1] for kind in ("loss", *kinds)}
        rest = {kind: after[f"metrics/train/{name}/{kind}"] for kind in kinds}
        assert own == pytest.approx({"loss": after[f"loss/train/{name}"], **rest}, rel=1e-5)
    (monitor,) = (one for one in trainer.state.callbacks if isinstance(one, StreamMonitor))
    resumed = StreamMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.state_dict() == {"tokens": {name: of[-1][1] for name, of in tokens.items()}}


def test_data_of_one_stream_have_no_further_metrics(tokenizer, reference):
    found = []
    for callbacks, names in ([], []), ([StreamMonitor()], ["captions"]):
        model = small_lvlm("patches", tokenizer)
        _, logged = fit(model, streams_spec(model, 12, names), [PRIOR(reference)], callbacks=callbacks)
        found.append({name: [value for _, value in values] for name, values in logged.items() if "time" not in name})
    assert found[0] == found[1]
    assert "prior/loss_weighted" in found[0]


class Weights(Callback):
    def before_loss(self, state, logger):
        self.value = state.batch["token_weights"].clone()


OURS = [name for name, place in registry.shipped("algorithm").items() if place.startswith("composer_prior")]


@pytest.mark.parametrize("name", OURS)
def test_every_method_leaves_a_stream_unweighted(tokenizer, name):
    """The others are weighted as without it, but where a method looks at the captions of all together."""
    constructor = registry.load("algorithm", name, "")
    models = {"reference": make_reference(tokenizer), "viewer": make_viewer("patches", tokenizer)}
    given = {key: model for key, model in models.items() if registry.takes(constructor, key)}
    given |= {"dense": 0, "start": "0ba"} if name == "regate" else {}
    found = []
    for streams in None, {"text": None}:
        model, weights = small_lvlm("patches", tokenizer), Weights()
        fit(model, streams_spec(model, 12), [constructor(**given, streams=streams)], callbacks=[weights])
        found.append(weights.value)
    (batch,) = streams_spec(model, 12).dataloader
    plain, mask = (batch["stream"] == NAMES.index("text"))[:, None], batch["labels"] != IGNORE_INDEX
    assert torch.equal(found[1][mask & plain], torch.ones(int((mask & plain).sum())))
    assert not torch.equal(found[0], found[1])
    if name not in ("random_prior", "vig"):
        # The reference reads the others in batches of another width, which rounds otherwise.
        torch.testing.assert_close(found[0].masked_fill(plain, 0.0), found[1].masked_fill(plain, 0.0))


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"chta": None}, "algorithms.prior.streams.chta: the data have no such stream. Did you mean 'chat'?"),
        (
            {"chat": {"alfa": 1}},
            "streams.chat.alfa is not a key of prior. Did you mean 'alpha'? Accepted: alpha, floor.",
        ),
        ({"chat": {"normalization": "none"}}, "streams.chat.normalization is not a key of prior."),
        ({"chat": {"floor": 2}}, "streams.chat: floor=2: the share of next-token prediction must be in [0, 1)."),
        ({"chat": {"alpha": "two"}}, "streams.chat.alpha='two': expected float."),
        ({"chat": 1.0}, "streams.chat=1.0: expected settings such as {floor: 0.5}, or null."),
    ],
)
def test_streams_that_cannot_be_are_refused_in_one_line(streams, message, tokenizer, reference):
    model = small_lvlm("patches", tokenizer)
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        fit(model, streams_spec(model, 12), [PRIOR(reference, streams=streams)])
    assert "\n" not in str(error.value)
