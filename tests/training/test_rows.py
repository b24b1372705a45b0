"""Runs on packed rows: with stored and live scores, resumed in the middle of an epoch, on one rank and on two."""

import json
from pathlib import Path

import pytest
from common.chats import TEMPLATES, turns, write_chats
from common.data import tile, write_tiles
from common.recipes import NO_REPORT, ROOT, SHRUNKEN, VIT, fork_ranks, recipe

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.rows import RowsCollator
from composer_prior.training.run import train

ROWS = ["train_loader.dataset.packing_ratio=2", "train_loader.dataset.max_tokens=160", "model.pack=true"]
ROWS += ["global_train_batch_size=4", "train_loader.num_workers=2", "max_duration=2ep", *NO_REPORT]


def records(name):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").open()]


def figures(record):
    """Return the logged metrics of a run, without times and speeds."""
    names = ("loss/", "metrics/", "prior/", "time/batch", "time/sample", "time/token")
    return {name: value for name, value in record.items() if name.startswith(names)}


def test_a_run_on_rows_is_resumed_bitwise(tmp_path, monkeypatch):
    """In its second epoch, also by microbatches, and with a live reference."""
    monkeypatch.chdir(tmp_path)
    train(recipe("prior_vit", *ROWS, "run_name=whole", "save_interval=2ba", "save_num_checkpoints_to_keep=-1"))
    whole = records("whole")
    assert whole[-1]["batch"] == 2 * 64 // (4 * 2)
    # Rows are what Composer counts as samples.
    assert [record["time/sample"] for record in whole] == [4 * record["batch"] for record in whole]
    assert all(record["loss/train/total"] != record["prior/loss_unweighted"] for record in whole[:16])
    train(recipe("prior_vit", *ROWS, "run_name=resumed", "load_path=runs/whole/checkpoints/ep1-ba10-rank0.pt"))
    assert [*map(figures, records("resumed"))] == [*map(figures, whole[10:])]
    train(recipe("prior_vit", *ROWS, "run_name=next", "load_path=runs/whole/checkpoints/ep0-ba8-rank0.pt"))
    assert [*map(figures, records("next"))] == [*map(figures, whole[8:])]
    live = ["run_name=live", "train_loader.dataset.scores=null", "device_train_microbatch_size=1"]
    train(recipe("prior_vit", *ROWS, *live))
    for ours, theirs in zip(records("live")[:16], whole[:16], strict=True):
        for name in ("loss/train/total", "prior/reference_nll", "prior/effective_sample_size"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    words = ["load_path=runs/whole/checkpoints/ep1-ba10-rank0.pt", "train_loader.num_workers=1"]
    with pytest.raises(ValueError, match="on 1 nodes with 2 workers and 4 rows each, and would go on packed by 1"):
        train(recipe("prior_vit", *ROWS, "run_name=other", *words))
    with pytest.raises(ValueError, match=r"packing_ratio differ \(packing_ratio: 2 there, 3 here\)"):
        train(recipe("prior_vit", *ROWS, "run_name=other", words[0], "train_loader.dataset.packing_ratio=3"))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["null", "{fsdp2: {}}"])
def test_two_ranks_on_rows_are_resumed_bitwise(sharding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SHRUNKEN, *VIT, *ROWS, f"parallelism_config={sharding}"]
    program = [ROOT / "train.py", ROOT / "yamls/prior_vit.yaml", *words]
    fork_ranks(tmp_path, *program, "run_name=whole", "save_interval=5ba", "save_num_checkpoints_to_keep=-1")
    saved = "ep1-ba10" + "-rank0.pt" * (sharding == "null")
    fork_ranks(tmp_path, *program, "run_name=resumed", f"load_path=runs/whole/checkpoints/{saved}")
    whole, resumed = records("whole"), records("resumed")
    assert whole[-1]["batch"] == 16
    assert [record["time/sample"] for record in whole] == [4 * record["batch"] for record in whole]
    assert [*map(figures, resumed)] == [*map(figures, whole[10:])]


def test_what_cannot_be_packed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["model.pack=false"], r"^train_loader.dataset.packing_ratio needs model.pack=true; without it the model pads"),
        (
            ["train_loader.dataset.packing_ratio=some"],
            r"^train_loader.dataset.packing_ratio='some': expected Union",
        ),
        (["eval_loader.dataset.packing_ratio=2"], r"^eval_loader.dataset.packing_ratio: rows are for training alone"),
        (["train_loader.dataset.max_tokens=40"], r"^A packed row has 40 tokens, and a caption with its image may take"),
        (
            ["train_loader.dataset.packing_ratio=40"],
            r"gets 64, fewer than the 320 of its first batches, one of each worker; lower \S+size or train_loader",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe("ntp_vit", *ROWS, *words))
    assert not Path("runs").exists() or not [*Path("runs").rglob("metrics.jsonl")]
    foreign = recipe("ntp_vit", *ROWS)
    foreign.model, foreign.tokenizer = {"name": "hugging_face", "pretrained": "Qwen/Qwen2-VL-2B"}, {"name": "Qwen"}
    with pytest.raises(ValueError, match=r"packing_ratio: model.name=hugging_face has no pack, it pads each sample"):
        train(foreign)


@pytest.mark.slow
def test_rows_mix_streams_whose_figures_are_of_samples(tmp_path, monkeypatch):
    """Captions and conversations in one row, weighted with stored scores."""
    monkeypatch.chdir(tmp_path)
    tiles = write_tiles(tmp_path / "tiles", 40)
    chats = [(turns("<image>What?", f"Shade {n}. " * (1 + n % 5)), [tile(n)]) for n in range(40)]
    folders = {"tiles": tiles, "chat": write_chats(tmp_path / "chat", chats)}
    Path("chat.jinja").write_text(TEMPLATES["vicuna"].replace("eos_token", "'<eos>'"))
    words = ["train=chat", "validation=chat", "tokenizer.chat_template=chat.jinja", *ROWS, "max_duration=3ba"]
    for prefix in ("", "reference."):
        streams = ", ".join(f"{name}: {{local: {folder!r}}}" for name, folder in folders.items())
        words += [f"{prefix}train_loader.dataset.local=null", f"{prefix}train_loader.dataset.streams={{{streams}}}"]
        words += [f"{prefix}eval_loader.dataset.max_tokens=160", f"{prefix}train_loader.dataset.max_tokens=160"]
    words += ["algorithms.prior.streams={tiles: null, chat: {floor: 0.5}}", "train_loader.num_workers=0"]
    made = recipe("prior_vit", *words, "run_name=mixed")
    seen = []
    with monkeypatch.context() as patch:
        collate = RowsCollator.__call__
        patch.setattr(RowsCollator, "__call__", lambda self, rows: seen.append(collate(self, rows)) or dict(seen[-1]))
        train(made)
    found = records("mixed")[:3]
    assert any(len({*batch["stream"][batch["row"] == 0].tolist()}) == 2 for batch in seen)
    tokens = dict.fromkeys(folders, 0)
    for batch, record in zip(seen, found, strict=True):
        labelled = batch["labels"] != IGNORE_INDEX
        for number, name in enumerate(folders):
            mine = batch["stream"] == number
            tokens[name] += int(labelled[mine].sum())
            assert record[f"metrics/train/{name}/share"] == pytest.approx(float(mine.float().mean()))
            assert record[f"metrics/train/{name}/tokens"] == tokens[name]
        nll = -batch["ref_logprobs"][mine][labelled[mine]].double().mean()
        assert record["prior/chat/reference_nll"] == pytest.approx(float(nll), rel=1e-5)
        assert record["prior/chat/effective_sample_size"] < 1.0
