"""Weights of one run as the start of another: what may differ, and what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import hostile
from common.commands import train as main
from common.data import write_tiles
from common.recipes import ROOT, SHRUNKEN, VIT, fork_ranks, losses, recipe
from common.tokenizers import plain_tokenizer
from composer.utils.checkpoint import FileSystemReaderWithValidation
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException

from composer_prior.training.checkpoints.identity import RUN_ID, RunIdentity, check_checkpoint, read_identity
from composer_prior.training.checkpoints.loading import load_weights
from composer_prior.training.checkpoints.pickles import ASKED_BY_COMPOSER
from composer_prior.training.checkpoints.storage import LATEST_NAME, find_weights
from composer_prior.training.run import train

PROJECTOR_ALONE = ["model.vision.freeze=true", "model.language.freeze=true"]


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A run that trained its projector alone, on one rank, and the same on two with FSDP2."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(recipe("ntp_vit", *PROJECTOR_ALONE, "run_name=stage1"))
    command = [str(ROOT / "train.py"), str(ROOT / "yamls/ntp_vit.yaml"), *SHRUNKEN, *VIT, *PROJECTOR_ALONE]
    fork_ranks(folder, *command, "run_name=sharded", "parallelism_config.fsdp2={}")
    return folder


@pytest.fixture
def here(stage_one, tmp_path, monkeypatch):
    shutil.copytree(stage_one, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def final_weights(run):
    return torch.load(f"runs/{run}/checkpoints/latest-rank0.pt", weights_only=False)["state"]["model"]


def stage_two(*overrides):
    """Everything trained, on other data, with another seed and optimizer; stopped before it has changed anything."""
    other = write_tiles(Path("other"), 16) if not Path("other").exists() else "other"
    data = ["reference=null", "model.language.pretrained=runs/reference/model", f"train_loader.dataset.local={other}"]
    changes = [*data, "run_name=stage2", "seed=5", "optimizer={name: adamw, lr: 0.0}", "max_duration=1ba"]
    return recipe("ntp_vit", *changes, *overrides)


@pytest.mark.parametrize(
    "source", ["runs/stage1", "runs/stage1/checkpoints", "runs/stage1/checkpoints/ep0-ba4-rank0.pt", "runs/sharded"]
)
def test_weights_alone_are_taken_over(here, source, capsys):
    """Of one file or sharded: the weights are those at the end of the first stage, whatever else differs."""
    train(stage_two(f"init_from={source}", "optimizer.weight_decay=0.0"))
    expected, found = final_weights("stage1"), final_weights("stage2")
    tolerance = 1e-5 if source == "runs/sharded" else 0  # two ranks add up in another order
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0, msg=name)
    assert "Weights: language, projector, vision from runs/" in capsys.readouterr().out
    assert [batch for batch, _ in losses("runs/stage2")] == [0]


@pytest.mark.slow
def test_the_second_stage_is_resumed_as_itself(here, monkeypatch):
    """A resumed run goes on from its own checkpoint, not from the first stage's weights, and keeps its identity."""
    changes = ["init_from=runs/stage1", "optimizer.lr=0.01", "save_interval=1ba"]
    train(stage_two(*changes, "max_duration=2ba"))
    whole = losses("runs/stage2")
    shutil.rmtree("runs/stage2")
    train(stage_two(*changes, "max_duration=1ba"))
    with monkeypatch.context() as patch:  # weights that it does not take need not fit any more
        patch.setattr("composer_prior.training.validate.load_weights", lambda *_: pytest.fail("it does not start anew"))
        train(stage_two(*changes, "max_duration=2ba", "autoresume=true"))
    assert [batch for batch, _ in losses("runs/stage2")] == [0, 1]
    assert losses("runs/stage2")[0] == whole[0]
    with pytest.raises(ValueError, match=r"is of another run: seed differ .*init_from=.* and a run_name of its own"):
        train(stage_two(*changes, "seed=6", "max_duration=3ba", "autoresume=true"))


def test_load_path_of_another_stage_names_the_way(here):
    with pytest.raises(
        ValueError, match=r"model.language.freeze.* load_path and autoresume go on with the same run; to st"
    ):
        train(stage_two("load_path=runs/stage1/checkpoints/ep0-ba4-rank0.pt"))


def test_a_sharded_checkpoint_is_resumed_and_a_foreign_one_refused(here):
    checkpoint = find_weights("runs/sharded")
    identity = RunIdentity(read_identity(checkpoint)).state_dict()
    with pytest.raises(ValueError, match=r"ep0-ba4 is of another run: seed differ \(seed: 17 there, 3 here\)"):
        check_checkpoint(checkpoint, {**identity, "seed": 3})
    run_id = check_checkpoint(checkpoint, {key: value for key, value in identity.items() if key != RUN_ID})
    assert run_id == identity[RUN_ID]
    arguments = [str(ROOT / "train.py"), str(ROOT / "yamls/ntp_vit.yaml"), *SHRUNKEN, *VIT, *PROJECTOR_ALONE]
    again = ["run_name=sharded", "parallelism_config.fsdp2={}", "autoresume=true", "max_duration=5ba"]
    fork_ranks(here, *arguments, *again, "save_num_checkpoints_to_keep=1")
    assert {path.name for path in checkpoint.parent.iterdir()} == {"ep0-ba5", LATEST_NAME}
    assert read_identity(find_weights("runs/sharded"))[RUN_ID] == run_id
    assert [batch for batch, _ in losses("runs/sharded")] == [0, 1, 2, 3, 4]


def test_a_model_folder_gives_the_language_model(here, capsys):
    train(stage_two("init_from=runs/reference/model", "optimizer.weight_decay=0.0"))
    assert "Weights: language from runs/reference/model; projector, vision stay as the recipe says" in (
        capsys.readouterr().out
    )
    reference = torch.load("runs/reference/checkpoints/latest-rank0.pt", weights_only=False)["state"]["model"]
    found = final_weights("stage2")
    decoder, inside = "model.model.", "model.model.language_model."
    assert all(torch.equal(found[name.replace(decoder, inside)], tensor) for name, tensor in reference.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vision.layer=-2"], r"weights differ, such as .*resblocks.*, which it does not have"),
        (["model.projector.name=linear"], "weights differ, such as model.multi_modal_projector"),
        (
            ["init_from=runs/nowhere"],
            "init_from=runs/nowhere: expected a run folder with a checkpoint, a checkpoint, or",
        ),
        (["init_from=pickled.pt"], "holds Python objects .* and is not loaded"),
        (["init_from=half.pt"], "half.pt is not a whole checkpoint"),
        (["init_from=changed.pt"], "changed.pt is not a whole checkpoint: .* has changed"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(here, overrides, message):
    """And nothing is removed for it of an earlier run of that name."""
    checkpoint = Path("runs/stage1/checkpoints/ep0-ba4-rank0.pt")
    shutil.copytree("runs/stage1/checkpoints", "runs/stage2/checkpoints")
    content = bytearray(checkpoint.read_bytes())
    Path("half.pt").write_bytes(content[:-1000])
    content[len(content) // 2] ^= 1
    Path("changed.pt").write_bytes(content)
    torch.save({"state": {"model": Path("x")}}, "pickled.pt")
    arguments = [str(ROOT / "yamls/ntp_vit.yaml"), *SHRUNKEN, *VIT, "run_name=stage2", "init_from=runs/stage1"]
    with pytest.raises(SystemExit, match=message) as caught:
        main([*arguments, *overrides])
    assert "\n" not in caught.value.code
    assert not Path("runs/stage2/metrics.jsonl").exists()
    assert Path("runs/stage2/checkpoints", checkpoint.name).exists()


SMALL = ["tokenizer={name: small, train: {vocab_size: 300}}"], "trained with another tokenizer than the recipe's"
LINEAR = ["model.projector.name=linear"], "weights differ, such as model.multi_modal_projector"


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        *((source, *SMALL) for source in ("stage1", "stage1/model", "sharded", "reference/model")),
        *((source, *LINEAR) for source in ("stage1", "stage1/model", "sharded")),
    ],
)
def test_what_does_not_fit_is_refused_before_the_reference_is_trained(here, source, overrides, message):
    changes = [f"init_from=runs/{source}", "run_name=stage2", "reference.run_name=another", *overrides]
    with pytest.raises(ValueError, match=message):
        train(recipe("ntp_vit", *changes))
    assert not Path("runs/another/metrics.jsonl").exists()


def test_another_tokenizer_of_the_same_size_is_refused(here, tokenizer):
    model = SimpleNamespace(tokenizer=plain_tokenizer("gpt2", ["a tile"] * 9, 400), parameters=list)
    with pytest.raises(ValueError, match="trained with another tokenizer than"):
        load_weights("runs/stage1", model)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (hostile.metadata, r"ep0-ba4/.metadata holds Python objects \(posix.mkdir\) and is not loaded"),
        (hostile.value, r"ep0-ba4/__0_0.distcp holds Python objects \(posix.mkdir\) and is not loaded"),
        (hostile.file_elsewhere, r"ep0-ba4/.metadata names files that do not belong to a checkpoint"),
    ],
)
def test_code_in_a_sharded_checkpoint_is_not_run(here, monkeypatch, plant, message):
    """On any road: goes on from it, starts from its weights, or Composer reads it after all."""
    checkpoint = find_weights("runs/sharded")
    identity = read_identity(checkpoint)
    check_checkpoint(checkpoint, RunIdentity(identity).state_dict())
    plant(checkpoint)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(checkpoint, identity)
    if plant != hostile.value:  # which no weights need
        with pytest.raises(ValueError, match=message):
            load_weights(
                "runs/sharded", SimpleNamespace(tokenizer=plain_tokenizer("smollm2", ["a"] * 3), parameters=list)
            )
    for name, function in ASKED_BY_COMPOSER.items():
        monkeypatch.setenv(name, function)
    hidden = "|metadata is None"  # all that torch 2.11 says of whatever keeps it from reading .metadata
    with pytest.raises((ValueError, CheckpointException), match=message + hidden):
        load({"state.run_name": None}, storage_reader=FileSystemReaderWithValidation(str(checkpoint)), no_dist=True)
    assert not Path("executed").exists()


def test_the_newest_checkpoint_of_a_run_folder_is_meant(here):
    assert find_weights("runs/stage1") == Path("runs/stage1/checkpoints/ep0-ba4-rank0.pt")
    assert find_weights("runs/reference/model") == Path("runs/reference/model")
    shutil.rmtree("runs/reference/checkpoints")
    assert find_weights("runs/reference") == Path("runs/reference/model")
