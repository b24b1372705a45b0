"""The installed command: help, what is answered before Composer is imported, and a wheel that works on its own."""

import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from common.recipes import ROOT, SHRUNKEN, VIT, run_program

from composer_prior.cli import JOBS, main
from composer_prior.options import options_of, parse_options
from composer_prior.training.config import TrainConfig, load_recipe

HEAVY = "{'torch', 'composer', 'streaming', 'transformers'}"


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2), (["trian"], 2)])
def test_jobs_are_listed(capsys, words, status):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == status
    output = capsys.readouterr()
    shown = output.err if status else output.out
    assert all(f"  {name}" in shown for name in JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_option_with_its_default_and_a_sentence(capsys, job):
    with pytest.raises(SystemExit):
        main([job, "--help"])
    lines = capsys.readouterr().out.splitlines()[2:]
    module, _, name = JOBS[job].options.partition(":")
    assert [line.split()[0] for line in lines] == [*options_of(getattr(import_module(module), name))]
    for line in lines:
        assert len(line.split(maxsplit=1)) == 2, f"{line} says nothing"


def test_help_of_a_recipe_names_every_key_and_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {field.name} " in shown for field in fields(TrainConfig))
    assert "decides everything random [17]" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--help"],
        ["train", "prior_vit.yaml", "max_durtion=2ba"],
        ["launch", "nproc=2", "train", "prior_vit.yaml", "max_durtion=2ba"],
        ["score", "--help"],
        ["convert", "--help"],
    ],
)
def test_some_answers_need_no_composer(tmp_path, words):
    code = f"""if True:
        import sys
        from composer_prior.cli import main
        try:
            main({words!r})
        except SystemExit as end:
            print(end, {HEAVY} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    last = done.stdout.splitlines()[-1]
    assert last.endswith("set()"), last
    assert "--help" in words or "max_durtion is not a key of a recipe. Did you mean 'max_duration'?" in last


@pytest.mark.parametrize("words", [["launch"], ["launch", "nproc=2"], ["launch", "nproc=2", "trian"]])
def test_a_launch_of_no_job_says_how(words):
    with pytest.raises(SystemExit, match=r"usage: composer-prior launch \[option=value ...\] JOB ..."):
        main(words)


def test_options_are_typed():
    def job(*, name: str = "x", count: int | None = 3, share: float = 0.5, size: int | str = 4) -> None:
        """Do something.

        Args:
            name: what it is called. Never a number.
            count, share: of :func:`.others`.
        """

    options = options_of(job)
    words = ["a", "name=2017", "count=null", "share=.25", "size=64mb", "b"]
    given = {"name": "2017", "count": None, "share": 0.25, "size": "64mb"}
    assert parse_options(words, options) == (["a", "b"], given)
    assert [options[name].sentence for name in options] == ["what it is called", "of others", "of others", ""]
    assert [option.default for option in options.values()] == ["x", "3", "0.5", "4"]
    with pytest.raises(ValueError, match=r"nmae is not an option\. Did you mean 'name'"):
        parse_options(["nmae=1"], options)


def test_shipped_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("prior_vit.yaml").run_name == "prior_vit"
    Path("prior_vit.yaml").write_text("run_name: mine")
    with pytest.raises(ValueError, match=r"prior_vit\.yaml lacks"):
        load_recipe("prior_vit.yaml")


def test_a_wheel_works_on_its_own(tmp_path):
    """Built, installed beside its requirements and run in an empty folder: nothing of the checkout is there."""
    source = tmp_path / "source"  # setuptools leaves a folder build/ where it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("composer_prior", "yamls"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("composer_prior-*.whl")
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    assert (installed / "composer_prior/yamls/studies/prior_vs_ntp.yaml").is_file()
    study = [sys.executable, "-m", "composer_prior", "study", "prior_vs_ntp.yaml", "plan=true"]
    output, _ = run_program(*study, cwd=here, PYTHONPATH=str(installed))
    assert f"train.py {installed}/composer_prior/yamls/prior_vit.yaml " in output
    command = [sys.executable, "-m", "composer_prior", "train", "prior_vit.yaml", *SHRUNKEN, *VIT]
    output, _ = run_program(*command, cwd=here, PYTHONPATH=str(installed))
    assert "prior_vit, 4 batches" in output
    assert (here / "runs/reference/model/model.safetensors").exists()
    assert (installed / "bin/composer-prior").exists()
