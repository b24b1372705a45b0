"""What can be known before the reference is trained is refused before it, in one line that names the key."""

import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from common.commands import train as main
from common.data import write_tiles
from common.models import small_lm
from common.recipes import ROOT, SHRUNKEN, VIT, recipe
from composer.utils import dist

from composer_prior import registry
from composer_prior.models.sharding import ON_CPU
from composer_prior.training import trainer
from composer_prior.training.builders import without_models
from composer_prior.training.config import load_recipe
from composer_prior.training.validate import (
    _check_labels,
    _check_positions_of_reference,
    check_parts,
    frozen_at_random,
)

OTHER_TOWER = ["model.vision.pretrained=null", "model.vision.image_size=null"]
PACKAGES = {"wandb": "wandb", "comet_ml_logger": "comet_ml", "mlflow": "mlflow", "neptune_logger": "neptune"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the first test makes data and tokenizer for the others."""
    return tmp_path_factory.mktemp("made")


def refused(name, *overrides):
    """What the command says; nothing has been trained when it does."""
    with pytest.raises(SystemExit) as caught:
        main([str(ROOT / f"yamls/{name}.yaml"), *SHRUNKEN, *VIT, *overrides])
    assert not Path("runs").exists()
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["precision=amp_bf16"], "error: precision=amp_bf16 needs a GPU"),
        (["reference.precision=amp_fp16"], "reference.precision=amp_fp16 needs a GPU"),
        (["train_loader.persistent_workers=true"], "train_loader: persistent_workers option needs num_workers > 0"),
        (["reference.eval_loader.prefetch_factor=2"], "reference.eval_loader: prefetch_factor"),
        (["device_train_microbatch_size=auto"], "device_train_microbatch_size=auto needs a GPU"),
        (["device_train_microbatch_size=auto", "parallelism_config.fsdp2={}"], "auto: Composer finds no size"),
        (["parallelism_config.fsdp3={}"], "parallelism_config.fsdp3 is not a key. Did you mean 'fsdp2'"),
        (["parallelism_config.fsdp={}"], "parallelism_config.fsdp: FSDP1 is not supported; use fsdp2"),
        (["parallelism_config.fsdp2.mixed_precision=half"], "fsdp2.mixed_precision='half': expected DEFAULT or PURE"),
        (["parallelism_config.fsdp2.state_dict_type=whole"], "fsdp2.state_dict_type='whole': expected sharded or full"),
        (
            ["parallelism_config.fsdp2.data_parallel_replicate_degree=3"],
            "parallelism_config: fsdp2.data_parallel_repl.*=3",
        ),
        (["compile_config.backend=none_such"], "compile_config: .*none_such"),
        (["compile_config.bogus=1"], "compile_config: .*bogus"),
        (["optimizer.lr=-1.0"], "optimizer: Invalid learning rate"),
        (["optimizer.groups.language.lr=-1.0"], "optimizer.groups.language: Invalid learning rate"),
        (["reference.optimizer.groups.language.betas=[0.9,2.0]"], "reference.optimizer.groups.language: Invalid beta"),
        (["scheduler.t_warmup=soon"], "error: scheduler.t_warmup='soon': expected a time such as 500ba"),
        (["algorithms.prior.alpha=-1.0"], "algorithms.prior: alpha=-1"),
        (["algorithms.prior.floor=1.5"], "algorithms.prior: floor=1.5"),
        (
            ["algorithms.prior.streams.train.alfa=1"],
            "algorithms.prior: streams.train.alfa is not a key of prior. Did you",
        ),
        (["algorithms.prior.reference_dtype=half"], "algorithms.prior.reference_dtype='half': expected .*bfloat16"),
        (["scoring.dtype=half"], "dtype=half: expected one of float32, bfloat16, float16"),
        (["scoring.amp=true"], "scoring.amp is not a key of scoring"),
        (["algorithms.prior.start=soon"], "error: algorithms.prior.start='soon': expected a time"),
        (["algorithms.focal={}"], "PRIOR and Focal both weight the tokens: leave all but one out"),
        (["algorithms.prior=null", "algorithms.cal.window=2"], "window=2: expected an odd number"),
        (["callbacks.generate={prompts: [a], interval: soon}"], "callbacks.generate.interval='soon': expected a time"),
        (["load_path=nowhere.pt"], "load_path=nowhere.pt: there is no such checkpoint"),
        (["init_from=nowhere"], "init_from=nowhere: expected a run folder with a checkpoint"),
        (["init_from=s3://bucket/run"], "init_from=s3://bucket/run: weights are not read from a bucket"),
        (["load_path=a.pt", "init_from=b.pt"], "init_from and load_path are both given"),
        (["autoresume=true", "save_folder=null"], "autoresume=true needs save_folder"),
        *(
            (
                [f"loggers.{name}={{}}"],
                f"{name}: the package {package} is missing: pip install -c constraints.txt {package}$",
            )
            for name, package in PACKAGES.items()
            if name != "wandb"
        ),
        (["loggers.wandb={}"], r"wandb is missing: pip install -c constraints\.txt -e '\.\[wandb\]'$"),
    ],
)
def test_before_anything_is_made(overrides, expected):
    assert_matches(refused("prior_vit", *overrides), expected)
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*OTHER_TOWER, "model.vision.architecture=RN50"], "has no list of transformer blocks"),
        ([*OTHER_TOWER, "model.vision.architecture=convnext_base"], "has no list of transformer blocks"),
        (
            [*OTHER_TOWER, "model.vision.architecture=ViT-B-16-SigLIP", "model.vision.layer=40"],
            "layer=40: .* has 12 layers",
        ),
        (["reference.model.language.config.max_position_embeddings=100"], "100 positions, and a sequence may take 129"),
        (["model.vision.image_size=336"], "512 positions, and a sequence may take 913: bos, 784 image"),
        (["model.projector=null"], "model.projector is missing"),
        (["model.projector.factor=2"], "model.projector.name=mlp takes no model.projector.factor"),
        (["model.projector.name=pixel_shuffle"], "model.projector.name=pixel_shuffle needs model.projector.factor"),
        (["model.projector={name: mean_pool, factor: 3}"], "model.projector.factor=3 does not divide"),
        (["model.label_smoothing=2.0"], "label_smoothing=2.0"),
        (["model.language.pretrained=nowhere/model"], "model.language.pretrained='nowhere/model' is neither a folder"),
        (
            ["tokenizer={name: nowhere/tokenizer, train: null}"],
            "tokenizer.name='nowhere/tokenizer' is neither a folder",
        ),
        (["reference.model.language.config.model_type=lama"], "lama"),
        (["model.language.attn_implementation=none_such"], "none_such"),
        (
            ["algorithms.prior.streams.tiles=null"],
            "error: algorithms.prior.streams.tiles: the data have no such stream. .*Accepted: train.$",
        ),
        (["algorithms.mix_up={}"], "MixUp does not stack with PRIOR"),
        (
            ["algorithms.squeeze_excite={}"],
            "SqueezeExcite makes new weights, which are in no group of optimizer; set its",
        ),
        ([f"model.{part}.freeze=true" for part in ("vision", "projector", "language")], "all frozen"),
        (["optimizer.groups.vision.lr=1.0"], "optimizer.groups.vision: every weight of vision is frozen"),
        (
            ["reference.optimizer.groups.projector.lr=1.0"],
            "reference.optimizer.groups.projector: no weight's name begins",
        ),
        (["benchmarks.foils={data: nowhere.jsonl}"], "error: data=nowhere.jsonl: there is no such file"),
        (["train_loader.dataset.local=nowhere"], "nowhere/index.json cannot be read"),
        (["train_loader.dataset.shuffle_algo=none_such"], "none_such"),
        (
            ["reference.global_train_batch_size=80"],
            "error: reference.train_loader: of 64 samples each rank gets 64, .* lower reference.global_train_batch_s",
        ),
        (["scheduler.t_warmup=1sp"], "error: scheduler: .*t_warmup"),
        (["train_loader.dataset.prompt='<image> says'"], "prompt='<image> says' spells <image>"),
    ],
)
def test_before_the_reference_is_trained(overrides, expected, made, monkeypatch):
    monkeypatch.chdir(made)
    assert_matches(refused("prior_vit", *overrides), expected)


def test_a_reference_that_a_component_needs_is_left_to_it(monkeypatch):
    class Needs:
        def __init__(self, reference: str):
            pass

    monkeypatch.setitem(registry._COMPONENTS, "benchmark", {"needs": Needs})
    mine = {"benchmark": "needs", "reference": "model", "limit": 2}
    pope = {"data": "questions.json"}
    components = {"mine": mine, "pope": {**pope, "reference": "model"}, "foils": None}
    assert without_models("benchmark", components) == {"mine": mine, "pope": pope, "foils": None}


def test_fsdp2_without_a_gpu(monkeypatch):
    monkeypatch.delenv(ON_CPU)
    expected = "error: parallelism_config: fsdp2 needs GPUs; leave parallelism_config out to train with DDP."
    assert refused("prior_vit", "parallelism_config.fsdp2={}") == expected


def assert_matches(message, expected):
    assert re.search(expected, message), message


def test_data_of_another_kind_than_the_recipe_needs():
    several = write_tiles(Path("several"), 16, several=True)
    data = [f"{prefix}train_loader.dataset.local={several}" for prefix in ("", "reference.")]
    assert "there are no stored scores of samples with several captions" in refused("prior_vit", *data)


def test_a_reference_that_would_learn_other_captions():
    other = write_tiles(Path("other"), 16)
    message = refused("prior_vit", f"reference.train_loader.dataset.local={other}")
    assert "reference.train_loader.dataset holds other data than train_loader.dataset" in message


@pytest.mark.parametrize(
    ("key", "differs"),
    [("model.vision.image_size=48", "image_processor"), ("train_loader.dataset.prompt=so", "prompt")],
)
def test_a_live_viewer_that_would_read_other_batches(key, differs, made, monkeypatch):
    monkeypatch.chdir(made)
    live = ["train_loader.dataset.viewer_scores=null", "viewer.model.vision.image_size=24"]
    message = refused("gain_vit", *live, f"viewer.{key}")
    where = "algorithms.image_gain.viewer=runs/viewer/model"
    assert message.startswith(f"error: {where}: The viewer has another {differs} than the model")


def test_scores_of_other_data():
    folder = Path("scores")
    folder.mkdir()
    card = '{"data": "0", "samples": 0, "tokenizer": "0", "prompt": "", "max_caption_tokens": 128, "reference": {}, '
    (folder / "scores.json").write_text(card + '"version": 1}')
    (folder / "index.json").write_text('{"version": 2, "shards": []}')
    message = refused("prior_vit", "train_loader.dataset.scores=scores")
    assert "The scores in scores do not belong to this run; what differs: data" in message


@pytest.mark.parametrize("key", ["", "reference."])
def test_ranks_that_cannot_share_a_batch(monkeypatch, key):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=f"^{key}global_train_batch_size=8 cannot be shared evenly by 3 ranks"):
        check_parts(recipe("reference"), key)


def test_a_library_that_is_missing_or_fails_at_the_start_is_one_line(monkeypatch, capsys):
    """What goes wrong while the Trainer is made, here that of the reference, is no traceback either."""

    def fail(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(trainer, "Trainer", fail)
    assert refused("prior_vit") == "error: RuntimeError: two lines"


def test_a_reference_needs_positions_for_conversations(tokenizer):
    small_lm(tokenizer, max_position_embeddings=64).config.save_pretrained("reference")
    recipe = SimpleNamespace(
        helpers={}, algorithms={"prior": {"reference": "reference"}}, train_loader={"dataset": {"scores": None}}
    )
    check = partial(_check_positions_of_reference, recipe, SimpleNamespace(tokenizer=tokenizer), where="")
    check(SimpleNamespace(has_messages=True, max_tokens=64))
    check(SimpleNamespace(has_messages=False, max_tokens=65))
    with pytest.raises(ValueError, match=r"prior.reference=reference: it has 64 positions, and a conversation may"):
        check(SimpleNamespace(has_messages=True, max_tokens=65))


def test_a_loader_has_no_name_of_a_stream():
    recipe = SimpleNamespace(eval_loaders={"pages": {}})
    _check_labels(recipe, ["captions", "chat"], "")
    _check_labels(recipe, ["pages"], "")  # alone, it has no metrics by its name
    with pytest.raises(ValueError, match=r"eval_loaders.pages: its metrics, metrics/eval/pages/loss"):
        _check_labels(recipe, ["captions", "pages"], "")


NEW_TOWER = ("prior_vit", "model.vision.pretrained=null")
NEW_LANGUAGE = ("model.language={config: {model_type: llama}, pretrained: null}",)
NEW_MODEL = ("smolvlm", "model.config={model_type: idefics3}", "model.processor.name=somewhere")


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("prior_vit",), ""),
        (NEW_TOWER, "model.vision.freeze=true"),
        ((*NEW_TOWER, "model.projector.freeze=true"), "model.vision.freeze=true, model.projector.freeze=true"),
        ((*NEW_TOWER, "model.vision.freeze=false"), ""),
        ((*NEW_TOWER, "init_from=runs/stage1"), ""),
        (("prior_patch", "model.vision.freeze=true"), "model.vision.freeze=true"),
        (("smolvlm", "model.freeze=[vision]", "model.lora.r=2"), ""),
        (("prior_vit", *NEW_LANGUAGE, "model.language.lora.r=2"), "model.language.lora"),
        ((*NEW_MODEL, "model.pretrained=null", "model.freeze=null", "model.lora.r=2"), "model.lora"),
        ((*NEW_MODEL, "model.pretrained=null", "model.freeze=[vision]"), "model.freeze=['vision']"),
    ],
)
def test_frozen_random_weights_are_named(words, keys):
    warning = frozen_at_random(load_recipe(ROOT / "yamls" / f"{words[0]}.yaml", words[1:]))
    assert warning.startswith(f"Warning: {keys} keeps random weights" if keys else "")
    assert bool(warning) == bool(keys)
