"""Runs on data that mix several streams: their figures, and settings of PRIOR by stream."""

import json
from pathlib import Path

import pytest
from common.data import write_tiles
from common.recipes import recipe

from composer_prior.studies.results import collect
from composer_prior.training.checkpoints.storage import find_weights
from composer_prior.training.run import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on scenes and tiles with stored scores, and the same with a live reference in microbatches."""
    folder = tmp_path_factory.mktemp("mixtures")
    tiles = {part: write_tiles(folder / "tiles" / part, count) for part, count in (("train", 32), ("validation", 8))}
    overrides = ["algorithms.prior.streams={tiles: {alpha: 0.5, floor: 0.1}, scenes: null}", "eval_interval=2ba"]
    for prefix in ("", "reference."):
        for part, loader in (("train", "train"), ("validation", "eval")):
            of_scenes = f"${{data.out}}/{part}"
            streams = f"{{scenes: {{local: {of_scenes!r}}}, tiles: {{local: {str(tiles[part])!r}}}}}"
            dataset = f"{prefix}{loader}_loader.dataset"
            overrides += [f"{dataset}.local=null", f"{dataset}.streams={streams}"]
    dependence = "{benchmark: image_dependence, data: '${eval_loader.dataset.streams.tiles.local}', limit: 2}"
    alone = f"{{dataset: {{local: {tiles['validation']!r}, max_caption_tokens: 128}}}}"
    overrides += [f"eval_loaders={{alone: {alone}}}", "device_eval_batch_size=3"]
    overrides += [f"benchmarks.dependence_of_tiles={dependence}", "callbacks.speed_monitor=null"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(recipe("prior_vit", "run_name=stored", *overrides))
        live = ["train_loader.dataset.scores=null", "device_train_microbatch_size=3", "sample_captions=0"]
        train(recipe("prior_vit", "run_name=live", *overrides, *live))
    return {
        name: [json.loads(line) for line in open(folder / f"runs/{name}/metrics.jsonl")] for name in ("stored", "live")
    }, folder


def test_a_live_reference_in_microbatches_gives_the_figures_of_stored_scores(runs):
    (stored, live), names = runs[0].values(), ("loss/", "prior/", "metrics/")
    for ours, theirs in zip(stored, live, strict=True):
        mine = {name: value for name, value in ours.items() if name.startswith(names)}
        assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=1e-4, abs=1e-6)
    last = stored[3]
    for name in ("scenes", "tiles"):
        assert last[f"prior/{name}/loss_unweighted"] == pytest.approx(last[f"loss/train/{name}"], rel=1e-6)
    assert last["prior/scenes/effective_sample_size"] == 1.0
    assert last["prior/scenes/loss_weighted"] == last["prior/scenes/loss_unweighted"]
    assert last["prior/tiles/effective_sample_size"] < 1.0


def test_streams_add_up_to_the_whole(runs):
    for record in runs[0]["stored"]:
        for part in ("train", "eval"):
            if f"metrics/{part}/loss" not in record:
                continue
            shares = [record[f"metrics/{part}/{name}/share"] for name in ("scenes", "tiles")]
            assert sum(shares) == pytest.approx(1)
            if part == "eval":
                tokens = [record[f"metrics/eval/{name}/tokens"] for name in ("scenes", "tiles")]
                losses = [record[f"metrics/eval/{name}/loss"] for name in ("scenes", "tiles")]
                mean = sum(n * one for n, one in zip(tokens, losses, strict=True)) / sum(tokens)
                assert mean == pytest.approx(record["metrics/eval/loss"], rel=1e-5)
                assert shares == pytest.approx([16 / 24, 8 / 24])


def test_a_stream_with_a_loader_of_its_own_has_the_figures_that_it_has_in_the_mixture(runs):
    """Uneven batches hold other samples there."""
    last = runs[0]["stored"][-1]
    for name in ("loss", "accuracy"):
        assert last[f"metrics/eval/alone/{name}"] == pytest.approx(last[f"metrics/eval/tiles/{name}"], rel=1e-5)
    assert last["metrics/eval/alone/loss"] != pytest.approx(last["metrics/eval/loss"], rel=1e-4)
    page = Path(runs[1], "runs/stored/report.html").read_text()
    assert all(f">stored, {name}</th>" in page for name in ("scenes", "tiles", "alone"))


def test_the_page_and_studies_have_the_streams(runs):
    records, folder = runs
    page = Path(folder, "runs/stored/report.html").read_text()
    for title in ("Loss by stream", "Loss weighted by PRIOR, by stream", "Share of the samples by stream"):
        assert page.count(f">{title}<") == 1
    last = records["stored"][-1]
    values = "".join(f"<td>{last[f'metrics/eval/tiles/{name}']:.4f}</td>" for name in ("loss", "accuracy"))
    assert f">stored, tiles</th>{values}" in page
    assert last["eval/dependence_of_tiles/dependence"] is not None
    study = {line["benchmark"]: line["figures"] for line in collect({}, records["stored"], recipe("prior_vit"))}
    assert study["validation"]["tiles/loss"] == last["metrics/eval/tiles/loss"]
    assert "dependence" in study["dependence_of_tiles"]


def of_streams(record):
    return {name: value for name, value in record.items() if {"few", "many"} & {*name.split("/")}}


def test_streams_that_repeat_are_resumed_in_their_second_epoch(tiles, tmp_path, monkeypatch):
    """With other proportions the run is no resumed one, but a stage of its own from its weights."""
    monkeypatch.chdir(tmp_path)
    few, many = (write_tiles(tmp_path / name, count) for name, count in (("few", 6), ("many", 12)))

    def run(name, of_few, of_many, *overrides):
        streams = f"{{few: {{local: {few!r}, {of_few}}}, many: {{local: {many!r}, {of_many}}}}}"
        data = ["train_loader.dataset.local=null", f"train_loader.dataset.streams={streams}"]
        train(recipe("ntp_vit", *tiles, *data, f"run_name={name}", *overrides))
        return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").open()]

    mixture = "choose: 12", "repeat: 1"
    whole = run("whole", *mixture, "max_duration=2ep")
    few_of_epochs = [sum(8 * record["metrics/train/few/share"] for record in whole[at : at + 3]) for at in (0, 3)]
    assert few_of_epochs == [12, 12]
    resumed = run("resumed", *mixture, "max_duration=2ep", "load_path=runs/whole/checkpoints/ep1-ba4-rank0.pt")
    assert [record["batch"] for record in resumed if of_streams(record)] == [4, 5]
    assert [of_streams(record) for record in resumed] == [of_streams(record) for record in whole[4:]]
    with pytest.raises(ValueError, match=r"samples_per_epoch.few differ \(.*: 12 there, 11 here\)"):
        run(
            "resumed",
            "choose: 11",
            "repeat: 1",
            "max_duration=2ep",
            "load_path=runs/whole/checkpoints/ep1-ba4-rank0.pt",
        )
    words = [*tiles, "train_loader.dataset.local=null", "max_duration=2ba"]
    words += [f"train_loader.dataset.streams={{many: {{local: {many!r}, choose: 10}}}}"]
    train(recipe("ntp_vit", *words, "run_name=alone"))
    fewer = ["train_loader.dataset.streams.many.choose=9", f"load_path={find_weights('runs/alone/checkpoints')}"]
    with pytest.raises(ValueError, match=r"samples_per_epoch differ \(.*: 10 there, 9 here\)"):
        train(recipe("ntp_vit", *words, *fewer, "run_name=fewer"))
    later = run("later", "proportion: 0.25", "proportion: 0.75", "init_from=runs/whole", "max_duration=1ep")
    assert sum(record["metrics/train/few/share"] for record in later[:2]) / 2 == pytest.approx(0.25, abs=0.1)
