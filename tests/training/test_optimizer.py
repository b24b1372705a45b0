"""Groups of weights: each trained weight is in one, with the settings that the recipe says, on any number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from common.models import small_lvlm
from common.recipes import NO_REPORT, ROOT, SHRUNKEN, VIT, fork_ranks, losses, recipe
from common.vlms import KINDS, make_vlm
from composer.models import HuggingFaceModel
from peft import LoraConfig, get_peft_model
from torch import nn

from composer_prior import ComposerLVLM
from composer_prior.models.language import parts_of
from composer_prior.registry import register
from composer_prior.training.optimizer import build_optimizer
from composer_prior.training.run import train

GROUPS = {"vision": {"lr": 1e-4}, "language": {"lr": 1e-3, "weight_decay": 0.2, "lm_head": {"betas": [0.8, 0.9]}}}


def adamw(**changes):
    return {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, **changes}


def with_lora(tokenizer):
    adapters = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    model = small_lvlm("encoder", tokenizer)
    adapted = get_peft_model(model.model, adapters)
    for part in ("vision", "projector"):
        parts_of(adapted)[part].requires_grad_(True)
    return ComposerLVLM(adapted, model.processor)


MODELS = {
    "tower": lambda tokenizer: small_lvlm("encoder", tokenizer),
    "patches, tied head": lambda tokenizer: small_lvlm("patches", tokenizer, tie_word_embeddings=True),
    "tower, LoRA": with_lora,
    **{f"Hugging Face's {kind}": lambda _, kind=kind: HuggingFaceModel(make_vlm(kind)) for kind in KINDS},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_trained_weight_is_in_one_group_and_only_matrices_decay(tokenizer, name):
    model = MODELS[name](tokenizer)
    trained = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
    groups = build_optimizer(adamw(), model).param_groups
    assert sorted(trained[weight] for group in groups for weight in group["params"]) == sorted(trained.values())
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    products = {m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    products |= {m.in_proj_weight for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    decayed = {trained[weight] for group in groups if group["weight_decay"] for weight in group["params"]}
    assert decayed == {trained[weight] for weight in products - tables if weight in trained}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    everything = build_optimizer(adamw(decay_all=True), model).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in everything] == [(len(trained), 0.1)]


@pytest.mark.parametrize("tied", [False, True])
def test_the_longest_prefix_decides_and_goes_on_from_the_shorter(tokenizer, tied):
    model = small_lvlm("encoder", tokenizer, tie_word_embeddings=tied)
    parts = parts_of(model.model).items()
    names = {weight: f"{part}.{name}" for part, module in parts for name, weight in module.named_parameters()}
    optimizer = build_optimizer(adamw(groups=GROUPS), model)
    seen = {}
    for group in optimizer.param_groups:
        settings = (group["name"], group["lr"], tuple(group["betas"]), group["weight_decay"])
        seen |= {names[weight]: settings for weight in group["params"]}
    assert seen["vision.encoder.conv1.weight"] == ("vision", 1e-4, (0.9, 0.999), 0.1)
    assert seen["vision.encoder.positional_embedding"] == ("vision", 1e-4, (0.9, 0.999), 0.0)
    assert seen["projector.0.weight"] == ("group0", 0.01, (0.9, 0.999), 0.1)
    assert seen["language.model.layers.0.mlp.up_proj.weight"] == ("language", 1e-3, (0.9, 0.999), 0.2)
    head = "language.model.embed_tokens.weight" if tied else "language.lm_head.weight"
    assert seen[head] == ("language.lm_head", 1e-3, (0.8, 0.9), 0.0 if tied else 0.2)
    language = {"lr": 1e-3, "weight_decay": 0.2}
    dotted = {"vision": {"lr": 1e-4}, "language.lm_head": {"betas": [0.8, 0.9]}, "language": language}
    again = build_optimizer(adamw(groups=dotted), model).param_groups
    assert [{**group, "params": 0} for group in again] == [{**group, "params": 0} for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        (
            adamw(groups=GROUPS, fused=True),
            {"vision": 1 - 1e-5, "language": 1 - 2e-4, "group0": 1 - 1e-3},
        ),
        (
            adamw(name="decoupled_adamw", groups=GROUPS, weight_decay=0.01),
            {"vision": 1 - 0.01, "language": 1 - 0.2, "group0": 1 - 0.01},
        ),
    ],
    ids=["adamw", "decoupled_adamw"],
)
def test_decay_is_that_of_the_group(tokenizer, config, factors):
    """A step without any gradient: what decays shrinks by the factor of its group, and the rest stays to the bit."""
    model = small_lvlm("encoder", tokenizer)
    optimizer = build_optimizer(config, model)
    before = {weight: weight.detach().clone() for weight in model.parameters()}
    for weight in before:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for group in optimizer.param_groups:
        factor = factors[group["name"].split(".")[0]] if group["weight_decay"] else 1
        for weight in group["params"]:
            torch.testing.assert_close(weight, before[weight] * factor, rtol=0 if factor == 1 else 1e-6, atol=0)


REFUSED = [
    (
        {"visoin": {"lr": 1.0}},
        r"optimizer.groups.visoin: no weight's name begins so. Did you mean 'vision'\? Accepted",
    ),
    ({"language": {"lm_haed": {}}}, r"groups.language.lm_haed: .* Accepted: language.lm_head, language.model"),
    ({"projector": {}}, "optimizer.groups.projector: every weight of projector is frozen"),
    (
        {"language.model": {}, "language.lm_head": {}},
        r"groups.language.model and language.lm_head name one weight, for .* are tied",
    ),
    ({"vision": {"encoder": {"lr": 1.0}}, "vision.encoder": {}}, "optimizer.groups names vision.encoder twice"),
    (
        {"vision": {"verbose": True}},
        "groups.vision.verbose: told takes it for all weights alike",
    ),
]


@pytest.mark.parametrize(("groups", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_groups_that_fit_no_trained_weight_are_refused(tokenizer, groups, message):
    @register("optimizer", "told")
    class Told(torch.optim.SGD):
        def __init__(self, params, lr: float = 1.0, verbose: bool = False):
            super().__init__(params, lr=lr)

    model = small_lvlm("encoder", tokenizer, tie_word_embeddings=True)
    model.model.model.multi_modal_projector.requires_grad_(False)
    with pytest.raises(ValueError, match=message) as refused:
        build_optimizer({"name": "told", "groups": groups}, model)
    assert "\n" not in str(refused.value)


TRAINED = ["model.vision.freeze=false", "save_interval=2ba", *NO_REPORT]
OPTIMIZER = [
    "optimizer={name: adamw, lr: 0.01, weight_decay: 0.1, fused: true}",
    "optimizer.groups.vision={lr: 0.001, weight_decay: 0.0}",
    "optimizer.groups.language.lr=0.002",
    "scheduler.t_warmup=2ba",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run in groups on one rank."""
    folder = tmp_path_factory.mktemp("groups")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(recipe("ntp_vit", *TRAINED, *OPTIMIZER, "run_name=one"))
    return folder


@pytest.fixture(scope="module")
def two(runs):
    """The same run on two ranks that share each weight, whose checkpoints are of one file."""
    two_ranks("run_name=two", folder=runs)


def two_ranks(*overrides, folder=None):
    command = [ROOT / "train.py", ROOT / "yamls/ntp_vit.yaml", *SHRUNKEN, *VIT, *TRAINED, *OPTIMIZER]
    fork_ranks(folder, *command, "parallelism_config.fsdp2.state_dict_type=full", *overrides)


@pytest.fixture
def there(runs, monkeypatch):
    monkeypatch.chdir(runs)


def groups_in(run):
    checkpoint = torch.load(f"runs/{run}/checkpoints/latest-rank0.pt", weights_only=False)
    return checkpoint["state"]["optimizers"]["AdamW"]["param_groups"]


@pytest.mark.slow
def test_two_ranks_keep_the_groups_and_reach_the_losses_of_one(there, two):
    one = groups_in("one")
    assert groups_in("two") == one
    assert [(group["name"], group["initial_lr"], group["weight_decay"]) for group in one] == [
        ("vision", 0.001, 0.0),
        ("group0", 0.01, 0.1),
        ("group0", 0.01, 0.0),
        ("language", 0.002, 0.0),
        ("language", 0.002, 0.1),
    ]
    assert [loss for _, loss in losses("runs/two")] == pytest.approx([loss for _, loss in losses("runs/one")], abs=1e-4)


def test_each_rate_is_scheduled_and_logged_by_the_name_of_its_group(there):
    steps = [json.loads(line) for line in Path("runs/one/metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "lr-AdamW/vision" in step]
    assert {key for step in steps for key in step if key.startswith("lr-")} == {
        "lr-AdamW/vision",
        "lr-AdamW/language",
        "lr-AdamW/group0",
    }
    rates = [step["lr-AdamW/group0"] for step in steps]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert 0 < rates[3] < 0.01
    for step in steps:
        assert step["lr-AdamW/vision"] == pytest.approx(step["lr-AdamW/group0"] / 10)
        assert step["lr-AdamW/language"] == pytest.approx(step["lr-AdamW/group0"] / 5)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_groups_alone(there, two):
    two_ranks("run_name=again", "load_path=runs/two/checkpoints/ep0-ba2-rank0.pt")
    assert losses("runs/again") == losses("runs/two")[2:]
    assert groups_in("again") == groups_in("two")
    source = "load_path=runs/one/checkpoints/ep0-ba2-rank0.pt"
    for change, key in (
        ("optimizer.lr=0.02", "optimizer.lr"),
        ("optimizer.groups.projector.lr=0.1", "optimizer.groups.projector.lr"),
        ("optimizer.decay_all=true", "optimizer.decay_all"),
    ):
        with pytest.raises(ValueError, match=rf"is of another run: {key} differ"):
            train(recipe("ntp_vit", *TRAINED, *OPTIMIZER, source, "run_name=other", change))
