"""A planned run: fake tensors against real ones, and against counts by hand."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from common.commands import run_job
from common.families import save_family
from common.models import FAMILIES, small_lm, small_lvlm
from common.recipes import ALONE, ROOT, recipe
from composer.core import Precision
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForImageTextToText

from composer_prior import ComposerLVLM
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.models.hugging_face import build_hugging_face, hugging_face_skeleton
from composer_prior.training.config import load_recipe
from composer_prior.training.fake import AutocastOfGPU, FakeRun, fake_numbers
from composer_prior.training.monitors import flop_counter
from composer_prior.training.optimizer import build_optimizer
from composer_prior.training.plan import GPUS, _largest, fake_ranks, plan, planned_batch

pytestmark = pytest.mark.usefixtures("outside_of_a_run")

ADAMW = {"name": "adamw", "lr": 1.0e-3}


def on_meta(tokenizer, family="encoder"):
    with torch.device("meta"):
        return small_lvlm(family, tokenizer)


def planned(tokenizer, parallelism=None, family="encoder", gpu=False):
    return FakeRun(on_meta(tokenizer, family), ADAMW, parallelism, Precision.FP32, gpu=gpu)


def in_mode(run, batch):
    with run.mode:
        return fake_numbers(batch)


def real_peak(model, batch):
    optimizer = build_optimizer(ADAMW, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *batch.values())
    with tracker:
        model.loss(model(batch), batch).backward()
        optimizer.step()
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [2, 8])
def test_a_peak_is_that_of_real_tensors(tokenizer, make_batch, family, samples):
    model = small_lvlm(family, tokenizer)
    batch = make_batch(model, samples)
    run = planned(tokenizer, family=family)
    assert sum(run.peak(in_mode(run, batch)).values()) == real_peak(model, batch)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3"])
def test_a_model_of_transformers_is_planned(tmp_path, kind):
    save_family(kind, tmp_path / kind, ["two red hammers on grey paper"] * 3)
    tokenizer = build_tokenizer({"name": str(tmp_path / kind), "image_tokens": False})
    builders = (hugging_face_skeleton, build_hugging_face)
    skeleton, model = (build(tokenizer, pretrained=str(tmp_path / kind)) for build in builders)
    run = FakeRun(skeleton, ADAMW, None, Precision.FP32, gpu=False)
    batch = planned_batch(run, {}, 2, 12)
    assert (batch["labels"] != IGNORE_INDEX).sum() == 2 * 12
    real = {key: torch.ones(one.shape) if one.is_floating_point() else one for key, one in batch.items()}
    assert sum(run.peak(batch).values()) == pytest.approx(real_peak(model.train(), real), rel=0.02)


@pytest.mark.parametrize(("ranks", "copies"), [(4, None), (4, 2)])
def test_a_rank_has_its_part(tokenizer, make_batch, ranks, copies):
    batch = make_batch(small_lvlm("encoder", tokenizer), 4)
    shards = ranks // (copies or 1)
    weights = sum(4 * math.ceil(p.shape[0] / shards) * p[0].numel() for p in on_meta(tokenizer).parameters())
    buffers = sum(4 * b.numel() for b in on_meta(tokenizer).buffers())
    steps = 4 * len([*on_meta(tokenizer).parameters()])
    with fake_ranks(ranks):
        run = planned(tokenizer, {"fsdp2": {"data_parallel_replicate_degree": copies}})
        parts = run.peak(in_mode(run, batch))
        again = run.peak(in_mode(run, batch), again=True)
    assert parts["weights"] == weights + buffers
    assert parts["optimizer"] == 2 * weights + steps
    assert again["gradients"] == weights
    assert run.weights == sum(4 * p.numel() for p in on_meta(tokenizer).parameters())
    assert run.state == 2 * run.weights + steps


def test_the_step_of_all_weights_at_once_takes_those_of_a_rank(tokenizer, make_batch):
    """DTensor computes shapes of whole weights, which are in no memory."""
    batch = make_batch(small_lvlm("encoder", tokenizer), 1)
    with fake_ranks(8):
        run = planned(tokenizer, {"fsdp2": {}}, gpu=True)
        parts = run.peak(in_mode(run, batch))
    assert parts["optimizer"] < run.state / 8 * 2


def test_checkpointing_and_whole_copies(tokenizer, make_batch):
    batch = make_batch(small_lvlm("encoder", tokenizer), 8)
    with fake_ranks(2):
        runs = [
            planned(tokenizer, parallelism)
            for parallelism in ({"fsdp2": {}}, {"fsdp2": {"activation_checkpointing": True}}, None)
        ]
        sharded, checkpointed, whole = (run.peak(in_mode(run, batch)) for run in runs)
        assert runs[0].flops(in_mode(runs[0], batch)) == runs[2].flops(in_mode(runs[2], batch))
    assert checkpointed["activations"] < 0.7 * sharded["activations"]
    assert whole["weights"] > 1.9 * sharded["weights"]
    assert whole["gathered"] == sum(4 * p.numel() for p in on_meta(tokenizer).parameters())  # the buckets of DDP


def test_checkpoints_are_recomputed_in_the_types_of_a_gpu(tokenizer, make_batch):
    """The tower trains here: its norms are those that autocast computes in float32 on a GPU alone."""
    batch = make_batch(small_lvlm("encoder", tokenizer), 8)
    activations = []
    with fake_ranks(2):
        for checkpointing in (False, True):
            parallelism = {"fsdp2": {"activation_checkpointing": checkpointing}}
            run = FakeRun(on_meta(tokenizer), ADAMW, parallelism, Precision.AMP_BF16)
            assert any(weight.requires_grad for weight in run.model.model.model.vision_tower.parameters())
            activations.append(run.peak(in_mode(run, batch))["activations"])
            assert run.flops(in_mode(run, batch)) > 0
    assert activations[1] < 0.8 * activations[0]


def test_norms_and_losses_are_in_float32_as_autocast_computes_them_on_a_gpu():
    hidden, norm = torch.ones(2, 4, dtype=torch.bfloat16), torch.nn.LayerNorm(4)
    with torch.autocast("cpu", torch.bfloat16), AutocastOfGPU():
        assert norm(hidden).dtype == hidden.softmax(-1).dtype == (hidden**2).dtype == torch.float32
        assert torch.nn.functional.cross_entropy(hidden, torch.zeros(2, dtype=torch.long)).dtype == torch.float32
        assert torch.nn.Linear(4, 4)(norm(hidden)).dtype == torch.nn.functional.gelu(hidden).dtype == torch.bfloat16


def test_operations_are_those_by_hand(tokenizer):
    samples, tokens, labels = 2, 12, 5
    with torch.device("meta"):
        lm = small_lm(tokenizer, tie_word_embeddings=False)
    run = FakeRun(ComposerLVLM(lm, tokenizer), ADAMW, None, Precision.FP32, gpu=False)
    ids = torch.arange(samples * tokens).view(samples, tokens) + 10
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["labels"][:, :-labels] = IGNORE_INDEX
    config = lm.config
    linear = 2 * sum(m.weight.numel() for m in lm.model.modules() if isinstance(m, torch.nn.Linear))
    attention = 4 * config.hidden_size * tokens * config.num_hidden_layers
    head = 2 * config.hidden_size * len(tokenizer)
    rotations = config.head_dim * tokens  # the angles of the positions, once
    expected = samples * (tokens * (3 * linear + 3.5 * attention) + 3 * labels * head) + rotations
    assert run.flops(batch) == expected


def test_operations_are_those_that_a_run_counts(tokenizer, make_batch):
    model = small_lvlm("encoder", tokenizer)
    batch = make_batch(model, 4)
    with flop_counter() as counter:
        model.loss(model(batch), batch).backward()
    run = planned(tokenizer)
    assert run.flops(in_mode(run, batch)) == counter.get_total_flops()


@pytest.mark.parametrize(("usable", "expected"), [(200, 14), (107, 1), (90, 0), (10_000, 64)])
@pytest.mark.parametrize("known", [1, 8])
def test_the_largest_microbatch(usable, expected, known):
    asked = []

    def peak(size):
        asked.append(size)
        return 100 + 7 * size

    assert _largest(usable, 64, (known, 100 + 7 * known), peak) == expected
    assert len(asked) <= 3


def test_a_recipe_is_planned_with_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ["train_loader.dataset.scores=null", "parallelism_config={fsdp2: {}}", "max_duration=10ba"]
    given = recipe("prior_vit", *changes)
    found = plan(given, world_size=4, gpu="4090", labels=20, sample_bytes=1e5, out="plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == asdict(found)
    assert found.fits
    assert found.microbatch == found.largest_microbatch == 2
    assert found.steps == 10
    assert found.memory["live reference"] > 0
    step = sum(found.flops[f"{part}, a sample"] for part in ("model", "reference")) * given.global_train_batch_size
    assert found.flops["a step, all GPUs"] == step
    assert found.seconds == pytest.approx(10 * step / (4 * GPUS["4090"].tflops * 1e12 * 0.4))
    assert found.cache_limit == 1.5 * 4_000_000 * 1e5
    few = plan(given, world_size=4, gpu="4090", labels=10, samples=1000, sample_bytes=1e5)
    assert few.cache_limit == 1000 * 1e5
    assert few.flops["reference, a sample"] < 0.6 * found.flops["reference, a sample"]
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "data").exists()
    assert "does NOT fit" in str(plan(given, world_size=4, gpu="4090", reserve=1.0))


def test_what_a_start_refuses_is_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(recipe("prior_vit", "init_from=nowhere"), world_size=1)
    assert any("nowhere" in line for line in found.refused)


def test_a_live_reference_has_the_type_of_its_files_on_a_gpu(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    lm = small_lm(tokenizer)
    lm.to(torch.bfloat16).save_pretrained("lm")
    tokenizer.save_pretrained("lm")
    live = (*ALONE, "train_loader.dataset.scores=null", "algorithms.prior.reference=lm")
    memory = {
        gpu: plan(recipe("prior_vit", *live, "parallelism_config=null"), world_size=1, gpu=gpu).memory
        for gpu in ("h100", "cpu")
    }
    weights = sum(weight.numel() for weight in lm.parameters())
    assert memory["h100"]["live reference"] == 2 * weights
    assert memory["cpu"]["live reference"] == 4 * weights


def test_a_live_viewer_is_named_as_not_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored, live = (
        plan(recipe("gain_vit", *changes), world_size=1).assumed
        for changes in ((), ("train_loader.dataset.viewer_scores=null",))
    )
    assert not any("viewer" in line for line in stored)
    assert any("Nothing of the live viewer of algorithms.image_gain" in line for line in live)


def test_what_a_run_freezes_has_no_gradient(tmp_path, monkeypatch):
    """LLaVA leaves out the last layer of a trained tower."""
    monkeypatch.chdir(tmp_path)
    save_family("llava", tmp_path / "llava", ["two red hammers on grey paper"] * 20)
    changes = ("reference=null", "algorithms.prior=null", "train_loader.dataset.scores=null", "model.freeze=null")
    small = ("model.pretrained=llava", "model.processor=null", "parallelism_config=null", "optimizer.fused=false")
    sizes = ("global_train_batch_size=2", "device_train_microbatch_size=1")
    given = load_recipe(ROOT / "yamls/smolvlm.yaml", [*changes, *small, *sizes, "callbacks.memory_monitor=null"])
    found = plan(given, world_size=1, gpu="cpu", labels=4)
    model = AutoModelForImageTextToText.from_pretrained("llava")
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # of transformers before 5
    parts = (tower.encoder.layers[-1], tower.post_layernorm)
    unused = sum(weight.numel() for part in parts for weight in part.parameters())
    weights = [weight.numel() for weight in model.parameters()]
    assert found.model == 4 * sum(weights)
    assert 0 <= found.memory["optimizer"] - 8 * (sum(weights) - unused) < 8 * len(weights)


@pytest.mark.parametrize("option", ["world_size", "nproc", "mfu", "labels", "samples", "sample_bytes", "write"])
def test_an_option_of_nothing_is_refused(option):
    with pytest.raises(ValueError, match=rf"^{option}=0: expected more than 0"):
        plan(recipe("prior_vit"), **{option: 0})


def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_job("plan", ["prior_vit.yaml", "gpu=h1000"]) == 1
    assert "error: gpu=h1000: expected a100-40" in capsys.readouterr().err
