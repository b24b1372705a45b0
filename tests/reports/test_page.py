"""All pages are of one design, which every reader can use: by axe-core, in a real browser."""

import json

import pytest
from common.pages import BROWSER, HOSTILE, audit
from common.study_pages import METHODS, header, lines_of, report
from PIL import Image
from streaming import MDSWriter

from composer_prior.inference.caption import _page
from composer_prior.reports.inspection import inspect_captions
from composer_prior.reports.page import sample_card
from composer_prior.reports.run_report import run_report

LONG = "a caption longer than its box " * 60


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_pages_are_accessible_wide_and_narrow_and_light_and_dark(tmp_path):
    """No rule of axe-core is violated, and no page is wider than the screen."""
    report(tmp_path, study := header(grids=METHODS), lines_of(study))  # study.html
    shades = [[(text, number / len(HOSTILE)) for number, text in enumerate(HOSTILE)], [(LONG, 1.0)]]
    cards = [sample_card("x" * 200, Image.new("RGB", (640, 480)), ["".join(HOSTILE), LONG], shades)]
    records = [
        {"batch": batch, "metrics/train/loss": 2.0 / (1 + batch), "metrics/train/accuracy": 0.5} for batch in range(9)
    ]
    figures = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("total", "total_shuffled", "chance")}
    page = run_report(records, "x" * 200, benchmarks={"foils": figures}, cards=cards, recipe="key: value " * 99)
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    lines = tmp_path / "captions.jsonl"
    lines.write_text(json.dumps({"image": "gone.png", "caption": LONG, "tokens": [[LONG, 0.5]]}) + "\n")
    (tmp_path / "captions.html").write_text(_page(lines, "captions"), encoding="utf-8")
    with MDSWriter(columns={"image": "bytes", "caption": "str"}, out=str(tmp_path / "data")) as writer:
        for text in (*HOSTILE, LONG):
            writer.write({"image": b"", "caption": text})
    inspect_captions(tmp_path / "data", page=tmp_path / "inspection.html")
    pages = [tmp_path / f"{name}.html" for name in ("study", "report", "captions", "inspection")]
    views = [(1280, "light"), (400, "dark")]
    found = audit(pages, views, tmp_path)
    seen = {(one["page"], one["width"], "dark" if one["dark"] else "light") for one in found}
    assert seen == {(page.name, *view) for page in pages for view in views}
    for one in found:
        assert "color-contrast" in one["passes"]
        assert (one["violations"], one["wider"]) == ([], 0), one
