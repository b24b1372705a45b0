"""The tools of maintainers, as far as they run here."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_prior.training.config import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check_cuda(monkeypatch):
    """``tools/check_cuda.py`` without its runs of the recipe, which take minutes."""
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "tools/check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "runs", lambda tokenizer, device: [])
    return module


def test_the_cpu_agrees_with_itself_and_that_is_all_that_is_said(check_cuda, capsys):
    assert check_cuda.main(["device=cpu"]) == 0
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert "this does not test a GPU" in first
    assert last == "All agree."
    assert sum(row.startswith("agrees") for row in rows) == len(rows) - 1 == 26
    assert [row for row in rows if not row.startswith("agrees")] == [
        "not run  head by cut-cross-entropy, bfloat16: it needs a GPU"
    ]


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_what_differs_is_named_and_the_status_says_so(check_cuda, monkeypatch, capsys, wrong):
    right = check_cuda.linear_nll
    monkeypatch.setattr(check_cuda, "linear_nll", lambda *given: (right(*given)[0] * wrong, None))
    monkeypatch.setattr(check_cuda, "models", lambda tokenizer, device: [])
    assert check_cuda.main(["device=cpu"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert "differ: head in blocks, float32: losses" in out.splitlines()[-1]


def test_the_recipe_takes_the_overrides(check_cuda):
    recipe = load_recipe(check_cuda.RECIPE, check_cuda.overrides("in_float32", "fp32"))
    assert recipe.train_loader["dataset"]["local"] == "data/train"
    assert recipe.train_loader["dataset"]["remote"] is None
    assert recipe.algorithms["prior"]["reference"] == "runs/reference_in_float32/model"


@pytest.mark.gpu
@pytest.mark.slow
def test_the_gpu_agrees_with_the_cpu():
    done = subprocess.run([sys.executable, ROOT / "tools/check_cuda.py"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(check_cuda, capsys):
    assert check_cuda.main([]) == 1
    assert capsys.readouterr().out.startswith("No GPU is available; device=cpu tests the check itself")
