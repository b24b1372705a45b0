"""FSDP2 by block, with weights that the first rank alone reads; what the ranks have of it."""

import json

import pytest
import torch
from common.models import small_lm, small_lvlm
from common.recipes import ROOT, fork_ranks
from common.tokenizers import plain_tokenizer

from composer_prior import ComposerLVLM, ReferenceLM
from composer_prior.models.sharding import check_checkpointing

PROGRAMS = ROOT / "tests/common/programs"
BLOCKS = ["model.model.language_model.layers.0", "model.model.language_model.layers.1"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What ``shards.py`` found on either rank; rotary frequencies of the kind that is kept beside the buffers."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = plain_tokenizer("smollm2", ["two red hammers on grey paper"] * 3)
    lm = small_lm(tokenizer, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, vocab_size=len(tokenizer) + 5)
    lm.bfloat16().save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    fork_ranks(folder, PROGRAMS / "shards.py", folder / "lm", folder)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_first_rank_alone_reads_weights(ranks):
    first, second = (rank["model"] for rank in ranks[1])
    assert (first["on_meta"], second["on_meta"]) == ({False}, {True})
    assert not second["before"]
    assert {value.dtype for value in first["before"].values()} == {torch.float32}  # of files in bfloat16
    assert list(first["after"]) == list(first["before"])
    for name, value in first["before"].items():
        assert torch.equal(first["after"][name], value), name


def test_the_other_rank_has_all_that_is_no_weight(ranks):
    """The original frequencies are attributes in transformers 4, and buffers in 5."""
    first, second = ({**rank["model"]["buffers"], **rank["model"]["attributes"]} for rank in ranks[1])
    assert all(any(name.endswith(example) for name in first) for example in (".inv_freq", ".original_inv_freq"))
    assert list(first) == list(second)
    for name, value in first.items():
        assert not second[name].is_meta
        assert torch.equal(second[name], value), name


def test_each_block_is_a_unit(ranks):
    for rank in ranks[1]:
        model = rank["model"]
        tower = [f"model.model.vision_tower.encoder.transformer.resblocks.{number}" for number in range(3)]
        assert model["checkpointed"] == [*tower, *BLOCKS]
        assert model["units"] == ["model", *(f"{name}._checkpoint_wrapped_module" for name in model["checkpointed"])]
        assert model["gathered_in_backward"] == [name for name in model["units"] if "vision" not in name]
        assert not any("vision" in name for name in model["trained"])
        assert any("language" in name for name in model["trained"])


def test_a_sharded_reference_scores_as_a_whole_one(ranks):
    folder, found = ranks
    whole = ReferenceLM.from_pretrained(str(folder / "lm"))
    ids = found[0]["reference"]["ids"]
    expected = whole.logprobs(ids, torch.ones_like(ids), ids)
    assert expected.abs().min() > 0
    for rank in found:
        torch.testing.assert_close(rank["reference"]["logprobs"], expected, atol=1e-6, rtol=1e-5)
        assert rank["reference"]["units"] == ["model.layers.0", "model.layers.1"]
    parts = [rank["reference"]["part"] for rank in found]
    assert sum(parts) == sum(p.numel() for p in whole.model.parameters())
    assert max(parts) < 0.6 * sum(parts)


@pytest.mark.parametrize("key", ["activation_checkpointing", "activation_cpu_offload"])
def test_checkpointing_that_matches_nothing_is_refused(tokenizer, monkeypatch, key):
    model = small_lvlm("patches", tokenizer)
    check_checkpointing({"fsdp2": {key: True}}, model)
    for part in (model.model, model.model.model, model.model.get_decoder()):
        monkeypatch.setattr(part, "_no_split_modules", [])
    model = ComposerLVLM(model.model, model.processor)
    check_checkpointing({"fsdp2": {key: False}}, model)
    check_checkpointing(None, model)
    with pytest.raises(ValueError, match=f"fsdp2.{key}=true matches no part of ComposerLVLM"):
        check_checkpointing({"fsdp2": {key: True}}, model)


def test_gradients_are_averages_whatever_gloo_makes_of_an_average(tmp_path):
    """Versions of torch differ in what their gloo returns when it is asked for an average."""
    fork_ranks(tmp_path, PROGRAMS / "averages.py", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"its own": 1.5, "adds_up": 1.5, "averages": 1.5}
