"""Two ranks of Composer's launcher: the losses of one, elastic resumption, and a rank that dies."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from common.recipes import NO_REPORT, ROOT, SHRUNKEN, TORCHRUN, VIT, fork_ranks, launch, losses, recipe, run_program

from composer_prior.training.checkpoints.loading import read_weights
from composer_prior.training.checkpoints.storage import find_weights
from composer_prior.training.run import train

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


def program(*overrides):
    return [str(ROOT / "train.py"), str(ROOT / "yamls/prior_vit.yaml"), *SHRUNKEN, *VIT, *overrides]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same recipe on two ranks, from nothing, and on one, and each gone on from the checkpoint of the other."""
    folder = tmp_path_factory.mktemp("runs")
    here = Path.cwd()
    os.chdir(folder)
    try:
        output = launch(folder, *program("run_name=two", "save_interval=2ba"))
        train(recipe("prior_vit", "run_name=one", "save_interval=2ba"))
        checkpointing = "parallelism_config.fsdp2.activation_checkpointing=true"
        fork_ranks(folder, *program("run_name=fsdp2", checkpointing, "save_interval=2ba"))
        one, two = (f"load_path=runs/{name}/checkpoints/ep0-ba2-rank0.pt" for name in ("one", "two"))
        copies = "parallelism_config.fsdp2.data_parallel_replicate_degree=2"
        sharded = "load_path=runs/fsdp2/checkpoints/ep0-ba2"
        fork_ranks(folder, *program("run_name=fsdp2_to_hsdp", copies, sharded, *NO_REPORT), ranks=4)
        fork_ranks(folder, *program("run_name=one_to_two", one))
        train(recipe("prior_vit", "run_name=two_to_one", two, *NO_REPORT))
    finally:
        os.chdir(here)
    return folder, output


def assert_close(ours, expected):
    assert [batch for batch, _ in ours] == [batch for batch, _ in expected]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], abs=TOLERANCE)


@pytest.mark.parametrize("name", ["two", "fsdp2"])
def test_two_ranks_reach_the_losses_of_one(runs, name):
    folder, _ = runs
    one = losses(folder / "runs/one")
    assert len(one) == 4
    assert_close(losses(folder / "runs" / name), one)


def srun(folder, *command):
    """Run two tasks with the variables of Slurm's ``srun``, and without those that a Trainer has set here."""
    shared = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    shared |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    with ThreadPoolExecutor(2) as pool:
        tasks = [{**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        python = ["env", *(f"--unset={name}" for name in TORCHRUN), sys.executable]
        running = [pool.submit(run_program, *python, *command, cwd=folder, **task) for task in tasks]
    return [one.result() for one in running]


def torchrun(folder, *command):
    return run_program(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command, cwd=folder)


def accelerate(folder, *command):
    options = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--cpu"]
    return run_program(Path(sys.executable).with_name("accelerate"), "launch", *options, *command, cwd=folder)


@pytest.mark.parametrize("launcher", [srun, torchrun, accelerate])
def test_other_launchers_reach_the_same_losses(runs, launcher):
    folder, _ = runs
    launcher(folder, *program(f"run_name={launcher.__name__}", *NO_REPORT))
    assert_close(losses(folder / "runs" / launcher.__name__), losses(folder / "runs/two"))


@pytest.mark.parametrize("name", ["two_to_one", "one_to_two", "fsdp2_to_hsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(runs, name):
    folder, _ = runs
    assert_close(losses(folder / "runs" / name), losses(folder / "runs/one")[2:])


def test_one_copy_of_the_model_is_saved(runs):
    """HSDP: of four ranks the two of the first copy write their parts."""
    folder, _ = runs
    saved = folder / "runs/fsdp2_to_hsdp/checkpoints/ep0-ba4"
    assert {path.name for path in saved.iterdir()} >= {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert len([*saved.glob("*.distcp")]) == 2
    ours, expected = (read_weights(find_weights(folder / "runs" / name))[0] for name in ("fsdp2_to_hsdp", "one"))
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


def test_only_one_rank_reports(runs):
    _, output = runs
    for line in ("Data: making", "Tokenizer: training", "Reference: training", "Scores: "):
        assert output.count(line) == 1
    assert output.count("reference (text only)") == 1
    assert output.count("generated:") == 2


def test_the_table_of_two_ranks_is_that_of_one(runs):
    folder, _ = runs

    def validation(name):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return {k: v for line in lines for k, v in json.loads(line).items() if k.startswith("metrics/eval")}

    one, two = validation("one"), validation("two")
    assert len(one) == 7
    assert two == pytest.approx(one, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["two", "fsdp2"])
def test_benchmarks_of_two_ranks_are_those_of_one(runs, name):
    folder, _ = runs
    one, other = (figures(folder / "runs" / run) for run in ("one", name))
    assert {key.split("/")[1] for key in one} == {"scene_foils", "hallucination", "captioning"}
    assert other == pytest.approx(one, abs=0.1)  # the weights differ in the last digits, and a choice may turn
    exact = [key for key in one if key.split("/")[2] in ("chance", "text_only")]
    assert [other[key] for key in exact] == [one[key] for key in exact]


def figures(folder):
    last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in last.items() if key.startswith("eval/")}


def test_checkpoints_hold_the_model_and_nothing_that_grows_with_the_data(runs):
    folder, _ = runs
    checkpoint = folder / "runs/two/checkpoints/ep0-ba4-rank0.pt"
    state = torch.load(checkpoint, weights_only=False)["state"]
    weights = sum(tensor.numel() for tensor in state["model"].values())
    assert not any("reference" in name for name in state["model"])
    sharded, _ = read_weights(find_weights(str(folder / "runs/fsdp2")))
    assert {name: tensor.shape for name, tensor in sharded.items()} == {
        name.removeprefix("module."): tensor.shape for name, tensor in state["model"].items()
    }
    assert checkpoint.stat().st_size < 3 * 4 * weights + 300_000  # weights and two moments of Adam, and small change


def test_a_rank_that_dies_takes_the_others_down(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "from composer.utils import dist, get_device\n"
        "dist.initialize_dist(get_device('cpu'))\n"
        "if dist.get_global_rank() == 1:\n    raise RuntimeError('this rank has died')\n"
        "dist.barrier()\nimport time\ntime.sleep(600)\n"
    )
    output = launch(tmp_path, str(script), expect=1, timeout=240)  # the other rank would sleep for ten minutes
    assert "RuntimeError: this rank has died" in output
    assert "Traceback" in output
