"""The documentation's reference pages name all commands and public names; its example trains on the tokens it says."""

import io
import re
import runpy

import pytest
from common.models import small_lm, small_lvlm
from common.recipes import ROOT
from PIL import Image

import composer_prior
from composer_prior.commands.cli import JOBS
from composer_prior.emoji_scenes.writing import make_sample


def test_every_command_shows_its_help():
    page = (ROOT / "docs/commands.md").read_text()
    assert re.findall(r"command-output} composer-prior (\w+) --help", page) == [*JOBS]
    assert re.findall(r"^## (\w+)$", page, flags=re.M) == [*JOBS]


def test_every_public_name_has_its_place():
    named = re.findall(r"`composer_prior\.(\w+) <([\w.]+)>`", (ROOT / "docs/python.rst").read_text())
    assert dict(named) == {name: f"{module}.{name}" for name, module in composer_prior._MODULES.items()}
    assert sorted(name for name, _ in named) == sorted(composer_prior.__all__)


def test_the_plain_loop_trains_on_captions(tokenizer, tmp_path):
    model = small_lvlm("patches", tokenizer).eval().image_text_model
    model.save_pretrained(tmp_path / "model")
    small_lm(tokenizer).save_pretrained(tmp_path / "reference")
    main = runpy.run_path(str(ROOT / "examples/plain_pytorch.py"))["main"]
    losses = main(str(tmp_path / "model"), str(tmp_path / "reference"), steps=2, batch_size=3)
    samples = [make_sample("train", number) for number in range(3)]
    images = [Image.open(io.BytesIO(sample["image"])) for sample in samples]
    known = model.logprobs(images, [[sample["caption"]] for sample in samples], end=True)
    values = [value for of_image in known for text in of_image for value in text.values]
    assert losses[0] == pytest.approx(-sum(values) / len(values), rel=1e-4)
    assert len(losses) == 2
