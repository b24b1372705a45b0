"""A full disk: one line with folder, size and what is free, and what was whole stays."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from common.recipes import losses, recipe
from PIL import Image

from composer_prior.commands.cli import main
from composer_prior.data.storage import WriteError
from composer_prior.training.checkpoints.storage import LATEST_NAME
from composer_prior.training.run import train

pytestmark = pytest.mark.slow

FREE = r"cannot be written \(File too large\): it takes [\d.]+ MB, and [\d,.]+ MB are free there"
PLAIN = ["sample_captions=0", *(f"benchmarks.{name}=null" for name in ("scene_foils", "hallucination", "captioning"))]


@contextmanager
def files_of_at_most(size):
    """The system refuses longer ones, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", [[], ["parallelism_config.fsdp2={}"]], ids=["one file", "sharded"])
def test_a_checkpoint_that_does_not_fit_ends_the_run_and_leaves_the_one_before(kind, capsys):
    words = ["save_interval=2ba", "save_num_checkpoints_to_keep=1", *kind]
    train(recipe("reference", *words, "max_duration=2ba"))
    folder, model = Path("runs/reference/checkpoints"), Path("runs/reference/model/model.safetensors")
    (kept,) = folder.glob("ep0-ba2*")
    before, size = model.read_bytes(), kept.stat().st_size if kept.is_file() else 100_000
    with files_of_at_most(size // 2), pytest.raises(WriteError, match=f"^{folder} {FREE}.*autoresume=true") as caught:
        train(recipe("reference", *words))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == sorted([kept.name, LATEST_NAME])
    assert model.read_bytes() == before
    assert "Traceback" not in capsys.readouterr().err
    train(recipe("reference", *words))
    assert [batch for batch, _ in losses("runs/reference")] == [*range(4)]


def test_a_model_on_the_way_that_does_not_fit_ends_nothing(capsys):
    words = ["callbacks.hf_checkpointer={interval: 2ba}", "save_folder=null", *PLAIN]
    train(recipe("prior_vit", *words, "max_duration=1ba"))
    model = Path("runs/prior_vit/model/model.safetensors")
    before = model.read_bytes()
    with files_of_at_most(len(before) // 2), pytest.raises(WriteError, match=f"^runs/prior_vit/model {FREE}"):
        train(recipe("prior_vit", *words))
    assert "Model: runs/prior_vit/huggingface/ba2 was not written" in capsys.readouterr().out
    assert len(losses("runs/prior_vit")) == 4
    assert model.read_bytes() == before
    assert not [*Path("runs/prior_vit").glob(".*")]


def test_a_conversion_names_the_folder():
    Path("pictures").mkdir()
    Image.frombytes("RGB", (150, 150), os.urandom(67500)).save("pictures/a.png")
    Path("pictures/captions.jsonl").write_text('{"image": "a.png", "caption": "noise"}\n')
    with files_of_at_most(20_000), pytest.raises(SystemExit) as end:
        main(["convert", "pictures/captions.jsonl", "out", "images=pictures", "processes=1"])
    assert "out cannot be written (File too large): " in end.value.code
    assert "\n" not in end.value.code
    with pytest.raises(SystemExit) as end:
        main(["convert", "pictures/captions.jsonl", "out", "images=pictures", "processes=1"])
    assert end.value.code == 0
