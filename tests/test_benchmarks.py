"""That benchmarks measure what they say: their batches go through their models, and either trainer takes them."""

import functools
import sys
from importlib.metadata import version

import pytest
import torch
from common.recipes import ROOT


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import setup

    yield setup
    for name in [name for name in sys.modules if name.startswith("benchmarks")]:
        del sys.modules[name]


def test_the_losses_of_both_models_agree(setup):
    (batch,) = setup.training_batches(1, batch_size=2, vocabulary=2000)
    ours = setup.build_ours(2000)
    theirs = setup.build_llava(ours)
    with torch.no_grad():
        loss = float(ours.loss(ours(batch), batch))
        keys = ("input_ids", "attention_mask", "labels", "pixel_values")
        assert float(theirs(**{key: batch[key] for key in keys}).loss) == pytest.approx(loss, abs=1e-4)
    assert 7 < loss < 9  # of untrained weights: about the logarithm of 2,000


def test_the_losses_of_a_smolvlm_and_its_wrapper_agree(setup):
    (batch,) = setup.training_batches(1, batch_size=2, vocabulary=2000)
    batch["pixel_values"] = batch["pixel_values"][:, None]
    model = setup.build_smolvlm(2000)
    ours = setup.wrap(model)
    with torch.no_grad():
        loss = float(ours.loss(ours(batch), batch))
        keys = ("input_ids", "attention_mask", "labels", "pixel_values")
        assert float(model(**{key: batch[key] for key in keys}).loss) == pytest.approx(loss, abs=1e-5)


def test_the_operations_of_a_tower_are_those_of_its_layers(setup):
    from benchmarks import flops

    (batch,) = setup.training_batches(1, batch_size=2, vocabulary=2000)
    ours = setup.build_ours(2000)
    lvlm = ours.model
    encoder, patches = lvlm.model.vision_tower.encoder, lvlm.config.vision["image_tokens"]
    blocks = encoder.transformer.resblocks
    linear = 2 * sum(p.numel() for p in blocks.parameters() if p.ndim == 2) * (patches + 1)
    attention = 4 * encoder.conv1.out_channels * len(blocks) * (patches + 1) ** 2
    tower = 2 * (linear + attention + 2 * encoder.conv1.weight.numel() * patches)
    weights = sum(p.numel() for p in lvlm.model.multi_modal_projector.parameters() if p.ndim == 2)
    assert flops.image_forward(lvlm, {"pixel_values": batch["pixel_values"]}) == (tower, 2 * 2 * weights * patches)
    assert flops.training_parts(ours, batch)["tower and projector"] == 3 * (tower + 4 * weights * patches)


def test_the_image_tokens_of_the_front_ends(setup, monkeypatch):
    from benchmarks import items

    monkeypatch.setattr(setup, "build_lm", functools.partial(setup.build_lm, layers=1))
    found = {}
    for name in setup.FRONT_ENDS:
        step, found[name] = items.front_end_step(name, samples=1)
        assert name == "tiles, 4 at most" or 10 < step() < 12  # of untrained weights: about the logarithm of 49,152
    # 2 x 2 squares, the whole image and the separators; 14 rows of 18 patches and theirs.
    assert [*found.values()] == [576, 144, 36, 5 * 576 + 6, 5 * 144 + 6, 14 * (18 + 1)]


@pytest.mark.skipif(version("transformers") >= "5", reason="the page has the figures of constraints.txt")
@pytest.mark.usefixtures("outside_of_a_run")
def test_the_tables_of_the_page_on_clusters_have_what_their_command_prints(setup, capsys, monkeypatch):
    from benchmarks import cluster

    monkeypatch.setattr(sys, "argv", ["cluster", "only=1B, 4 nodes"])
    monkeypatch.setattr(cluster, "prepare_process", lambda threads: None)  # it silences the logs of all tests
    cluster.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    page = (ROOT / "docs/cluster.md").read_text().split("\n\n")
    assert len(tables) == 2
    for lines in (table.splitlines() for table in tables):
        (on_page,) = (part.splitlines() for part in page if part.startswith(lines[0]))
        assert set(lines) < set(on_page)


def test_a_folder_without_nanovlm_is_refused_before_anything_is_measured(setup, capsys, monkeypatch, tmp_path):
    from benchmarks import step

    monkeypatch.setattr(sys, "argv", ["step", "7", "--nanovlm", str(tmp_path)])
    monkeypatch.setattr(step, "prepare_process", lambda threads: pytest.fail("it goes on"))
    with pytest.raises(SystemExit, match="2"):
        step.main()
    assert f"--nanovlm {tmp_path} is no checkout of huggingface/nanoVLM" in capsys.readouterr().err
