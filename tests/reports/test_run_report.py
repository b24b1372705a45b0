"""A run's page shows what was logged, and only that, whatever is in it; the browser draws it."""

import json
import math
import random
import re
from functools import cache
from html.parser import HTMLParser
from statistics import fmean

import pytest
from common.pages import BROWSER, HOSTILE, browse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from composer_prior.reports.page import sample_card
from composer_prior.reports.plots import Line, line_chart
from composer_prior.reports.run_report import POINTS, Curve, run_report


class Parsed(HTMLParser):
    """What elements a page has, and the text of each kind."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        names = tuple(name for name, _ in attrs)
        if (tag, dict(attrs).get("class")) != ("span", "control"):  # a control character made visible
            self.elements.append((tag, names))
            if tag not in ("meta", "img"):
                self._open.append(tag)
                self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag != "span":
            while self._open and self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data


def record(batch: int, **others) -> dict:
    """What a run of ours logs at a step."""
    tokens = {f"metrics/train/{value}{end}": batch + 1.0 for value in ("loss", "accuracy") for end in ("", "_other")}
    return {
        "batch": batch, "time/batch": batch, "time/sample": 8 * batch, "loss/train/total": 2.0, **tokens,
        "prior/loss_weighted": 3.0, "prior/loss_unweighted": 2.0, "prior/reference_nll": 1.5,
        "prior/effective_sample_size": 0.5, "prior/top_decile_share": 0.3, "lr-AdamW/group0": 1e-3, **others,
    }  # fmt: skip


def evaluated(batch: int) -> dict:
    figures = {
        "total": 0.8, "total_shuffled": 0.51, "chance": 0.5, "text_only": 0.52,
        "total/count": 0.6, "total_shuffled/count": 0.2, "chance/count": 0.25, "text_only/count": 0.3,
    }  # fmt: skip
    validation = {"metrics/eval/loss": 2.25, "metrics/eval/loss_other": 1.0, "metrics/eval/loss_image_related": None}
    return record(batch, **validation, **{f"eval/foils/{name}": value for name, value in figures.items()})


def mixed(batch: int) -> dict:
    """What a run on two streams logs at a step, one of which only the validation has."""
    own = {"loss/train/captions": 2.0, "metrics/train/captions/accuracy": 0.5, "metrics/train/captions/share": 1.0}
    own |= {"metrics/train/captions/tokens": 12_345, "prior/captions/loss_weighted": 2.5}
    validation = {f"metrics/eval/chat/{name}": value for name, value in (("loss", 3.0), ("share", 1.0), ("tokens", 77))}
    return record(batch, **own, **validation)


def last_figures(record: dict) -> dict:
    """The figures of benchmarks that a run has after its last record."""
    found: dict = {}
    for name, value in record.items():
        kind, _, rest = name.partition("/")
        if kind == "eval" and value is not None:
            benchmark, _, figure = rest.partition("/")
            found.setdefault(benchmark, {})[figure] = {"value": value}
    return found


def charts(page: str) -> list[str]:
    return re.findall(r"<figure><figcaption dir=\"auto\">(.*?)</figcaption>\n<div class=\"wide\"[^>]*><svg", page)


def svg_texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


def card(text: str) -> str:
    shades = [[(text, None)], [(text, 0.25), (" end", 1.0)]]
    return sample_card(1, Image.new("RGB", (80, 60), "red"), [text, text], shades, ["true", "generated"])


@pytest.mark.parametrize("count", [1, 2, POINTS, POINTS + 1, 5 * POINTS + 3])
def test_the_points_of_a_curve_are_the_means_of_its_parts(count):
    values = [random.Random(count).gauss(0, 1) for _ in range(count)]
    curve = Curve()
    for batch, value in enumerate(values):
        curve.add(batch, value)
    width = curve.width
    assert len(curve.points) <= POINTS
    assert width == max(1, 2 ** math.ceil(math.log2(count / POINTS)))
    starts = range(0, count, width)
    assert [x for x, _ in curve.points] == pytest.approx([fmean(range(count)[s : s + width]) for s in starts])
    assert [y for _, y in curve.points] == pytest.approx([fmean(values[s : s + width]) for s in starts])


def test_a_long_run_and_a_short_one_have_pages_of_a_size():
    short, long = (run_report((record(batch) for batch in range(count)), "run") for count in (400, 20_000))
    assert len(long) < 2 * len(short) < 200_000
    assert "Each point is the mean over up to 64 batches." in long
    assert "Each point" not in short


def test_what_was_logged_is_shown():
    page = run_report([record(0), evaluated(1), evaluated(2), record(3)], "a run", recipe="seed: 17")
    assert "<title>a run</title>" in page
    assert "Trained on 3 batches, 24 samples." in page
    assert charts(page) == [
        "Loss", "Accuracy", "Training loss with and without PRIOR&#x27;s weights", "PRIOR&#x27;s weights",
        "Learning rate", "Benchmark: foils",
    ]  # fmt: skip
    said = svg_texts(page)
    assert said[said.index("nats per token") + 1 :][:4] == [
        "all, training", "all, validation", "other, training", "other, validation",
    ]  # fmt: skip
    assert said[-4:] == ["total", "total, shuffled images", "text only", "chance"]
    assert said.count("batch") == 6, "axes are labelled"
    assert "nats per token by batch, 0 to 3. all, training: 1 to 4; all, validation: 2.25 to 2.25;" in page
    assert "<details><summary>Recipe</summary><pre>seed: 17</pre></details>" in page


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page)]


def test_results_stand_beside_the_reference_and_chance():
    validation = {
        "reference (text only)": {"loss": 3.0, "accuracy": 0.25, "perplexity": 20.0},
        "run": {"loss": 2.0, "accuracy": 0.5, "loss_other": math.nan},
    }
    assert cells(run_report([evaluated(1)], "run", validation=validation, benchmarks=last_figures(evaluated(1)))) == [
        ["validation", "loss, all", "accuracy, all"],
        ["reference (text only)", "3.0000", "0.2500"],
        ["run", "2.0000", "0.5000"],
        ["benchmark", "this model", "shuffled images", "text only", "chance"],
        ["foils · total", "0.8000", "0.5100", "0.5200", "0.5000"],
        ["benchmark", "this model", "shuffled images", "text only", "chance"],
        ["foils · count · total", "0.6000", "0.2000", "0.3000", "0.2500"],
    ]
    figures = {"captioning": {"cider": {"value": 1.5, "low": 1.0, "high": 2.0}, "none": {"value": None, "low": None}}}
    assert cells(run_report([evaluated(1)], "run", benchmarks=figures)) == [
        ["benchmark", "this model", "95 % interval"],
        ["captioning · cider", "1.5000", "1.0000 to 2.0000"],
        ["captioning · none", "-", ""],
    ]


def test_figures_are_explained_and_curves_have_colours_of_their_own():
    figures = {f"bleu_{n}": 0.1 for n in (1, 2, 3, 4)} | {"cider_d": 0.2, "rouge_l": 0.3, "chair_i": 0.4, "total": 0.5}
    figures |= {"total_shuffled": 0.4, "chance": 0.25}
    records = [{"batch": b, **{f"eval/all/{name}": v + b / 10 for name, v in figures.items()}} for b in (1, 2)]
    page = run_report(records, "run", validation={"run": {"loss": 2.0}}, benchmarks=last_figures(records[-1]))
    rows = [row[0] for row in cells(page)]
    assert {"all · CIDEr-D", "all · BLEU-4", "all · ROUGE-L", "all · CHAIR-i · lower is better"} <= {*rows}
    said = "\n".join(re.findall("<li>(.*?)</li>", page))
    for words in (
        "loss: nats per token, lower is better",
        "CHAIR-i: share of the mentions of objects that are not in the image; lower is better",
        "BLEU-1, BLEU-2, BLEU-3, BLEU-4: ",
        "CIDEr-D: ",
        "total: ",
        "shuffled images: ",
        "chance: ",
    ):
        assert words in said
    assert "text only" not in said  # nothing is explained that is not there
    assert charts(page) == ["Benchmark: all"] * 2
    for svg in re.findall("<svg.*?</svg>", page, flags=re.DOTALL):
        drawn = re.findall(r'style="fill: none; (stroke-dasharray: [^;]*; )?.*?stroke: (#\w+); stroke-width: 1.4', svg)
        assert len(drawn) == 2 * len(set(drawn)) > 0, "each in the plot and in the legend"


def test_what_a_run_lacks_is_not_there():
    for records in ([], [{"batch": 0}], [{"batch": 0, "metrics/train/loss": None, "lr-x": math.nan, "note": "text"}]):
        page = run_report(records, "run")
        assert "<svg" not in page
        assert "<h2>" not in page
        assert "How long it was trained was not logged." in page
    assert charts(run_report([{"batch": 0, "loss/train/total": 2.0}], "of another model")) == ["Loss"]
    undefined_at_last = [{"batch": 1, "eval/foils/total": 0.5}, {"batch": 2, "eval/foils/total": None}]
    assert "foils" not in run_report(undefined_at_last, "run", benchmarks=last_figures(undefined_at_last[-1]))


@cache
def page_of(text: str) -> str:
    shown = {"total": {"value": 0.5}, "of/" + text: {"value": 0.5}}
    return run_report(
        [{"batch": batch, f"lr-{text}": 1.0} for batch in range(2)],
        text,
        validation={text: {"loss": 1.0}},
        benchmarks={text: shown},
        cards=[card(text)],
        recipe=text,
    )


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(), min_size=1) | st.sampled_from(HOSTILE))
def test_text_is_only_text(text):
    page = page_of(text)
    page.encode("utf-8")
    parsed = Parsed(page)
    assert parsed.elements == Parsed(page_of("harmless")).elements
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page)
    if text.isprintable() and text.isascii():
        assert parsed.texts["h1"] == [text]
        assert text in parsed.texts["p"]
        assert text in parsed.texts["pre"]


def drawn(*points: tuple[float, float]) -> tuple[list[str], list[tuple[float, float]]]:
    """The texts of a chart of one line, and where its points lie."""
    svg = line_chart([Line("l", points, 1, dots=True)], "batch", "nats", may_be_log=True)
    line = re.search(r'<path d="([^"]*)"[^>]*stroke: #0072b2; stroke-width: 1.4', svg)
    places = re.findall(r"[ML] (\S+) (\S+)", line[1]) if line else []
    return svg_texts(svg), [(float(x), float(y)) for x, y in places]


def test_axes_have_round_numbers():
    texts, _ = drawn((0, 0.2), (600, 0.3))
    assert texts == [
        *("0", "100", "200", "300", "400", "500", "600", "batch"),
        *("0.2", "0.22", "0.24", "0.26", "0.28", "0.3", "nats", "l"),
    ]
    texts, _ = drawn((0, 0.3), (2000, 30))
    assert {"1,000", "0.5", "1", "2", "5", "10", "20", "nats, logarithmic"} <= {*texts}
    assert {"0.0001", "0.01", "1"} <= {*drawn((0, 1e-9), (1, 1))[0]}
    assert "2" in drawn((0, 2), (1, 2))[0]
    _, places = drawn((0, 0.1), (1, 1), (2, 10))
    heights = [y for _, y in places]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert "nats" in drawn((0, 0.0), (1, 5.0))[0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20))
def test_any_values_have_a_chart(values):
    texts, places = drawn(*enumerate(values))
    assert not {"nan", "inf"} & {*texts}
    assert places or len(set(values)) == 1 or len(values) == 1
    for x, y in places:
        assert 0 <= x <= 432
        assert 0 <= y <= 245


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_real_browser(tmp_path):
    page = tmp_path / "report.html"
    records = [record(batch) for batch in range(50)] + [evaluated(50), evaluated(100)]
    text = " ".join(HOSTILE)
    cards = [card(hostile) for hostile in HOSTILE]
    page.write_text(
        run_report(
            json.loads(json.dumps(records)), text, benchmarks=last_figures(records[-1]), cards=cards, recipe=text
        ),
        encoding="utf-8",
    )
    dom, picture = browse(page, tmp_path)
    assert re.search("<title>(.*?)</title>", dom)[1].startswith("&lt;script&gt;")  # type: ignore[index]
    assert re.findall("<h2>(.*?)</h2>", dom) == ["Results", "Curves", "Captions of validation images"]
    assert "<script" not in dom
    assert dom.count('role="img"') == 6
    pixels = picture.convert("RGB").getdata()
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):  # of the first two curves
        assert sum(pixel == colour for pixel in pixels) > 200, "the curves are on the screen"
    assert sum(max(map(abs, map(int.__sub__, pixel, (255, 0, 0)))) < 9 for pixel in pixels) >= len(HOSTILE) * 70 * 50
    assert sum(pixel == (255, 140, 0) for pixel in pixels) > 20 * len(HOSTILE), "likely tokens are shaded"


def test_streams_have_charts_of_their_figures():
    page = run_report([mixed(0), mixed(1)], "run")
    titles = ["Loss", "Accuracy", "Share of the samples", "Tokens so far", "Loss weighted by PRIOR,"]
    titles = [f"{title} by stream" for title in titles]
    assert [title for title in charts(page) if "stream" in title] == titles
    assert not any("stream" in title for title in charts(run_report([record(0)], "run")))
