"""Files that were cut, and sizes that cannot be meant: one line, before anything expensive."""

import re
from pathlib import Path

import pytest
from common.models import small_lm
from common.recipes import recipe
from transformers import AutoModelForCausalLM

from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.models.reference import ReferenceLM
from composer_prior.training.checkpoints.loading import read_weights
from composer_prior.training.keys import check_keys
from composer_prior.training.run import train


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_cut_weights_are_one_line(size, tokenizer, tmp_path):
    folder = tmp_path / "model"
    small_lm(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    for read in (
        lambda: ReferenceLM.from_pretrained(str(folder)),
        lambda: read_weights(folder),
        lambda: load_pretrained(AutoModelForCausalLM, folder),
    ):
        with pytest.raises(ModelFolderError, match=rf"{re.escape(str(folder))}.*damaged or cut") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [-1, 0, 260, 10**12, "many", None])
def test_a_vocabulary_of_no_possible_size_is_refused(size):
    wrong = recipe("reference")
    wrong.tokenizer["train"] = {"vocab_size": size}
    message = rf"^tokenizer\.train\.vocab_size={size!r}: expected 261 to 1,000,000 tokens\.$"
    with pytest.raises(ValueError, match=message):
        check_keys(wrong)


def test_a_data_set_that_no_disk_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train_samples must be at most 100000000, got 1000000000000"):
        train(recipe("reference", "data.train_samples=1000000000000"))
    assert not Path("data").exists()
