"""The report says what is in the data, and the page shows it, in a real browser, whatever is in it."""

import html
import io
import json
import re
from pathlib import Path

import pytest
import torch
from common.chats import parts, turns, write_chats
from common.commands import inspect as main
from common.models import small_lm
from common.pages import BROWSER, HOSTILE, browse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import MDSWriter

from composer_prior import importance_weights
from composer_prior.conversion.convert import convert_captions
from composer_prior.data.scores import Scores
from composer_prior.data.tokenizer import encode_caption
from composer_prior.reports.inspection import inspect_captions
from composer_prior.reports.page import sample_card, samples_page
from composer_prior.scoring.score import ScoreJob, score_captions

LONGEST = 24


def png(colour: str, size=(64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path) -> Path:
    source = tmp_path / "in"
    source.mkdir()
    colours = ("red", "lime", "blue")
    with open(source / "captions.jsonl", "w") as lines:
        for number in range(30):
            (source / f"{number}.png").write_bytes(png(colours[number % 3], (64 + number % 3, 48)))
            caption = HOSTILE[number] if number < len(HOSTILE) else f"a picture {'of paint ' * (number % 2)}"
            lines.write(json.dumps({"image": f"{number}.png", "caption": caption}) + "\n")
    convert_captions(source, tmp_path / "data", processes=1)
    return tmp_path / "data"


def test_the_report_counts(data):
    report = inspect_captions(data)
    assert (report.samples, report.read, report.captions, report.undecodable) == (30, 30, 30, 0)
    assert report.formats == {"PNG": 30}
    assert {width for width, _ in report.sizes} == {64, 65, 66}
    assert report.unit == "tokens of OpenCLIP's tokenizer"
    assert len(report.lengths) == 30
    assert sorted(report.lengths)[0] == 2, "a picture"
    assert [count for _, count in report.frequent[:3]] == [11, 11, 1]
    assert len(report.frequent) == 10
    text = str(report)
    assert "30 samples in 1 shards" in text
    assert "64 to 66, median 65" in text
    assert "[U+202E]" in text
    assert "\u202e" not in text


def test_a_part_is_drawn_by_the_seed(data):
    first, again, other = (inspect_captions(data, limit=9, seed=seed) for seed in (1, 1, 2))
    assert first.read == 9
    assert "figures below are of 9 of them" in str(first)
    assert first == again
    assert first.frequent != other.frequent


def test_a_tokenizer_counts_tokens(data, tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(tmp_path / "chars")
    report = inspect_captions(data, tokenizer=str(tmp_path / "chars"))
    assert report.unit == "tokens"
    assert max(report.lengths) == max(map(len, HOSTILE))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_any_caption_is_only_text_in_the_page(caption):
    page = samples_page([sample_card(0, b"no image", [caption])], caption, caption)
    page.encode("utf-8")
    shown = re.search(r'<p dir="auto">(.*?)</p>', page, re.DOTALL)
    assert shown is not None
    plain = html.unescape(re.sub(r'<span class="control">\[U\+([0-9A-F]+)\]</span>', _control, shown[1]))
    assert plain == caption
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page)
    assert page.count("<script") == 0


def _control(match: re.Match[str]) -> str:
    return (
        f"&#x{match[1]};"
        if int(match[1], 16) > 0xA0 and not 0xD800 <= int(match[1], 16) < 0xE000
        else chr(int(match[1], 16))
    )


def test_conversations_show_their_turns_and_what_is_learned(tmp_path, capsys):
    talk = turns("<image>What <b>is</b> it?", "A tile.", "And <image>", "Another.")
    talk[1]["weight"] = 0
    document = [{"role": "document", "content": parts("One.<image>Two.")}]
    bad = [{"role": "user", "content": "\ud83d"}]
    out = write_chats(
        tmp_path / "chats", [(talk, [png("red"), b"none"]), (document, [png("lime", (70, 9))]), (bad, [])]
    )
    assert main([out, f"page={tmp_path / 'page.html'}"]) == 0
    report = capsys.readouterr().out
    assert re.search(r"^image formats   2 PNG\nundecodable     1$", report, re.MULTILINE)
    assert re.search(r"^turns           5$", report, re.MULTILINE)
    assert re.search(r"^turn length     \d.*\n(.*\n)*unusable        1\nmost frequent turns:$", report, re.MULTILINE)
    assert "no answer is learned" not in report
    page = (tmp_path / "page.html").read_text()
    shown = re.findall(r'<small>([^<]*)</small><p dir="auto">(.*?)</p>', page, re.DOTALL)
    assert [(label, html.unescape(text)) for label, text in shown] == [
        ("user", "<image>What <b>is</b> it?"),
        ("assistant", "A tile."),
        ("user", "And <image>"),
        ("assistant, learned", "Another."),
        ("document, learned", "One.<image>Two."),
        ("a sample that cannot be used", "no answer is learned"),
    ]
    assert page.count("<img ") == 2
    assert "sample 1 · 70 by 9 pixels" in page
    assert main([out, "scores=none"]) == 1
    assert "scores= shades captions alone; leave it out for conversations" in capsys.readouterr().err


def test_shades_follow_the_weights():
    card = sample_card(0, png("red"), ["a <b>"], [[("a ", 0.0), ("<b>", 2.0)]])
    assert '<mark style="--w:0.000" title="0">a </mark><mark style="--w:1.000" title="2">&lt;b&gt;</mark>' in card


@pytest.fixture
def scores(data, tokenizer, tmp_path) -> str:
    """Folder of the scores that a small reference gives the data, the end of long captions cut off."""
    small_lm(tokenizer).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    score_captions(
        ScoreJob(
            out=str(tmp_path / "scores"),
            reference=str(tmp_path / "reference"),
            tokenizer={"name": str(tmp_path / "reference")},
            dataset={"local": str(data), "max_caption_tokens": LONGEST},
            progress_bar=False,
        )
    )
    return str(tmp_path / "scores")


def shades_of(page: str) -> list[tuple[str, list[float]]]:
    """Text and weights of each caption of a page."""
    captions = re.findall(r'<p dir="auto">(.*?)</p>', page, re.DOTALL)
    return [
        (
            html.unescape(re.sub("<.*?>", "", caption)),
            [float(w) for w in re.findall(r'<mark [^>]*title="(.*?)"', caption)],
        )
        for caption in captions
    ]


def test_scores_of_a_viewer_are_not_priors_weights(data, scores, tmp_path, capsys):
    file = Path(scores, "scores.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "column": "viewer_logprobs"}))
    index = Path(scores, "index.json")
    index.write_text(index.read_text().replace("ref_logprobs", "viewer_logprobs"))
    assert main([str(data), f"scores={scores}", f"page={tmp_path / 'page.html'}"]) == 1
    error = capsys.readouterr().err
    assert "holds a viewer's scores, and the page shows PRIOR's weights: give scores= the folder of a" in error
    assert "Delete" not in error


def test_stored_scores_shade_each_token(data, scores, tokenizer, tmp_path, capsys):
    page = tmp_path / "new/page.html"
    assert main([str(data), f"scores={scores}", f"page={page}", "samples=30", "floor=0.1"]) == 0
    assert re.search(r"caption length .* tokens$", capsys.readouterr().out, re.MULTILINE)
    shown = shades_of(page.read_text())
    stored, cut = Scores(scores, tmp_path), 0
    for number, (text, weights) in enumerate(shown):
        logprobs = torch.from_numpy(stored[number])[None]
        expected = importance_weights(logprobs, torch.ones_like(logprobs, dtype=torch.bool), floor=0.1)[0]
        caption = HOSTILE[number] if number < len(HOSTILE) else f"a picture {'of paint ' * (number % 2)}"
        offsets = encode_caption(tokenizer, caption).offsets
        whole = len(offsets) < LONGEST
        cut += not whole
        plain = re.sub(r"[\u202c\u202e\x00\x1b\U000e0041]", lambda c: f"[U+{ord(c[0]):04X}]", caption)
        assert text == plain + tokenizer.eos_token * whole
        assert sum(weights) <= len(expected) + 0.01 * len(expected)
        if caption.isascii() and whole:  # each token has characters of its own
            assert weights == pytest.approx(expected.tolist(), rel=5e-3)
    assert cut


def test_scores_of_something_else_are_refused(data, scores, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "reference")
    other.add_tokens(["fox"])
    other.save_pretrained(tmp_path / "other")
    assert main([str(data), f"scores={scores}", f"tokenizer={tmp_path / 'other'}"]) == 1
    assert re.match(
        r"error: The scores in .* do not belong to this run; what differs: tokenizer", capsys.readouterr().err
    )
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(json.dumps(index, indent=1))
    assert main([str(data), f"scores={scores}"]) == 1
    assert re.match(r"error: The scores in .* do not belong to this run; what differs: data", capsys.readouterr().err)
    other.save_pretrained(tmp_path / "reference")
    assert main([str(data), f"scores={scores}"]) == 1
    assert "the reference has another tokenizer than the model; name the model's" in capsys.readouterr().err
    assert main([str(data), f"scores={tmp_path / 'none'}"]) == 1
    assert "holds no whole scores" in capsys.readouterr().err


def test_unsafe_and_foreign_data_are_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no index\.json here"):
        inspect_captions(tmp_path)
    for columns in ({"image": "bytes", "caption": "pkl"}, {"image": "bytes", "caption": "str", "more": "pkl"}):
        with MDSWriter(columns=columns, out=str(tmp_path / "pkl"), exist_ok=True) as writer:
            writer.write(dict.fromkeys(columns, b"") | {"caption": "x"})
        assert main([str(tmp_path / "pkl")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
    assert main([]) == 2
    assert main([str(tmp_path), "nonsense=1"]) == 1
    assert "nonsense is not an option. Did you mean 'seed'? Accepted: alpha" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_real_browser(data, scores, tokenizer, tmp_path):
    page = tmp_path / "page.html"
    inspect_captions(data, page=page, samples=30, scores=scores)
    dom, picture = browse(page, tmp_path)
    assert "pwned" not in re.search("<title>(.*?)</title>", dom)[1]  # type: ignore[index]
    assert "<h2>" not in dom
    assert not re.search(r"<script|onerror=(?!&quot;|\")", re.sub(r"<p dir=.*?</p>", "", dom, flags=re.DOTALL))
    shown = [
        html.unescape(re.sub("<.*?>", "", text)) for text in re.findall(r'<p dir="auto">(.*?)</p>', dom, re.DOTALL)
    ]
    assert len(shown) == 30
    assert [text.removesuffix(tokenizer.eos_token) for text in shown[: len(HOSTILE)]] == [
        re.sub(r"[\u202c\u202e\x00\x1b\U000e0041]", lambda c: f"[U+{ord(c[0]):04X}]", text) for text in HOSTILE
    ]
    heaviest = dom.count('<mark style="--w:1.000')
    assert 30 <= heaviest < dom.count('<mark style="--w:')
    pixels = picture.convert("RGB").getdata()
    assert sum(pixel == (255, 140, 0) for pixel in pixels) > 30 * 20, "the heaviest tokens are shaded fully"
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        near = (max(map(abs, map(int.__sub__, other, colour))) < 9 for other in picture.convert("RGB").getdata())
        assert sum(near) >= 5 * 60 * 48, "the images are on the screen"
