"""A loss, a gradient or a weight that is not finite: nothing takes it, and nothing of it is saved."""

import json
from pathlib import Path

import pytest
import torch
from common.commands import train as main
from common.recipes import FAULTS, ROOT, SHRUNKEN, VIT, fork_ranks, losses, recipe

from composer_prior.training.finite import NotFiniteError, SkipEmptySteps
from composer_prior.training.run import train


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arguments(*overrides, name="ntp_vit"):
    return [str(ROOT / f"yamls/{name}.yaml"), *SHRUNKEN, *VIT, *overrides]


def saved(run="ntp_vit"):
    return {path.name: path.read_bytes() for path in Path("runs", run, "checkpoints").glob("ep*")}


def state_of(batch):
    state = torch.load(f"runs/ntp_vit/checkpoints/ep0-ba{batch}-rank0.pt", weights_only=False)["state"]
    return state["model"], state["optimizers"]["DecoupledAdamW"]["state"]


def refused(*overrides, name="ntp_vit"):
    with pytest.raises(SystemExit) as caught:
        main(arguments(*overrides, name=name))
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "clipping", "what"),
    [
        ("spoil_batch", "norm", "loss"),
        ("spoil_gradient", "norm", "gradient norm"),
        ("spoil_gradient", "value", "gradient norm"),
    ],
)
def test_the_first_such_step_ends_the_run_and_the_checkpoints_stay(tiles, fault, clipping, what):
    run = [*tiles, f"callbacks.{fault}.at=[2]", f"algorithms.gradient_clipping.clipping_type={clipping}"]
    message = refused(*run, "autoresume=true")
    assert message.startswith(f"error: ntp_vit, batch 2: the {what} is not finite. Nothing of it is saved; ")
    assert message.endswith("nan_steps=1.")
    before = saved()
    assert [*sorted(before)] == ["ep0-ba1-rank0.pt", "ep0-ba2-rank0.pt"]
    assert refused(*run, "autoresume=true") == message
    assert saved() == before
    assert not Path("runs/ntp_vit/model").exists()
    assert not Path("runs/ntp_vit/report.html").exists()
    main(arguments(*tiles, "autoresume=true"))  # without the fault it goes on from there
    assert [batch for batch, _ in losses("runs/ntp_vit")] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["spoil_batch", "spoil_gradient"])
def test_as_many_as_are_allowed_change_nothing(tiles, fault, capsys):
    main(arguments(*tiles, f"callbacks.{fault}.at=[2]", "nan_steps=1"))
    (before, moments), (after, moments_after) = state_of(2), state_of(3)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert str(moments) == str(moments_after)
    assert not all(torch.equal(before[key], state_of(4)[0][key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in state_of(4)[0].values())
    assert Path("runs/ntp_vit/model/model.safetensors").exists()
    assert "The step changes nothing (1 of nan_steps=1)." in capsys.readouterr().out
    records = [json.loads(line) for line in Path("runs/ntp_vit/metrics.jsonl").read_text().splitlines()]
    assert "NaN" not in Path("runs/ntp_vit/metrics.jsonl").read_text()
    counted = [record.get("metrics/train/loss") is not None for record in records[:4]]
    assert counted == [True, True, False, True]


def test_one_more_than_are_allowed_ends_the_run(tiles):
    assert "batch 3: the loss is not finite" in refused(*tiles, "callbacks.spoil_batch.at=[1,3]", "nan_steps=1")
    assert "nan_steps=-1: expected at least 0" in refused(*tiles, "nan_steps=-1")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "parallelism_config.fsdp2={}"])
def test_one_of_two_ranks_ends_both_and_is_named(tiles, sharding, tmp_path):
    run = [*tiles, "callbacks.spoil_batch.at=[2]", "callbacks.spoil_batch.rank=1", *filter(None, [sharding])]
    output = fork_ranks(tmp_path, ROOT / "train.py", *arguments(*run), expect=1)
    assert output.count("error: ntp_vit, batch 2: the loss is not finite on rank 1. Nothing of it is saved") == 2
    assert "Traceback" not in output
    assert len(saved() if sharding is None else [*Path("runs/ntp_vit/checkpoints").glob("ep*")]) == 2
    output = fork_ranks(tmp_path, ROOT / "train.py", *arguments(*run, "nan_steps=1"))
    assert [loss is None for _, loss in losses("runs/ntp_vit")] == [False, False, True, False]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_neither_saved_nor_gone_on_from(tiles):
    fault = "callbacks.spoil_weight.at=[4]"  # after the last step, when no loss follows
    message = refused(*tiles, fault)
    assert message.startswith("error: ntp_vit: no checkpoint is saved after batch 4: the weight ")
    assert "ep0-ba4-rank0.pt" not in saved()
    assert refused(*tiles, fault, "save_folder=null").startswith("error: runs/ntp_vit/model is not written: the weight")
    assert not Path("runs/ntp_vit/model").exists()


@pytest.mark.slow
def test_a_checkpoint_of_such_weights_is_refused(tiles):
    main(arguments(*tiles, "max_duration=2ba"))
    path = Path("runs/ntp_vit/checkpoints/ep0-ba2-rank0.pt")
    content = torch.load(path, weights_only=False)
    next(iter(content["state"]["model"].values())).view(-1)[0] = float("nan")
    torch.save(content, path)
    assert f"error: {path} is not gone on from; delete it" in refused(*tiles, "autoresume=true", "max_duration=2ba")


@pytest.mark.slow
def test_a_reference_of_such_weights_is_never_finished():
    with pytest.raises(NotFiniteError, match=r"^runs/reference/model is not written: the weight "):
        train(recipe("reference", FAULTS, "callbacks.spoil_weight.at=[4]", "save_folder=null", "autoresume=false"))
    assert not Path("runs/reference/model").exists()


@pytest.mark.slow
def test_the_monitor_of_composer_has_a_name_that_reads(tiles):
    for name in ("nan_monitor", "na_n_monitor"):
        main(arguments(*tiles, f"callbacks.{name}={{}}", "max_duration=1ba", "save_folder=null"))


def test_a_checkpoint_without_the_count_of_unusable_samples_is_resumed():
    """As earlier versions wrote it: Composer saves an empty state of a callback without one."""
    callback = SkipEmptySteps()
    callback.load_state_dict({})
    assert callback.state_dict() == {"unused": {}}
