"""Studies at real scale: costs, commands, and results read back from a bucket or a folder."""

import json
import shlex
from pathlib import Path

import pytest
from common.commands import study as main
from common.s3_server import s3_server
from common.studies import write_study
from omegaconf import OmegaConf

from composer_prior.studies.results import read_results
from composer_prior.training.config import load_recipe


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study("study.yaml", grids={"methods": {"method": "all"}, "steps": {"method": "prior", "steps": "all"}})


def put_run(folder, records, config=None):
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config is not None:
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")


def records(batches, loss=1.5):
    done = {"batch": batches, "time/batch": batches, "time/sample": 8 * batches, "time/total": 0.1}
    return [{"batch": 0, "time/batch": 0}, {**done, "metrics/eval/loss": loss}]


def test_cost_and_commands(capsys):
    put_run("measured", [{"batch": i, "throughput/device/samples_per_sec": v} for i, v in enumerate([9e9, 1, 2, 30])])
    assert main(["study.yaml", "plan=true", "gpus=4"]) == 0
    shown = capsys.readouterr().out
    assert "measured=RUN_FOLDER" in shown
    assert "GPU hours: give" in shown
    table = [line.split() for line in shown.splitlines()]
    assert table[0] == ["cell", "steps", "samples"]
    assert ["ntp-seed1", "4", "32"] in table
    assert ["prior-steps2-seed1", "2", "16"] in table
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("composer ")]
    assert [command[:4] for command in commands] == [
        ["composer", "-n", "4", "-m"],
        *([["composer", "-n", "4", "train.py"]] * 4),
    ]
    names = []
    for command in commands[1:]:
        recipe = load_recipe(command[4], command[5:])
        names.append(recipe.run_name)
        assert recipe.run_folder == f"studies/tiny/cells/{recipe.run_name}"
        assert recipe.autoresume
    assert names == ["ntp-seed1", "prior-seed1", "floor-seed1", "prior-steps2-seed1"]
    assert not Path("studies").exists()

    assert main(["study.yaml", "plan=true", "measured=nowhere"]) == 1
    assert "nowhere: its metrics.jsonl has no throughput/device/samples_per_sec" in capsys.readouterr().err
    write_study("study.yaml", grids={"methods": {"method": "all"}}, axes={"method": {"ntp": {}}, "seed": [1]})
    assert main(["study.yaml", "plan=true", "measured=measured", "max_duration=7200ba", "gpus=2"]) == 0
    shown = capsys.readouterr().out
    # The median of 9e9, 1, 2 and 30 samples per second is 16; 7200 batches of 8 samples take one hour.
    assert ["ntp-seed1", "7,200", "57,600", "1.00"] in [line.split() for line in shown.splitlines()]
    assert "Total: 1.00 GPU hours, 0.50 hours on 2 GPUs, at 16 samples per second and GPU" in shown


def check_read_back(remote, capsys):
    assert main(["study.yaml", f"remote={remote}"]) == 0
    shown = capsys.readouterr().out
    assert f"tiny: 1 cells read from {remote}, 3 of 4 still missing" in shown
    assert "ntp-seed1: it has done 3 of 4ba" in shown
    assert "floor-seed1: its seed is 5, that of the study 1" in shown
    assert "prior-steps2-seed1: it is not there yet" in shown
    header, lines = read_results(Path("studies/tiny/results.jsonl"))
    assert header["name"] == "tiny"
    assert [line["benchmark"] for line in lines] == ["validation", "training"]
    assert lines[0]["cell"] == {"method": "prior", "steps": "4", "seed": "1"}
    assert lines[0]["figures"] == {"loss": 1.5}
    assert lines[1]["figures"]["samples"] == 32
    assert lines[1]["figures"]["seconds"] == pytest.approx(360)
    assert main(["study.yaml", f"remote={remote}"]) == 0
    assert "0 cells read" in capsys.readouterr().out
    assert read_results(Path("studies/tiny/results.jsonl"))[1] == lines
    assert main(["study.yaml", "plan=true"]) == 0
    assert "run_name=prior-seed1" not in capsys.readouterr().out.split(" -m ")[1].partition("\n")[2]


def put_runs(place):
    put_run(f"{place}/prior-seed1", records(4))
    put_run(f"{place}/ntp-seed1", records(3))
    put_run(f"{place}/floor-seed1", records(4), {"seed": 5})


def test_results_from_a_folder(capsys):
    put_runs("cluster")
    check_read_back("cluster", capsys)


@pytest.mark.slow
def test_results_from_a_bucket(capsys, monkeypatch):
    pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    put_runs("cluster")
    with s3_server("runs") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        bucket = boto3.resource("s3", endpoint_url=environment["S3_ENDPOINT_URL"]).Bucket("runs")
        for file in Path("cluster").rglob("*.*"):
            bucket.upload_file(str(file), f"study/{file.relative_to('cluster')}")
        check_read_back("s3://runs/study", capsys)
    assert main(["study.yaml", "remote=s3://nowhere/study"]) == 1
    assert "s3://nowhere/study: cannot be listed" in capsys.readouterr().err
