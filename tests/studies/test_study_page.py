"""A study's page says what its results file holds, with intervals, and nothing beyond; whatever the names in it are."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
from common.pages import BROWSER, HOSTILE, browse
from common.study_pages import METHODS, SEEDS, STEPS, header, lines_of, report, row, tables, written

from composer_prior.studies.blocks import Paragraph
from composer_prior.studies.costs import equality, what_was_run
from composer_prior.studies.results import read_study_results
from composer_prior.studies.scaling_tables import size_axes
from composer_prior.studies.study import Run
from composer_prior.studies.study_page import write_report


class Elements(HTMLParser):
    """The elements of a page without what they say; every one that is opened is closed in order."""

    VOID = ("meta",)

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study with its report, whose writer was killed within a line."""
    folder = tmp_path_factory.mktemp("study")
    report(folder, end='{"cell": {"meth')
    return folder


@pytest.fixture(scope="module")
def page(folder) -> tuple[str, str]:
    return (folder / "study.md").read_text(encoding="utf-8"), (folder / "study.html").read_text(encoding="utf-8")


def test_differences_are_found_and_none_where_there_is_none(page):
    markdown, _ = page
    assert tables(markdown)[0][0] == ["figure", "prior", "noise"]
    assert row(markdown, 0, "foils/total")[1].endswith(" better")
    assert row(markdown, 0, "validation/loss (lower")[1].startswith("+")
    assert row(markdown, 0, "validation/loss (lower")[1].endswith(" better")
    assert row(markdown, 0, "validation/loss_other")[1].startswith("-")
    assert row(markdown, 0, "validation/loss_other")[1].endswith(" worse")
    assert row(markdown, 0, "captions/cider")[1].endswith(" no difference seen")
    for table in tables(markdown):
        for cells in table[2:]:
            for cell in cells:
                if match := re.search(r"% \[(.*), (.*)\]( (.*))?$", cell):
                    low, high = float(match[1]), float(match[2])
                    assert low <= high
                    if match[4] in ("better", "worse"):
                        assert low > 0 or high < 0
                    if low < 0 < high:
                        assert match[4] == "no difference seen"


def test_the_answer_comes_before_the_bookkeeping(page):
    """A sentence and the forest plot open the page; how it was measured and what was run follow all grids."""
    title, answer, forest, _ = page[0].split("\n\n", 3)
    prior, noise = (re.sub("(better|no difference seen)$", "", cell).strip() for cell in row(page[0], 0, "average")[1:])
    assert title == "# a study"
    assert answer == (
        "In grid methods, by the average of foils/total and captions/cider: "
        f"prior ({prior}) is better than ntp, noise ({noise}) is not seen to differ from ntp."
    )
    assert forest.endswith("(study_figures/methods_improvement.svg)")
    assert page[0].count("methods_improvement.svg") == 1
    for text in page:
        places = [
            text.index(words) for words in ("Relative improvement", "How it was measured", "What was run", "Versions: ")
        ]
        assert places == sorted(places)
        assert text.index("Grid compute") < places[1]


def test_tables_of_many_methods_fit_a_screen(tmp_path):
    methods = {"ntp": {}, **{f"m{number}": {} for number in range(7)}}
    study = header(axes={"method": methods, "seed": [1, 2, 3]}, grids=METHODS, fits={})
    markdown, _ = report(tmp_path, study, lines_of(study))
    compared = [table[0] for table in tables(markdown) if table[0][0] == "figure"]
    assert compared[:2] == [["figure", "m0", "m1", "m2", "m3"], ["figure", "m4", "m5", "m6"]]
    assert compared[2:] == [["figure", "ntp", "m0", "m1", "m2", "m3"], ["figure", "ntp", "m4", "m5", "m6"]]


def test_a_grid_may_have_a_baseline_of_its_own(tmp_path):
    """Its differences are those of a study with that baseline."""
    grids = {"own": {"method": ["noise", "prior"], "seed": "all", "baseline": "noise"}}
    own, _ = report(tmp_path, study := header(grids=grids, fits={}), lines_of(study))
    of_study = header(grids={"own": {"method": ["noise", "prior"], "seed": "all"}}, baseline="noise", fits={})
    same, _ = report(tmp_path, of_study, lines_of(study))
    assert tables(own)[:3] == tables(same)[:3]
    assert tables(own)[1][0] == ["figure", "noise", "prior"]
    assert "Methods of this grid are compared with noise." in own
    assert "Grid own, beside noise: Steps, samples and unique samples are equal within 0.5 %; prior used 1.31" in own
    assert "beside noise" not in same


def test_figures_are_those_of_the_file(page, tmp_path):
    markdown, _ = page
    lines = lines_of(header())

    def of(method, benchmark, figure):
        return [
            line["figures"][figure] for line in lines
            if line["benchmark"] == benchmark and line["cell"]["method"] == method and line["cell"]["steps"] == "40"
        ]  # fmt: skip

    ntp, prior = of("ntp", "validation", "loss"), of("prior", "validation", "loss")
    cells = row(markdown, 1, "validation/loss (lower")
    mean, sd = map(float, cells[1].split(" ± "))
    assert (mean, sd) == (pytest.approx(fmean(ntp), abs=0.001), pytest.approx(stdev(ntp), rel=0.05))
    assert float(cells[2].split()[0]) == pytest.approx(fmean(prior) - fmean(ntp), abs=0.0005)
    foils = fmean(of("prior", "foils", "total")) / fmean(of("ntp", "foils", "total")) - 1
    captions = fmean(of("prior", "captions", "cider")) / fmean(of("ntp", "captions", "cider")) - 1
    average = row(markdown, 0, "average of")
    assert float(average[1].split()[0]) == pytest.approx(100 * (foils + captions) / 2, abs=0.006)
    run = row(markdown, -1, "prior")
    assert run[1:] == ["5 of 5", "40", "320", "100", "", "5.24e+10", "2e+09", "0", "0.6 min"]
    assert (
        "Steps, samples and unique samples are equal within 0.5 %; prior used 1.31 times the FLOPs of ntp; " in markdown
    )
    assert "prior used 1.36 times the FLOPs of ntp when the reference and the scoring are counted." in markdown
    assert "45 of 45 runs are finished." in markdown
    assert "Versions: torch 2.7.0." in markdown


def test_steps_until_the_baselines_end(page):
    markdown, _ = page
    steps = next(table for table in tables(markdown) if table[0][0] == "method")
    assert [cells[0] for cells in steps[2:]] == ["ntp", "prior", "noise"]
    assert steps[2][1:] == ["100.0 % [100.0, 100.0]", "reached in all 5"]
    # ntp ends at 1 + 4 / sqrt(40) = 1.632; prior goes from 1.794 at 20 to 1.532 at 40, linear in between.
    expected = (20 + 20 * (1.7944 - 1.6325) / (1.7944 - 1.5325)) / 40
    assert float(steps[3][1].split()[0]) == pytest.approx(100 * expected, abs=0.5)
    assert re.fullmatch(r"not reached in [1-4] of 5", steps[4][2])


def test_scaling_is_shown_without_and_with_the_reference(page):
    markdown, html = page
    assert "Sizes are the values of steps; C is the FLOPs of the run" in markdown
    scaling = [table for table in tables(markdown) if table[0][:3] == ["method", "sizes", "seeds"]]
    assert len(scaling) == 2
    for table in scaling:
        assert table[2][:3] == ["ntp", "4", "5"]
        assert float(table[2][5].split()[0]) == pytest.approx(0.5, abs=0.05)
    assert scaling[0][2] == scaling[1][2], "the baseline has no reference"
    assert scaling[0][3] != scaling[1][3]
    apart = [table for table in tables(markdown) if table[0] == ["method", "a", "b", "c", "k"]]
    assert [cells[0] for cells in apart[0][2:]] == ["prior"]
    assert "L = a + b C^-c" in html


def test_sizes_without_a_common_seed_have_no_fit(tmp_path):
    def apart(cell, records):
        return records if (cell["seed"] in "12") == (cell["steps"] == "10") else {"training": records["training"]}

    markdown, _ = report(tmp_path, header(), lines_of(header(), apart))
    assert [table[2][:3] for table in tables(markdown) if table[0][:3] == ["method", "sizes", "seeds"]] == [
        ["ntp", "4", "0"]
    ] * 2


def test_sizes_are_numbers_and_what_else_differs_in_flops_is_a_setting(tmp_path):
    axes = {"method": {"ntp": {}, "prior": {}}, "seed": [1, 2, 3], "family": {"vit": {}, "patch": {}}, "steps": STEPS}
    grid = {"method": "all", "seed": "all", "family": "all", "steps": "all", "scaling": "flops"}

    def dearer(cell, records):
        records["training"]["flops"] *= 2 if cell["family"] == "patch" else 1
        return records

    study = header(axes=axes, grids={"compute": grid}, fits={"validation/loss": "lower", "foils/total": "higher"})
    results = read_study_results(written(tmp_path, study, lines_of(study, dearer)))
    assert size_axes(results, results.grids[0], lambda cell: cell.figures["training/flops"]) == ["steps"]
    assert size_axes(results, results.grids[0], lambda cell: cell.figures["training/unique_samples"]) == []
    named = header(axes={**axes, "steps": {"8": {}}}, grids={"compute": grid})
    results = read_study_results(written(tmp_path, named, lines_of(named, dearer)))
    assert size_axes(results, results.grids[0], lambda cell: cell.figures["training/flops"]) == ["family"]


def test_what_the_methods_used_is_compared_at_the_same_seeds():
    def cell(**figures):
        return Run({f"training/{name}": value for name, value in figures.items()})

    ntp = {"1": cell(steps=10, flops=100.0), "2": cell(steps=10, flops=300.0)}
    assert equality({"ntp": ntp, "a": {"2": cell(steps=10, flops=300.0)}}, "ntp") == (
        "Steps and FLOPs are equal within 0.5 %."
    )
    others = {"a": {"1": cell(steps=20, flops=150.0)}, "b": {"1": cell(steps=10, flops=150.0, scoring_flops=50.0)}}
    assert equality({"ntp": ntp, **others}, "ntp") == (
        "a used 2 times the steps of ntp; a and b used 1.5 times the FLOPs of ntp; a used 1.5 times the FLOPs of ntp "
        "when the reference and the scoring are counted; b used 2 times the FLOPs of ntp when the reference and the "
        "scoring are counted."
    )
    assert equality({"ntp": ntp, "a": {"1": cell(steps=None)}}, "ntp") == ""
    assert equality({"ntp": ntp}, "ntp") == ""


def test_a_sentence_of_equality_names_its_settings_unless_it_is_of_all_that_ran(tmp_path):
    def without(cell, records):
        if cell["steps"] == "80" and cell["method"] == "ntp":
            records.pop("training")
        if cell["steps"] in ("10", "20"):
            records.pop("training")
        return records

    study = header()
    blocks = what_was_run(read_study_results(written(tmp_path, study, lines_of(study, without))))
    (said,) = (block.text for block in blocks if isinstance(block, Paragraph) and "equal within" in block.text)
    assert said.startswith("At the defaults: Steps, samples")


def test_the_page_never_says_significant_and_says_how_it_measured(page):
    for text in (one.replace("\u00a0", " ") for one in page):
        assert "significant" not in text.lower()
        assert "Intervals are 95 % percentile bootstraps over seeds; with 5 seeds they are rough" in text
        assert "hold the true mean in about 84" in text


def test_both_pages_say_the_same(page):
    markdown, html = page
    parsed = " ".join("".join(Elements(html).texts).split())
    for line in markdown.splitlines():
        plain = re.sub(r"^#+ |^!\[|\]\(.*\.svg\)$", "", line).replace("\\", "")
        if not line.startswith("|") and plain:
            assert " ".join(plain.split()) in parsed.replace("\u00a0", " "), plain
    assert html.count("<table>") == len(tables(markdown))
    assert html.count('<svg role="img"') == len(re.findall(r"^!\[", markdown, re.M))


def test_pictures_are_xml_whose_text_is_text(folder, page):
    pictures = [folder / name for name in re.findall(r"\((study_figures/.*)\)$", page[0], re.MULTILINE)]
    assert sorted(pictures) == sorted((folder / "study_figures").iterdir())
    for picture in pictures:
        root = ElementTree.parse(picture).getroot()
        said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any("prior" in (words or "") for words in said), picture
        assert not any("$" in (words or "") for words in said), "TeX stays as it is written"
    forest = next(path for path in pictures if path.name == "methods_improvement.svg")
    curve = next(path for path in pictures if path.name == "methods_loss.svg")
    assert "#0072b2" in forest.read_text().lower(), "prior has one colour"
    assert "#0072b2" in curve.read_text().lower()
    assert "#000000" not in re.findall(r"stroke: (#\w+); stroke-width: 1.6", forest.read_text()), "ntp is no row"


@pytest.mark.slow
def test_the_same_file_gives_the_same_bytes(tmp_path, folder):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes())
    program = "import sys, pathlib; from composer_prior.studies.study_page import write_report; "
    program += "write_report(pathlib.Path(sys.argv[1])); print({'torch', 'composer'} & set(sys.modules))"
    command = [sys.executable, "-c", program, str(elsewhere / "results.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", "no torch, no Composer"
    files = [path.relative_to(folder) for path in folder.rglob("*.*") if path.name != "results.jsonl"]
    assert len(files) > 10
    for name in files:
        assert (elsewhere / name).read_bytes() == (folder / name).read_bytes(), name


def test_two_seeds_have_no_interval_and_the_page_says_so(tmp_path):
    study = header()
    study["study"]["axes"]["seed"] = [1, 2]
    markdown, _ = report(tmp_path, study)
    assert "prior, noise: 2 seeds in common with ntp: fewer than 3, so there is no interval." in markdown
    answer = r"prior \(\S+ %\) and noise \(\S+ %\) are not judged, as fewer than 3 seeds have every figure."
    assert re.search(f"captions/cider: {answer}\n", markdown)
    assert "ntp and prior: 2 seeds at every size, fewer than 3: no intervals." in markdown
    cells = [cell for table in tables(markdown) for cells in table[2:] for cell in cells[1:]]
    assert not any("[" in cell or "better" in cell or "worse" in cell or "difference" in cell for cell in cells)


def test_what_is_missing_is_named(tmp_path):
    def without(cell, records):
        if (cell["method"], cell["seed"], cell["steps"]) == ("prior", "2", "40"):
            records.pop("training")  # not finished
        if (cell["method"], cell["seed"]) == ("noise", "3"):
            records["foils"]["total"] = None
        return records

    figures = {"averaged": {"foils/total": "higher"}, "beside": {"pope/accuracy": "higher", "captions/cider": "higher"}}
    study = header(figures=figures, grids=METHODS)
    markdown, _ = report(tmp_path, study, lines_of(study, without))
    assert "Missing: 1 run: prior, seed 2." in markdown
    assert "In grid methods, of which 14 of 15 runs are finished, by the average of foils/total: prior (+" in markdown
    assert "No finished run has a number for: pope/accuracy." in markdown
    assert "noise, foils/total: without a number at seed 3, which is left out of this figure." in markdown
    assert "prior: 4 seeds in common with ntp." in markdown
    assert row(markdown, -1, "prior")[1] == "4 of 5"
    assert "pope" not in json.dumps(tables(markdown))


def test_differences_are_called_better_or_worse_whatever_their_sign(page):
    markdown, _ = page
    assert row(markdown, 1, "validation/loss (lower")[2].startswith("-")
    assert row(markdown, 1, "validation/loss (lower")[2].endswith("] better")
    assert row(markdown, 1, "validation/loss_other")[2].startswith("+")
    assert row(markdown, 1, "validation/loss_other")[2].endswith("] worse")
    assert row(markdown, 1, "captions/cider")[2].endswith("]")
    assert "method minus ntp: positive is better where higher is, negative where lower is" in markdown


def test_nothing_finished(tmp_path):
    markdown, html = report(tmp_path, lines=[])
    assert "0 of 45 runs are finished." in markdown
    assert "No run of this study is finished: there is nothing to compare yet." in html
    assert "<table>" not in html
    assert not (tmp_path / "study_figures").exists()
    study = header(grids=METHODS)
    markdown, _ = report(tmp_path, study, [line for line in lines_of(study) if line["cell"]["method"] == "prior"])
    assert "No run of the baseline ntp is here: nothing is compared." in markdown
    assert "No method can be compared with ntp yet." in markdown


def test_a_baseline_of_0_has_no_relative_improvement(tmp_path):
    def zero(cell, records):
        records["foils"]["total"] = 0.0 if cell["method"] == "ntp" else 0.5
        return records

    study = header(grids=METHODS)
    markdown, _ = report(tmp_path, study, lines_of(study, zero))
    assert row(markdown, 0, "foils/total")[1] == "none better"
    assert "prior, foils/total: the baseline's mean is 0, so there is no relative improvement." in markdown
    assert "prior: the average is without foils/total." in markdown
    assert re.search(r"prior \(\S+ % \[\S+, \S+\], without foils/total\)", markdown.split("\n\n")[1])


def test_a_line_that_is_there_twice_counts_once_and_the_later_one(tmp_path):
    study = header(grids=METHODS)
    lines = lines_of(study)
    torn = [{**line, "figures": dict.fromkeys(line["figures"], 77.0)} for line in lines[:2]]
    (tmp_path / "torn").mkdir()
    assert report(tmp_path, study, lines) == report(tmp_path / "torn", study, torn + lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [], "line 1: there is no header"),
        (lambda lines: ["{}", *lines[1:]], "line 1: there is no 'study'"),
        (lambda lines: [*lines[:3], "{not json", *lines[3:]], "line 4: Expecting property name"),
        (lambda lines: [*lines[:2], '{"benchmark": "x", "figures": {}}'], "line 3: there is no 'cell'"),
        (lambda lines: [lines[0], lines[1].replace('"seed"', '"sead"')], "line 2: the cell has the axes method, sead"),
        (
            lambda lines: [lines[0], re.sub(r'"loss": [\d.]+', '"loss": "1.0"', lines[1])],
            "line 2: '1.0' is not a number",
        ),
        (lambda lines: [lines[0], "[1]"], "line 2: '[1]' is not a mapping"),
        (lambda lines: [lines[0], lines[1][:-1] + "\udcff"], "line 2: 'utf-8' codec can't decode"),
        (
            lambda lines: [lines[0].replace('"all"', '"some"')],
            "line 1: grids.methods.method=some is not a value",
        ),
        (lambda lines: [lines[0].replace('"flops"', '"meters"')], "line 1: grids.compute.scaling=meters"),
        (lambda lines: [lines[0].replace('"higher"', '"up"')], "line 1: figures.averaged.foils/total=up: expected"),
        (
            lambda lines: [lines[0].replace('"baseline": "ntp"', '"baseline": "x"')],
            "line 1: baseline=x is not a value of the axis method",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, change, said):
    file = written(tmp_path)
    lines = change(file.read_text().splitlines())
    file.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(f"{file}, {said}")) as error:
        write_report(file)
    assert "\n" not in str(error.value)


def hostile(text: str) -> dict:
    """A study in which every name is the text."""
    return header(
        name=text, recipe=text, baseline=f"{text} ntp", curve=f"{text}/loss", fits={f"{text}/loss": "lower"},
        axes={"method": {f"{text} ntp": {}, f"{text} prior": {}}, "seed": [1, 2, 3], text: {f"{text} v": {}, "w": {}}},
        grids={text: {"method": "all", "seed": "all", text: "all", "scaling": "flops"}},
        figures={"averaged": {f"{text}/loss": "lower"}, "beside": {"absent/" + text: "lower"}},
    )  # fmt: skip


def hostile_lines(study: dict, text: str) -> list[dict]:
    def rename(cell, records):
        scale = 2 if cell[text] == "w" else 1
        records["training"]["flops"] *= scale
        return {text: records["validation"], "training": records["training"]}

    lines = lines_of(study, rename)
    for line in lines:
        if line["benchmark"] == text:
            loss = line["figures"]["loss"]
            line["curve"] = {"batch": [1, 2], "loss": [loss + 1, loss]}
    return lines


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> tuple[str, str]:
    study = hostile("harmless")
    return report(tmp_path_factory.mktemp("harmless"), study, hostile_lines(study, "harmless"))


def without_pictures(html: str) -> str:
    return re.sub(r'<svg role="img".*?</svg>\n', "", html, flags=re.DOTALL)


@pytest.mark.parametrize("text", [*HOSTILE[:4], HOSTILE[5], "$x^{", "_a_ *b* `c` | d [e](f)", "_", "]]>"])
def test_text_is_only_text(tmp_path, harmless, text):
    study = hostile(text)
    markdown, html = report(tmp_path, study, hostile_lines(study, text))
    assert Elements(without_pictures(html)).names == Elements(without_pictures(harmless[1])).names
    assert set(Elements(html).names) == set(Elements(harmless[1]).names)
    assert text in Elements(html).texts, "the title"
    shapes = [[[len(cells) for cells in table] for table in tables(page)] for page in (markdown, harmless[0])]
    assert shapes[0] == shapes[1]
    assert "<" not in markdown
    assert len(re.findall(r"(?<!\\)\]\(", markdown)) == len(re.findall(r"\]\(", harmless[0])), "links are of pictures"
    for svg in (tmp_path / "study_figures").iterdir():
        ElementTree.parse(svg)
        assert re.fullmatch(r"[\w.]+\.svg", svg.name)


@pytest.mark.filterwarnings("error")
def test_names_with_control_characters_are_drawn(tmp_path):
    for number, text in enumerate((HOSTILE[4] + HOSTILE[6], HOSTILE[7] + "\ufffe\uffff\ud800")):
        folder = tmp_path / str(number)
        folder.mkdir()
        study = hostile(text)
        markdown, html = report(folder, study, hostile_lines(study, text))
        assert len(re.findall(r"(?<!\\)\]\(", markdown)) == html.count('<svg role="img"') > 0
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", html)
        for svg in (folder / "study_figures").iterdir():
            ElementTree.parse(svg)


def test_planned_cells_follow_from_the_grids(tmp_path):
    study = read_study_results(written(tmp_path))
    expected = {(m, s, "40") for m in ("ntp", "prior", "noise") for s in SEEDS}
    expected |= {(m, s, steps) for m in ("ntp", "prior") for s in SEEDS for steps in STEPS}
    assert len(study.planned) == len(expected)
    assert set(study.planned) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_real_browser(tmp_path):
    text = " ".join(HOSTILE[:4])
    study = hostile(text)
    report(tmp_path, study, hostile_lines(study, text))
    dom, picture = browse(tmp_path / "study.html", tmp_path)
    assert re.search("<title>(.*?)</title>", dom)[1].startswith("&lt;script&gt;")  # type: ignore[index]
    assert "<script" not in dom
    assert not re.search("<h2[^>]*>forged", dom)
    pixels = picture.convert("RGB").getdata()
    assert sum(pixel == (0, 0x72, 0xB2) for pixel in pixels) > 100, "the curves are on the screen"
