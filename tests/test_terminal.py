"""Words of others, such as captions and names of files: a terminal shows them and does not obey them."""

import json
import re
from pathlib import Path

import pytest
from common.models import small_lvlm
from PIL import Image
from streaming import MDSWriter

from composer_prior.commands.cli import main
from composer_prior.data.files import begin_lines
from composer_prior.data.messages import DataError, announce
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.evaluation.captioned import CaptionSamples
from composer_prior.models.image_text_model import Caption
from composer_prior.reports.closing import Samples

HOSTILE = "a\x1b[31m\x07\r\x9b2J\u202eb\u2066c\u200fd\u061ce"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def said(capsys, *words):
    """The exit status of a command, and all that it has said."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (code, out + err) if isinstance(code, int) else (1, out + err + str(code))


@pytest.mark.parametrize(
    "words",
    [
        ["train", f"{HOSTILE}.yaml"],
        ["train", "prior_vit.yaml", f"{HOSTILE}=1"],
        ["train", "prior_vit.yaml", f"run_name={HOSTILE}/x", "max_duration=x"],
        ["score", f"{HOSTILE}.yaml"],
        ["convert", HOSTILE, "out"],
        ["convert", "pairs", "out", f"images={HOSTILE}"],
        ["convert", f"out={HOSTILE}", HOSTILE],
        ["caption", "model", HOSTILE],
        ["caption", HOSTILE, "image.png"],
        ["inspect", HOSTILE],
        ["evaluate", "model", "benchmark=foils", f"data={HOSTILE}"],
        ["evaluate", "model", f"benchmark={HOSTILE}"],
        ["evaluate", HOSTILE, "benchmark=foils", "data=foils.jsonl"],
        ["export", HOSTILE, "out"],
        ["study", f"{HOSTILE}.yaml"],
    ],
    ids=lambda words: words[0],
)
def test_an_error_shows_what_it_names(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("pairs").mkdir()
    Image.new("RGB", (8, 8)).save("image.png")
    Path("foils.jsonl").write_text(json.dumps({"image": "image.png", "caption": "a", "foils": ["b"]}))
    code, text = said(capsys, *words)
    assert code
    assert not OBEYED.search(text), repr(text)


def test_files_keep_what_the_terminal_shows(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # version 5 shows a bar, with returns
    small_lvlm("patches", tokenizer).image_text_model.save_pretrained("model")
    Path(HOSTILE).mkdir()
    Path(HOSTILE, f"{HOSTILE}.png").write_bytes(make_sample("validation", 0)["image"])
    pairs = [{"image": f"{HOSTILE}{end}", "caption": f"{HOSTILE} owl"} for end in (".png", "x.png")]
    Path(HOSTILE, "captions.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for words in (
        ["convert", HOSTILE, f"{HOSTILE}/mds", "max_rejected=1"],
        ["inspect", f"{HOSTILE}/mds"],
        ["caption", "model", f"{HOSTILE}/{HOSTILE}.png", "max_new_tokens=2", "progress=false"],
    ):
        code, text = said(capsys, *words)
        assert (code, OBEYED.search(text)) == (0, None), repr(text)
    assert CaptionSamples(f"{HOSTILE}/mds")[0].captions == [f"{HOSTILE} owl"]
    (line,) = map(json.loads, Path("captions.jsonl").read_text().splitlines())
    assert line["image"] == f"{HOSTILE}/{HOSTILE}.png"


def test_the_closing_report_shows_captions(capsys):
    announce(Samples([], [HOSTILE], [Caption(f"{HOSTILE}\n👩‍👧", [])], [HOSTILE]))
    text = capsys.readouterr().out
    assert not OBEYED.search(text)
    assert text.count("a[U+001B][31m[U+0007][U+000D]") == 3
    assert "👩‍👧" in text  # the joiner of emojis stays


def test_an_error_names_its_file(tmp_path):
    file = tmp_path / "captions.jsonl"
    begin_lines(file, {})
    file.write_text('{"image": "a"}\n{"image"\n')
    with pytest.raises(DataError, match=r"captions\.jsonl has a line that is no JSON"):
        begin_lines(file, {})
    with MDSWriter(out=str(tmp_path / "data"), columns={"image": "bytes", "caption": "str"}) as writer:
        writer.write({"image": b"none", "caption": "an owl"})
    with pytest.raises(DataError, match=r"data: sample 0 cannot be read \(the image cannot be decoded"):
        CaptionSamples(str(tmp_path / "data"))[0]
