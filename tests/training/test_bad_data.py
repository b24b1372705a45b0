"""Runs on data of which nothing can be used in a step, or at the end, or at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.commands import train as main
from common.data import write_tiles
from common.recipes import ALONE, ROOT, SHRUNKEN, VIT, fork_ranks, losses, recipe

from composer_prior.training.run import train


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def own(train_data, validation=None, *overrides):
    """Overrides that put a recipe on data of one's own, without a reference."""
    loaders = [f"train_loader.dataset.local={train_data}", "train_loader.dataset.shuffle=false"]
    loaders += ["eval_loader=null"] if validation is None else [f"eval_loader.dataset.local={validation}"]
    return [*ALONE, *loaders, *overrides]


def arguments(name, *overrides):
    return [str(ROOT / f"yamls/{name}.yaml"), *SHRUNKEN, *VIT, *overrides]


@pytest.mark.parametrize("duration", ["4ba", "1ep"])
def test_fewer_samples_than_a_batch_are_refused_with_the_numbers(duration):
    few = write_tiles(Path("few"), 5)
    expected = "error: train_loader: of 5 samples each rank gets 5, fewer than the 8 of its first batch; lower global_"
    with pytest.raises(SystemExit, match=expected):
        main(arguments("ntp_vit", *own(few, None, f"max_duration={duration}")))
    assert not Path("runs").exists()


def test_as_many_samples_as_a_batch_and_a_smaller_last_batch_are_enough():
    train(recipe("ntp_vit", *own(write_tiles(Path("eight"), 8), None, "max_duration=2ba")))
    assert len(losses("runs/ntp_vit")) == 2
    few = own(write_tiles(Path("few"), 5), None, "max_duration=2ba", "train_loader.drop_last=false")
    train(recipe("ntp_vit", *few))
    assert len(losses("runs/ntp_vit")) == 2


@pytest.mark.parametrize("loader", ["train_loader", "eval_loader"])
def test_an_empty_data_set_is_refused(loader):
    full, empty = write_tiles(Path("full"), 8), write_tiles(Path("empty"), 0)
    data = own(empty, full) if loader == "train_loader" else own(full, empty)
    with pytest.raises(SystemExit, match=r"^error: empty holds no samples\.$"):
        main(arguments("ntp_vit", *data))
    assert not Path("runs").exists()


def test_a_validation_set_that_gives_no_batch_is_refused():
    data = own(write_tiles(Path("full"), 8), write_tiles(Path("few"), 3), "eval_loader.drop_last=true")
    with pytest.raises(SystemExit, match=r"eval_loader: of 3 samples each rank gets 3, .* set eval_loader.drop_last=f"):
        main(arguments("ntp_vit", *data))


def weights(run, batch):
    state = torch.load(f"runs/{run}/checkpoints/ep0-ba{batch}-rank0.pt", weights_only=False)["state"]
    return state["model"], state["optimizers"]["DecoupledAdamW"]["state"]


@pytest.mark.parametrize("name", ["ntp_vit", "prior_vit"])
def test_a_step_without_any_usable_sample_changes_nothing(name, caplog):
    """Batch 1 of 0, 1, 2 is all bad; its step leaves weights and moments as they are, and the run goes on."""
    data = own(
        write_tiles(Path("tiles"), 24, bad=range(8, 16)),
        None,
        "max_duration=3ba",
        "save_interval=1ba",
        "save_num_checkpoints_to_keep=-1",
        "train_loader.dataset.on_bad_sample=skip",
        "train_loader.num_workers=0",
    )
    if name == "prior_vit":
        train(recipe("reference", "max_duration=1ba", "autoresume=false"))
        data += ["train_loader.dataset.scores=null", "algorithms.prior.reference=runs/reference/model"]
    train(recipe(name, *data))
    found = losses(f"runs/{name}")
    assert [batch for batch, _ in found] == [0, 1, 2]
    assert found[1][1] == 0
    assert all(loss > 0 for batch, loss in found if batch != 1)
    (before, moments), (after, moments_after) = weights(name, 1), weights(name, 2)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert str(moments) == str(moments_after)
    assert not all(torch.equal(before[key], weights(name, 3)[0][key]) for key in before)
    assert "Batch 1 holds no sample that can be used" in caplog.text
    assert "NaN" not in Path(f"runs/{name}/metrics.jsonl").read_text()


@pytest.mark.parametrize("batches", [4, 40])
def test_a_stream_without_any_usable_sample_is_told_or_ends_the_run(batches, capsys, caplog):
    good, bad = write_tiles(Path("good"), 8), write_tiles(Path("bad"), 8, bad=range(8))
    streams = f"train_loader.dataset.streams={{good: {{local: {good}}}, bad: {{local: {bad}}}}}"
    data = own("null", None, streams, f"max_duration={batches}ba", "train_loader.dataset.on_bad_sample=skip")
    data += ["train_loader.num_workers=0"]
    if batches == 4:
        train(recipe("ntp_vit", *data, "max_duration=2ba"))
        train(recipe("ntp_vit", *data, "autoresume=true"))  # which goes on counting
        said = "Warning: the first 16 samples of bad cannot be used; the log gives the reason for each. "
        said += "The model learned nothing from bad."
        assert capsys.readouterr().out.count(said) == 1
    else:
        with pytest.raises(ValueError, match=r"train_loader: the first 1\d\d samples of bad cannot be used"):
            train(recipe("ntp_vit", *data))
    skipped = "Skipped sample 8 of bad (number 0 of ./shard.00000.mds): the image cannot be decoded"
    assert skipped in caplog.text


@pytest.mark.slow
def test_bad_samples_of_one_rank_cost_the_other_nothing(tmp_path):
    """Two ranks: in batch 0 one of them has nothing, in batch 1 neither has; a run on one rank says what is right."""
    data = own(
        write_tiles(tmp_path / "tiles", 24, bad=(*range(4), *range(8, 16))),
        None,
        "max_duration=3ba",
        "train_loader.dataset.on_bad_sample=skip",
        "train_loader.dataset.num_canonical_nodes=1",
        "save_folder=null",
    )
    train(recipe("ntp_vit", *data, "run_name=one"))
    fork_ranks(None, ROOT / "train.py", *arguments("ntp_vit", *data, "run_name=two"))
    one, two = losses("runs/one"), losses("runs/two")
    assert [batch for batch, _ in two] == [0, 1, 2]
    assert one[1][1] == two[1][1] == 0
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)


def test_the_report_leaves_out_what_it_cannot_read_and_says_so(capsys):
    data = own(
        write_tiles(Path("full"), 8),
        write_tiles(Path("validation"), 6, bad=(0, 2)),
        "max_duration=1ba",
        "eval_loader.dataset.on_bad_sample=skip",
        "sample_captions=3",
    )
    train(recipe("ntp_vit", *data))
    output = capsys.readouterr().out
    assert [line.split(":", 1)[1].strip() for line in output.splitlines() if "true:" in line] == [
        f"a tile of shade {number} é☃" for number in (1, 3, 4)
    ]
    assert output.count("left out:") == 2
    assert "left out:  sample 0 (number 0 of ./shard.00000.mds): the image cannot be decoded" in output
    assert "config.yaml and metrics.jsonl are in runs/ntp_vit" in output


def test_the_report_shows_one_of_several_captions(capsys):
    data = own(write_tiles(Path("full"), 8), write_tiles(Path("validation"), 4, several=True), "max_duration=1ba")
    train(recipe("ntp_vit", *data))
    output = capsys.readouterr().out
    shown = [line.split(":", 1)[1].strip() for line in output.splitlines() if "true:" in line]
    for number, caption in enumerate(shown):
        assert caption in (f"a tile of shade {number}", f"shade {number} é☃")
    assert len(shown) == 2


def test_a_validation_set_of_bad_samples_alone_is_no_end(capsys):
    data = own(
        write_tiles(Path("full"), 8),
        write_tiles(Path("validation"), 3, bad=range(3)),
        "max_duration=1ba",
        "eval_loader.dataset.on_bad_sample=skip",
    )
    train(recipe("ntp_vit", *data))
    output = capsys.readouterr().out
    assert output.count("left out:") == 3
    assert "true:" not in output
    assert json.loads(Path("runs/ntp_vit/metrics.jsonl").read_text().splitlines()[0])["batch"] == 0


@pytest.mark.parametrize(
    "part",
    ["composer_prior.models.image_text_model.ImageTextModel.generate", "composer_prior.training.trainer.run_report"],
)
def test_what_goes_wrong_in_the_report_is_said_and_ends_no_run(part, capsys, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(part, fail)
    data = own(write_tiles(Path("full"), 8), write_tiles(Path("validation"), 4), "max_duration=1ba")
    main(arguments("ntp_vit", *data))
    output = capsys.readouterr().out
    assert output.count("The closing report lacks a part: RuntimeError: out of memory") == 1
    assert Path("runs/ntp_vit/report.html").exists() == ("generate" in part)
    failed = output.count("Benchmark captioning: no figures after batch 1: out of memory\n")
    assert failed == ("generate" in part)
    where = f"{Path(__file__).name}, line {fail.__code__.co_firstlineno + 1}; the traceback is in the log"
    assert output.count(where) == caplog.text.count("RuntimeError: out of\nmemory") > failed
    assert "checkpoints in runs/ntp_vit/checkpoints, the model in Hugging Face format in runs/ntp_vit/model." in output


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "closed"])
def test_a_terminal_of_other_characters_or_none_is_no_end(tmp_path, encoding):
    data = own(write_tiles(tmp_path / "full", 8), write_tiles(tmp_path / "validation", 4), "max_duration=1ba")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8" if encoding == "closed" else encoding,
    }
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments("ntp_vit", *data)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        if encoding == "closed":
            process.stdout.close()
            errors = process.stderr.read()
        else:
            output, errors = process.communicate(timeout=300)
            assert "a tile of shade 0 \\xe9\\u2603" in output.decode(encoding)
    assert process.returncode == 0, errors[-3000:]
    assert len(losses("runs/ntp_vit")) == 1
