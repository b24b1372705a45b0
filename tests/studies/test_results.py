"""``results.jsonl``: what is collected from a run, what is kept, what is refused."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from common.studies import study_content, write_study

from composer_prior.studies import results
from composer_prior.studies.results import (
    append_results,
    begin_results,
    collect,
    count_samples,
    finished,
    planned_steps,
    read_lines,
    read_results,
    versions,
)
from composer_prior.studies.study import read_study

CELL = {"method": "prior", "steps": "4", "seed": "1"}
RECORDS = [
    {"batch": 0, "time/sample": 0, "loss/train/total": 3.0, "metrics/train/loss": 3.0},
    {
        "batch": 2,
        "eval/scene_foils/total/class": 0.25,
        "metrics/eval/loss": 2.0,
        "compute/flops": 10,
        "time/sample": 16,
    },
    {"batch": 4, "eval/scene_foils/total/class": 0.5, "metrics/eval/loss": 1.0, "metrics/eval/accuracy": None},
    {"batch": 4, "compute/flops": 20, "time/token": 300, "time/sample": 32, "time/total": 0.5},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def study():
    return read_study(write_study("study.yaml"))


def run_folder(folder, *records):
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def lines_of(study, name, records=RECORDS, seconds=60.0, **further):
    cell = next(cell for cell in study.cells if cell.name == name)
    return collect(cell.values, records, cell.load(further), seconds)


def test_figures_are_last_values_and_curves_all_of_them(study):
    scenes, validation, training = lines_of(study, "prior-seed1")
    assert [line["cell"] for line in (scenes, validation, training)] == [CELL] * 3
    assert scenes["benchmark"] == "scene_foils"
    assert scenes["figures"] == {"total/class": 0.5}
    assert scenes["curve"] == {"batch": [2, 4], "total/class": [0.25, 0.5]}
    assert validation["benchmark"] == "validation"
    assert validation["figures"] == {"loss": 1.0, "accuracy": None}
    assert validation["curve"] == {"batch": [2, 4], "loss": [2.0, 1.0], "accuracy": [None, None]}
    assert training["benchmark"] == "training"
    assert training["figures"] == {
        "steps": 4,
        "samples": 32,
        "unique_samples": None,
        "tokens": 300,
        "flops": 20,
        "reference_flops": None,
        "scoring_flops": None,
        "seconds": 60.0,
    }
    assert {"composer_prior", "torch", "mosaicml", "transformers"} <= set(training["versions"])
    with pytest.raises(ValueError, match="it has left no metrics"):
        lines_of(study, "prior-seed1", [])


def test_a_figure_that_is_undefined_at_the_end_has_no_earlier_value(study):
    records = [{"batch": 2, "eval/captioning/cider_d": 0.7, "eval/captioning/bleu_4": 0.1}]
    records += [{"batch": 4, "eval/captioning/bleu_4": 0.2}]
    captioning = lines_of(study, "prior-seed1", records)[0]
    assert captioning["figures"] == {"cider_d": None, "bleu_4": 0.2}
    assert captioning["curve"] == {"batch": [2, 4], "cider_d": [0.7, None], "bleu_4": [0.1, 0.2]}


def test_what_the_reference_cost_is_said_apart(study):
    run_folder("reference", {"batch": 4, "time/sample": 50, "compute/flops": 3000})
    data = Path("data/train")
    data.mkdir(parents=True)
    (data / "index.json").write_text(json.dumps({"shards": [{"samples": 40}, {"samples": 24}]}))
    shared = {"data.out": "data", "reference.run_folder": "reference"}
    costs = ("unique_samples", "flops", "reference_flops", "scoring_flops")

    def figures(name, **further):
        records = [*RECORDS, {"batch": 4, "compute/flops": 2000}]
        training = lines_of(study, name, records, **{**shared, **further})[-1]["figures"]
        return tuple(training[one] for one in costs)

    assert figures("prior-seed1") == (64, 2000, 3000, pytest.approx(3000 / 50 * 64 / 3))  # stored: each sample once
    live = {"train_loader.dataset.scores": None}
    passes = 3000 / 50 * 32 / 3  # live: as it trains, and counted with it
    assert figures("prior-seed1", **live) == (64, pytest.approx(2000 - passes), 3000, pytest.approx(passes))
    rho1 = {**live, "algorithms.prior": None, "algorithms.rho1.reference": "reference/model"}
    assert figures("prior-seed1", **rho1) == figures("prior-seed1", **live)  # whichever method it is
    assert figures("ntp-seed1") == (64, 2000, 3000, 0)
    cell = study.cells[0]
    recipe = cell.load()
    recipe.reference = None
    training = collect(cell.values, RECORDS, recipe)[-1]["figures"]
    assert (training["reference_flops"], training["scoring_flops"]) == (0, 0)
    assert training["seconds"] == 1800  # what the run says: half an hour


def test_what_the_viewer_cost_is_said_apart(study):
    run_folder("viewer", {"batch": 4, "time/sample": 100, "compute/flops": 9000})
    recipe = study.cells[0].load()
    recipe.viewer = {"run_folder": "viewer"}
    records = [*RECORDS, {"batch": 4, "compute/flops": 2000}]
    costs = ("flops", "viewer_flops", "viewer_scoring_flops")

    def figures(**dataset):
        recipe.train_loader["dataset"] |= dataset
        training = collect(study.cells[0].values, records, recipe)[-1]["figures"]
        return tuple(training[one] for one in costs)

    assert figures(viewer_scores=None) == (2000, 9000, 0)
    recipe.algorithms["image_gain"] = {"viewer": "viewer/model"}
    passes = 9000 / 100 * 32 / 3
    assert figures(viewer_scores=None) == (pytest.approx(2000 - passes), 9000, pytest.approx(passes))
    recipe.viewer = None
    assert "viewer_flops" not in collect(study.cells[0].values, records, recipe)[-1]["figures"]


def test_results_are_read_back(study):
    file = Path("out/results.jsonl")
    assert read_results(file) == (None, [])
    assert begin_results(file, study.header) == []
    ntp, prior = lines_of(study, "ntp-seed1"), lines_of(study, "prior-seed1")
    append_results(file, ntp)
    append_results(file, prior[:-1])  # a cell without its last line has not finished
    header, lines = read_results(file)
    assert header == study.header
    assert lines == [*ntp, *prior[:-1]]
    assert finished(lines, study.cells[0].values)["validation"] == {"loss": 1.0, "accuracy": None}
    assert finished(lines, CELL) is None
    with file.open("a") as opened:
        opened.write('{"cell": {"met')
    assert read_results(file)[1] == lines
    assert begin_results(file, study.header) == ntp  # what a killed writer left of a cell is taken away
    assert read_results(file)[1] == ntp
    append_results(file, prior)
    assert begin_results(file, study.header) == [*ntp, *prior]


def test_a_study_may_grow_and_not_change(study):
    file = Path("results.jsonl")
    begin_results(file, study.header)
    append_results(file, lines_of(study, "ntp-seed1"))
    axes = {**study_content()["axes"], "lr": {"low": {}, "high": {"optimizer.lr": 0.1}}}
    grown = read_study(write_study("study.yaml", axes=axes))
    lines = begin_results(file, grown.header)
    assert lines[0]["cell"] == {"method": "ntp", "steps": "4", "seed": "1", "lr": "low"}
    assert read_results(file) == (grown.header, lines)
    assert finished(lines, grown.cells[0].values)
    before = file.read_bytes()
    other = read_study("study.yaml", {"max_duration": "9ba"})
    with pytest.raises(
        ValueError, match=r"made by another study \(overrides.max_duration: 4ba there, 9ba here\). Give"
    ):
        begin_results(file, other.header)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["[1]\n", '{"a": 1}\n', "text\n"])
def test_a_file_of_something_else_is_refused(content):
    Path("results.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: .* does not hold the results of a study"):
        read_results(Path("results.jsonl"))


def test_a_folder_is_not_taken_for_missing_results():
    with pytest.raises(IsADirectoryError):
        read_results(Path())


def test_a_bad_line_is_refused_with_its_number(study):
    file = Path("results.jsonl")
    begin_results(file, study.header)
    with file.open("a") as opened:
        opened.write('{"cell": \n')
    for read in (read_results, read_lines, lambda file: begin_results(file, study.header)):
        with pytest.raises(ValueError, match=r"^results\.jsonl, line 2: Expecting value"):
            read(file)


def test_metrics_files_may_end_in_half_a_line():
    Path("metrics.jsonl").write_text('{"batch": 1}\n{"bat')
    assert read_lines(Path("metrics.jsonl")) == [{"batch": 1}]
    assert read_lines(Path("nowhere.jsonl")) == []
    Path("bad.jsonl").write_text('{"batch": 1}\n{"batch": 2{"batch": 3}\n')
    with pytest.raises(ValueError, match=r"^bad\.jsonl, line 2: "):
        read_lines(Path("bad.jsonl"))


def test_samples_and_steps_are_counted_where_they_can_be_known(study):
    assert count_samples({"remote": "s3://bucket/x"}) is None
    assert count_samples({"local": "nowhere"}) is None
    cell = study.cells[0]

    def steps(**changes):
        return planned_steps(cell.load(changes))

    assert steps() == 4
    assert steps(max_duration="20sp") == 3
    assert steps(max_duration="2ep") == 16  # of 64 samples, 8 in a batch
    assert steps(max_duration="2ep", **{"data.train_samples": 63}) == 14
    assert steps(max_duration="2ep", **{"data.train_samples": 63, "train_loader.drop_last": False}) == 16
    assert steps(max_duration="2ep", **{"data.train_samples": 63, "train_loader.dataset.epoch_size": 80}) == 20
    assert steps(max_duration="1000tok") is None


def test_versions_name_the_commit_and_leave_out_packages_without_metadata(monkeypatch):
    found = versions()
    assert found["torch"].startswith("2.")
    assert all(isinstance(value, str) for value in found.values())

    def version(name):
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(results, "version", version)
    assert versions() == {
        name: "1" if name in results.PACKAGES else of for name, of in found.items() if name != "torch"
    }
