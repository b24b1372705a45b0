"""How a study's page calls its settings, its figures and the files of its pictures."""

import re

from common.recipes import ROOT
from common.study_pages import METHODS, header, lines_of, report, tables, written

from composer_prior.studies.results import read_study_results


def test_labels_say_what_differs_and_what_is_no_default(tmp_path):
    axes = {**header()["study"]["axes"], "family": {"vit": {}, "patch": {}}, "start": {"warm": {}, "cold": {}}}
    grids = {
        "methods": {"method": ["ntp", "prior"], "seed": "all", "family": "all"},
        "start": {"method": ["ntp", "prior"], "seed": "all", "family": "all", "steps": ["10"], "start": ["cold"]},
        "default": {"method": ["ntp", "prior"], "seed": "all"},
    }
    study = header(axes=axes, grids=grids)
    markdown, _ = report(
        tmp_path,
        study,
        [line for line in lines_of(study) if (line["cell"]["family"], line["cell"]["start"]) != ("patch", "warm")],
    )
    assert "Unless stated otherwise, runs have: steps 40, family vit, start warm." in markdown
    assert re.findall("^#+ (.*)$", markdown, re.MULTILINE)[1:-2] == [
        "Grid methods", "vit", "Grid start", "vit", "patch", "Grid default",
    ]  # fmt: skip
    assert "No run is finished of: patch." in markdown
    assert "All runs of this grid have: steps 10, start cold." in markdown
    rows = [cells[0] for cells in tables(markdown)[-1][2:]]
    assert rows == [
        f"{where}{m}" for where in ("", "steps 10, cold · ", "steps 10, patch, cold · ") for m in ("ntp", "prior")
    ]
    assert "10 planned runs not finished; 2 rows without any finished run left out." in markdown
    assert "![steps 10, patch, cold: validation/loss (lower is better), mean over" in markdown
    names = {path.name for path in (tmp_path / "study_figures").iterdir()}
    assert {"methods_vit_loss.svg", "start_steps_10_patch_cold_improvement.svg", "default_loss_other.svg"} < names
    assert all(" steps 40" not in line for line in markdown.splitlines() if "Unless stated" not in line)


def test_a_word_that_does_not_say_of_what_it_is_stands_with_its_axis(tmp_path):
    axes = {**header()["study"]["axes"], "a": {"x": {}, "off": {}}, "b": {"y": {}, "x": {}}}
    study = read_study_results(written(tmp_path, header(axes=axes, grids=METHODS), []))
    assert study.said({"steps": "10", "a": "off", "b": "x"}) == "steps 10, a off, b x"
    assert study.said({"steps": "40", "a": "x", "b": "y"}) == ""
    assert study.words({"a": "x", "b": "y"}) == "a x, y"


def test_figures_of_one_name_keep_their_benchmark(tmp_path):
    study = read_study_results(written(tmp_path, header(fits={"other/loss": "lower"}), []))
    assert [study.short(name) for name in ("validation/loss", "other/loss", "foils/total")] == [
        "validation/loss", "other/loss", "total",
    ]  # fmt: skip


def test_results_of_earlier_versions_have_the_names_of_today(tmp_path):
    """``image_gain`` was called ``without_prior``, in studies, results and metrics."""
    old = {"averaged": {"foils/without_prior": "higher"}}

    def renamed(cell, records):
        return {**records, "foils": {"without_prior": 0.5, "without_prior_shuffled/count": 0.25}}

    study = header(figures=old, curve="foils/without_prior", fits={"foils/without_prior": "lower"}, grids=METHODS)
    found = read_study_results(written(tmp_path, study, lines_of(study, renamed)))
    assert found.named == ["foils/image_gain"]
    assert found.runs["ntp", "1", "40"].figures["foils/image_gain"] == 0.5
    assert found.runs["ntp", "1", "40"].figures["foils/image_gain_shuffled/count"] == 0.25
    shipped = read_study_results(ROOT / "docs/evidence/results.jsonl")
    assert "scene_foils/image_gain" in shipped.averaged
    assert all("scene_foils/image_gain" in run.figures for run in shipped.runs.values())


def test_pictures_of_an_earlier_page_are_removed_and_others_stay(tmp_path):
    report(tmp_path)
    folder = tmp_path / "study_figures"
    before = {path.name for path in folder.iterdir()}
    (folder / "mine.svg").touch()
    (tmp_path / "mine.svg").touch()
    with (tmp_path / "study.md").open("a") as page:
        page.write("![no](study_figures/../mine.svg)\n")
    report(tmp_path, header(grids=METHODS))
    left = {path.name for path in folder.iterdir()}
    assert left == {name for name in before if name.startswith("methods")} | {"mine.svg"}
    assert len(left) < len(before)
    assert (tmp_path / "mine.svg").exists()
