"""Steps and commands on a GPU: a pretended one, on which a tensor in the wrong place is an error, or a real one."""

import copy
import json
from pathlib import Path

import pytest
import torch
from common.commands import caption, evaluate, score
from common.models import FAMILIES, small_lvlm
from common.programs.one_step import METHODS, make_samples, step_gradients
from common.recipes import recipe
from common.training import fit
from composer.algorithms import SelectiveBackprop
from PIL import Image

from composer_prior import PRIOR, load, selective_backprop_keys
from composer_prior.data.batch import CaptionCollator
from composer_prior.training.run import train

# Every method once, on every front end.
STEPS = [
    ("encoder", "prior", {"pack": True}),
    ("patches", "prior by stream, batch", {"pack": True, "label_smoothing": 0.1}),
    ("encoder", "cal", {"label_smoothing": 0.1}),
    ("patches", "dpa", {"pack": True}),
    ("tiles", "random_prior by stream", {}),
    ("merged_tiles", "permuted_prior, batch", {}),
    ("naflex", "image_gain by stream", {}),
    ("merged_naflex", "vig", {"pack": True}),
    ("mean_pool", "oracle, batch", {}),
    ("pixel_shuffle", "rho1", {}),
    ("merged_patches", "focal", {}),
    ("encoder", "image_gain over the model", {}),
    ("patches", "regate", {}),
]
SMALL = [
    "data.train_samples=16",
    "data.validation_samples=4",
    "tokenizer.train.vocab_size=300",
    "max_duration=2ba",
    "reference.max_duration=1ba",
    "sample_captions=1",
    "benchmarks.scene_foils.samples=4",
    "benchmarks.hallucination=null",
    "benchmarks.captioning.limit=2",
    *(f"{prefix}precision=fp32" for prefix in ("", "reference.")),
]


def wrong(here, there):
    """What CUDA refuses, of three numbers on the host and on the GPU; the last in its backward pass."""
    weight = torch.nn.Parameter(there.clone())
    generator = torch.Generator().manual_seed(0)
    yield lambda: here + there
    yield lambda: torch.cat([there, here])
    yield lambda: here[there.long()]
    yield lambda: here.sum().add_(there.sum())
    yield lambda: there.masked_scatter(there > 0, torch.zeros(3))
    yield lambda: torch.nn.functional.embedding(torch.arange(3), there[:, None])
    yield lambda: there.numpy()
    yield lambda: torch.zeros(3, device="cuda").uniform_(generator=generator)
    yield lambda: torch.nn.Linear(3, 3).to("cuda")(here)
    yield lambda: Backward.apply(weight).sum().backward()


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given):
        return given * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.full(grad.shape, 2.0)


def test_operands_on_two_devices_are_refused(gpu):
    with gpu:
        here = torch.ones(3)
        there = here.to("cuda")
        assert there.device == torch.zeros_like(here, device="cuda").device == torch.device("cuda", 0)
        assert (there + here.sum() + there.new_ones(3) + there.clone()).is_cuda
        assert not there.cpu().is_cuda
        for call in wrong(here, there):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                call()


def test_steps_have_every_method():
    assert {name.split()[0].strip(",") for _, name, _ in STEPS} == {name.split()[0].strip(",") for name in METHODS}


@pytest.mark.parametrize(("family", "method", "options"), STEPS, ids=lambda value: value if value else "plain")
def test_a_step_is_that_of_the_cpu(gpu, tokenizer, family, method, options):
    expected = step_gradients(family, tokenizer, method, 5, **options)
    with gpu:
        found = step_gradients(family, tokenizer, method, 5, device=None, **options)
        assert all(gradient.is_cuda for gradient in found.values())
        found = {name: gradient.cpu() for name, gradient in found.items()}
    ours, theirs = (torch.cat([one[name].flatten() for name in expected]) for one in (found, expected))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def losses_and_gradients(model, batch):
    outputs = model(batch)
    loss = model.loss(outputs, batch)
    loss.backward()
    return outputs["nll"], loss, torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bfloat16_is_that_of_float64(device, tokenizer, family, pack):
    """A rounding to 8 bits errs by 2^-8 at most and .0023 on average, and those of a dozen products on a gradient's way
    by less than 2^-6. Losses are of logits near 0, of which the rounding is little, and their mean is of float32.
    """
    with torch.device("cpu"):
        model = small_lvlm(family, tokenizer, options={"pack": pack}, initializer_range=0.05)
        batch = CaptionCollator(tokenizer.pad_token_id)(make_samples(model, tokenizer))
        batch["token_weights"] = torch.rand(batch["labels"].shape) * 2
    exact = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    expected = losses_and_gradients(copy.deepcopy(model).double(), exact)
    with torch.autocast(device, torch.bfloat16):
        found = losses_and_gradients(model.to(device), {key: value.to(device) for key, value in batch.items()})
    assert {value.dtype for value in found} == {torch.float32}
    errors = [float((a.cpu() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert all(error < most for error, most in zip(errors, (2**-10, 2**-12, 2**-6), strict=True)), errors
    assert errors[-1] > 2**-10, "nothing is rounded"


def test_selection_and_evaluation(gpu, lvlm, reference, make_spec):
    with gpu:
        lvlm.image_related_metrics = False
        selecting = SelectiveBackprop(start=0.0, keep=0.5, interrupt=1, **selective_backprop_keys(lvlm))
        spec, held_out = make_spec(lvlm), make_spec(lvlm, split="validation")
        trainer, logged = fit(lvlm, spec, [PRIOR(reference), selecting], eval_dataloader=held_out, device=None)
        trainer.eval()
        assert next(lvlm.parameters()).is_cuda
    assert 0 < logged["metrics/eval/loss"][-1][1] < 20
    assert 0 < logged["loss/train/total"][0][1] < 20


@pytest.mark.slow
def test_a_run_and_what_its_model_does(gpu, tmp_path, monkeypatch, capsys):
    """Reference, scores, training, evaluation, benchmarks, captions and what is saved; then jobs with the model."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 48)).save("image.png")
    with gpu:
        train(recipe("prior_vit", *SMALL))
        told = capsys.readouterr().out
        assert caption(["runs/prior_vit", "image.png", "page=page.html", "device=cuda", "max_new_tokens=4"]) == 0
        words = ["runs/prior_vit", "reference=runs/reference/model", "data=data/emoji_scenes/validation"]
        assert evaluate([*words, "benchmark=image_dependence", "limit=2"]) == 0
        score(["runs/prior_vit/config.yaml", "viewer=runs/prior_vit/model", "out=viewer_scores"])
        assert load("runs/prior_vit").to("cuda").generate_captions([Image.new("RGB", (48, 48))], max_new_tokens=4)
    assert "no figures" not in told
    logged = [json.loads(line) for line in Path("runs/prior_vit/metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss/train/total"] < 20 for line in logged if "loss/train/total" in line)
    assert {"eval/scene_foils/image_gain", "eval/captioning/cider_d", "metrics/eval/loss"} <= {*logged[-1]}
    assert {"image", "caption", "tokens"} <= json.loads(Path("captions.jsonl").read_text()).keys()
    assert json.loads(Path("evaluation/results.json").read_text())["samples"] == 2
