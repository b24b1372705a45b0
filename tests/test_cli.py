"""The installed command: help, what is answered before Composer is imported, and a wheel that works on its own."""

import re
import shutil
import signal
import subprocess
import sys
from ast import literal_eval
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from common.recipes import ROOT, SHRUNKEN, VIT, run_program

from composer_prior import __version__, registry
from composer_prior.commands.cli import JOBS, main
from composer_prior.options import options_of, parse_options
from composer_prior.training.config import TrainConfig, load_recipe

HEAVY = "{'torch', 'composer', 'streaming', 'transformers'}"


ANSWERED = {
    (
        "train",
        "prior_vit.yaml",
        "max_durtion=2ba",
    ): "max_durtion is not a key of a recipe. Did you mean 'max_duration'?",
    (
        "launch",
        "nproc=2",
        "train",
        "prior_vit.yaml",
        "max_durtion=2ba",
    ): "max_durtion is not a key of a recipe. Did you",
    ("trian",): "trian is not a job. Did you mean 'train'?",
    ("train",): "usage: composer-prior train RECIPE.yaml",
    ("caption", "MODEL"): "usage: composer-prior caption MODEL IMAGE|FOLDER|REMOTE ...",
    ("caption", "MODEL", "a.png", "batch_sise=3"): "batch_sise is not an option. Did you mean 'batch_size'?",
    ("caption", "MODEL", "a.png", "num_beams=many"): "num_beams='many': expected int",
    ("evaluate", "MODEL"): "benchmarks: captioning, foils, hallucination, image_dependence, pope, scene_foils",
    ("evaluate", "MODEL", "benchmark=popp"): "benchmark='popp' is not a known benchmark. Did you mean 'pope'?",
    ("evaluate", "MODEL", "benchmark=pope", "anwsers=a,b"): "anwsers is not an option. Did you mean 'answers'?",
    ("evaluate", "MODEL", "benchmark=scene_foils", "samples=few"): "samples='few': expected int",
    ("inspect", "nosuch"): "error: nosuch: no index.json here",
    ("export", "MODEL"): "usage: composer-prior export MODEL OUT",
    (
        "study",
        "prior_vs_ntp.yaml",
        "plann=true",
    ): "plann is neither an option nor a key of a recipe. Did you mean",
    ("score", "prior_vit.yaml", "unit_samples=few"): "unit_samples='few': expected int",
    ("train", "prior_vit.yaml", "max_duration=soon"): "max_duration='soon': expected a time",
    ("train", "prior_vit.yaml", "model.vison.x=1"): "model.vison is not a key of lvlm. Did you mean 'vision'?",
    ("train", "prior_vit.yaml", "model.vision.frezee=true"): "is not a key of open_clip. Did you mean 'freeze'?",
    (
        "train",
        "prior_vit.yaml",
        "model.language.pretraind=x",
    ): "not a key of model.language. Did you mean 'pretrained'",
    ("train", "prior_vit.yaml", "train_loader.num_wokers=1"): "train_loader.num_wokers is not a key of train_loader.",
    (
        "train",
        "prior_vit.yaml",
        "train_loader.dataset.shufle=true",
    ): "is not a key of train_loader.dataset.",
    ("train", "prior_vit.yaml", "optimizer.lrr=1"): "optimizer.lrr is not a key of decoupled_adamw. Did you mean 'lr'",
    ("train", "prior_vit.yaml", "reference.scheduler.t_warmup=50"): "reference.scheduler.t_warmup=50: expected a time",
    ("train", "prior_vit.yaml", "algorithms.prior.alfa=1"): "algorithms.prior.alfa is not a key of prior.",
    ("train", "prior_vit.yaml", "algorithms.piror={}"): "'piror' is not a known algorithm. Did you mean 'prior'?",
    ("train", "prior_vit.yaml", "callbacks.lr_monitr={}"): "'lr_monitr' is not a known callback. Did you mean 'lr_m",
    ("train", "prior_vit.yaml", "loggers.wandb.projct=x"): "loggers.wandb.projct is not a key of wandb. Did you mean",
    ("train", "prior_vit.yaml", "benchmarks.captioning.splitt=x"): "captioning.splitt is not a key of captioning.",
    ("train", "prior_vit.yaml", "benchmarks.scene_foils.prior=x"): "scene_foils. Did you mean 'reference'?",
    ("evaluate", "model", "benchmark=scene_foils", "prior=x"): "prior is not an option. Did you mean 'reference'?",
    ("launch", "nproc=2", "train", "prior_vit.yaml", "scheduler.t_max=2"): "scheduler.t_max=2: expected a time",
}


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


def test_answers_about_options_need_no_composer(tmp_path):
    asked = [*([*words, "--help"] for words in [["evaluate", "MODEL", "benchmark=pope"], *([job] for job in JOBS)])]
    code = f"""if True:
        import contextlib, io, sys
        from composer_prior.commands.cli import main
        for words in {[*asked, *map(list, ANSWERED)]!r}:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                try:
                    main(words)
                except SystemExit as end:
                    said.write(str(end.code))
            print((words, said.getvalue(), sorted({HEAVY} & set(sys.modules))))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    for words, said, heavy in map(literal_eval, done.stdout.splitlines()):
        assert not heavy, f"{words} imports {heavy}"
        assert ANSWERED.get(tuple(words), "usage: composer-prior ") in said, said
    assert len(done.stdout.splitlines()) == len(asked) + len(ANSWERED)


@pytest.mark.parametrize("words", [["launch"], ["launch", "nproc=2"], ["launch", "nproc=2", "trian"]])
def test_a_launch_of_no_job_says_how(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "usage: composer-prior launch [option=value ...] JOB ..." in capsys.readouterr().err


def test_what_is_read_from_source_is_what_is_imported():
    for job in JOBS.values():
        module, _, name = job.options.partition(":")
        assert options_of(job.options).keys() == options_of(getattr(import_module(module), name)).keys()
        imported, read = options_of(getattr(import_module(module), name)), options_of(job.options)
        assert [(o.name, o.default, o.sentence) for o in read.values()] == [
            (o.name, o.default, o.sentence) for o in imported.values()
        ]
    for kind in registry._SHIPPED:
        for name, place in registry.shipped(kind).items():
            module, _, attribute = place.partition(":")
            constructor = getattr(import_module(module), attribute)
            assert registry.look_up(kind, name, kind) is constructor
            if "unknown" not in registry.parameters_of(place):
                assert [*registry.parameters_of(place)] == [*registry.parameters_of(constructor)], name


def test_help_refers_nobody_to_code(capsys):
    for words in [[job] for job in JOBS] + [["evaluate", f"benchmark={name}"] for name in registry.names("benchmark")]:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert not re.search(r"see [A-Za-z_.]*[A-Z]|composer_prior\.|FORMATS|options too", capsys.readouterr().out), (
            words
        )


def test_a_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"composer-prior {__version__}\n")


def test_help_may_be_cut_off():
    program = f"{sys.executable} -m composer_prior"
    command = f"set -o pipefail; {program} convert --help | head -1; {program} --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["evaluate", "x", "benchmark=pope", "limit=abc"], "limit='abc': expected int | None"),
        (
            ["evaluate", "x", "benchmark=captioning", "max_new_tokens=many"],
            "max_new_tokens='many': expected int of at least 1",
        ),
        (["caption", "x", "y", "batch_size=[4]"], "batch_size=[4]: expected int"),
        (["caption", "x", "y", "seed=null"], "seed=None: expected int"),
        (["caption", "x", "y", "overwrite=perhaps"], "overwrite='perhaps': expected bool"),
        (["study", "prior_vs_ntp.yaml", "processes=two"], "processes='two': expected int"),
        (["study", "prior_vs_ntp.yaml", "plan=1"], "plan=1: expected bool"),
        (["convert", "x", "y", "processes=1.5"], "processes=1.5: expected int | None"),
        (["inspect", "x", "alpha=high"], "alpha='high': expected float"),
        (["inspect", "x", "samples=1e3"], "samples=1000.0: expected int"),
        (["export", "x", "y", "overwrite=2"], "overwrite=2: expected bool"),
        (["launch", "nproc=two", "train"], "nproc='two': expected int of at least 1 | None"),
        (["launch", "nproc=0", "train"], "nproc=0: expected int of at least 1 | None"),
        (["score", "prior_vit.yaml", "unit_samples=few"], "unit_samples='few': expected int"),
        (["score", "prior_vit.yaml", "batch_tokens=1.5"], "batch_tokens=1.5: expected int | None"),
    ],
)
def test_an_option_has_the_type_that_it_is_documented_with(capsys, words, refused):
    with pytest.raises(SystemExit) as end:
        main(words)
    said = f"{end.value.code}{capsys.readouterr().err}"
    assert f"error: {refused}." in said
    assert len(said.splitlines()) <= 2


def test_shipped_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("prior_vit.yaml").run_name == "prior_vit"
    Path("prior_vit.yaml").write_text("run_name: mine")
    with pytest.raises(ValueError, match=r"prior_vit\.yaml lacks"):
        load_recipe("prior_vit.yaml")


@pytest.mark.slow
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


INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the job", "in its imports"])
def test_ctrl_c_is_one_line(moment, tmp_path):
    """Also in a job that has imported Composer, which takes signals for itself."""
    meanwhile = INTERRUPT if moment == "in its imports" else ""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/inspect.py").write_text(
        f"print('begun', flush=True)\nimport composer\n{meanwhile}\n"
        "def run(words, options):\n    import time\n    print('runs', flush=True)\n    time.sleep(60)\n"
    )
    program = (
        "from composer_prior import commands\n"
        "from composer_prior.commands import cli\n"
        "commands.__path__[:] = ['jobs']\n"
        "cli.main(['inspect', 'data'])\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert job.stdout.readline() == "begun\n"
    if moment == "in the job":
        assert job.stdout.readline() == "runs\n"
        job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, said.strip()) == (130, "Stopped by Ctrl-C.")


def test_ctrl_c_in_the_first_imports_is_one_line(tmp_path):
    (tmp_path / "omegaconf.py").write_text(INTERRUPT)
    command = [sys.executable, "-m", "composer_prior", "--help"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "Stopped by Ctrl-C.")
