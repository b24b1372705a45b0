"""Runs that go on: from the end of an epoch, with another max_duration, or when they have finished already."""

import json
import shutil
from pathlib import Path

import pytest
from common.commands import train as main
from common.data import write_tiles
from common.recipes import ROOT, SHRUNKEN, VIT, fork_ranks, recipe

from composer_prior.training.run import train

pytestmark = pytest.mark.slow

TIMED = ("time/t", "time/v", "throughput/")  # not the same twice


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arguments(*overrides, name="ntp_vit"):
    return [str(ROOT / f"yamls/{name}.yaml"), *SHRUNKEN, *VIT, *overrides]


def metrics(run):
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def read(run, rank=0):
    """What was read in each batch, the last time where it was read twice; and all that were read."""
    lines = [json.loads(line) for line in Path(f"{run}.{rank}").read_text().splitlines()]
    return {number: rest for number, *rest in lines}, [number for number, *_ in lines]


@pytest.mark.parametrize(
    ("kill", "ranks", "changes"),
    [
        ("{at: 8, event: epoch_start}", 1, ["train_loader.num_workers=1"]),
        ("{at: 10, event: batch_end}", 2, ["train_loader.dataset.num_canonical_nodes=4"]),
        ("{at: 10, event: batch_end}", 2, ["parallelism_config.fsdp2={}"]),
    ],
)
def test_a_checkpoint_at_the_end_of_an_epoch_goes_on_with_the_next(tiles, tmp_path, kill, ranks, changes):
    """In its order, with the captions that it draws, and with the metrics of a run that was not killed."""
    validation = f"eval_loader.dataset.local={write_tiles(tmp_path / 'validation', 4)}"
    run = [change for change in tiles if change != "eval_loader=null"]
    run += ["max_duration=3ep", "save_interval=1ep", "eval_interval=1ep", "autoresume=true", validation, *changes]
    whole = arguments(*run, "run_name=whole", "callbacks.spy={}")
    killed = arguments(*run, "run_name=killed", "callbacks.spy={}", f"callbacks.kill={kill}")
    fork_ranks(tmp_path, ROOT / "train.py", *whole, ranks=ranks)
    fork_ranks(tmp_path, ROOT / "train.py", *killed, ranks=ranks, expect=-9)
    fork_ranks(tmp_path, ROOT / "train.py", *killed, ranks=ranks)
    for rank in range(ranks):
        expected, found = read("whole", rank), read("killed", rank)
        assert found[0] == expected[0]
        assert found[1][-4:] == [8, 9, 10, 11]
    epochs = [[dict(zip(*expected[0][4 * epoch + batch], strict=True)) for batch in range(4)] for epoch in (1, 2)]
    assert [set(one) for one in epochs[0]] != [set(one) for one in epochs[1]], "another order"
    drawn = [{sample: labels for batch in epoch for sample, labels in batch.items()} for epoch in epochs]
    assert any(drawn[0][sample] != drawn[1][sample] for sample in drawn[0].keys() & drawn[1].keys()), "other captions"
    assert epochs[0] != epochs[1]
    assert metrics("killed") == metrics("whole")


@pytest.mark.parametrize(
    "duration",
    [["max_duration=1ep", "save_interval=1ep"], ["max_duration=20sp", "scheduler.t_warmup=0sp"]],
)
def test_a_finished_run_has_finished_also_where_its_last_batch_held_more(tiles, capsys, duration):
    for _ in range(2):
        main(arguments(*tiles, "autoresume=true", "save_folder=${run_folder}", *duration))
    assert "ntp_vit has finished already" in capsys.readouterr().out


def test_a_finished_run_without_validation_is_completed(tiles, capsys):
    run = arguments(*tiles, "autoresume=true", "max_duration=3ba")
    main(run)
    for name in ("model", "report.html"):
        place = Path("runs/ntp_vit", name)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    before = metrics("ntp_vit")
    file = Path("runs/ntp_vit/metrics.jsonl")
    *_, last = file.read_text().splitlines()
    stopped = {name: value for name, value in json.loads(last).items() if not name.startswith("time/")}
    file.write_text(file.read_text().replace(last, json.dumps(stopped)))
    main(run)
    assert "ntp_vit has finished already" in capsys.readouterr().out
    assert Path("runs/ntp_vit/model/model.safetensors").exists()
    assert Path("runs/ntp_vit/report.html").exists()
    for name in ("time/batch_in_epoch", "time/sample_in_epoch"):
        del before[-1][name]
    assert metrics("ntp_vit") == before


def test_a_reference_that_was_killed_before_its_model_was_written_is_completed():
    validation = ["eval_loader=null", "reference.eval_loader=null", "max_duration=1ba", *VIT[1:], "sample_captions=0"]
    run = [*validation, "train_loader.dataset.scores=null"]
    train(recipe("reference", "eval_loader=null", "autoresume=true"))
    shutil.rmtree("runs/reference/model")
    train(recipe("prior_vit", *run))
    assert Path("runs/reference/model/reference.json").exists()
    assert len(metrics("prior_vit")) >= 1


def test_what_the_schedule_does_after_max_duration_was_raised_is_said(tiles, capsys):
    """Of most weights, where groups have rates of their own."""
    run = [*tiles, "autoresume=true", "scheduler.t_warmup=0ba", "callbacks.lr_monitor={}"]
    run.append("optimizer.groups.projector.lr=0.01")
    main(arguments(*run, "max_duration=4ba"))
    main(arguments(*run, "max_duration=8ba"))
    output = capsys.readouterr().out
    rates = [line["lr-DecoupledAdamW/group0"] for line in metrics("ntp_vit") if "lr-DecoupledAdamW/group0" in line]
    said = (
        "ntp_vit goes on after batch 4, from runs/ntp_vit/checkpoints/ep0-ba4-rank0.pt. The schedule is that of "
        f"max_duration=8ba: the learning rate of the others goes from {rates[3]:.3g} to {rates[4]:.3g} there."
    )
    assert said in output
    assert rates[4] > rates[3]


@pytest.mark.parametrize(("longer", "shorter", "done"), [("4ba", "3ba", "4ba"), ("6ba", "1ep", "1ep and 2 batches")])
def test_a_max_duration_that_is_less_than_what_is_done_is_refused(tiles, longer, shorter, done):
    main(arguments(*tiles, f"max_duration={longer}"))
    before = Path("runs/ntp_vit/metrics.jsonl").read_text()
    with pytest.raises(
        SystemExit, match=f"ntp_vit: max_duration={shorter} is less than .* has done, {done}; give more"
    ):
        main(arguments(*tiles, f"max_duration={shorter}", "autoresume=true"))
    assert Path("runs/ntp_vit/metrics.jsonl").read_text() == before
