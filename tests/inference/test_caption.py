"""The command that captions images: from files, folders and buckets, with bad images, resumed and refused."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.commands import caption as main
from common.models import small_lvlm
from common.s3_server import s3_server
from PIL import Image

from composer_prior import load
from composer_prior.commands.cli import main as command
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.inference.caption import caption_images


@pytest.fixture
def here(tokenizer, tmp_path, monkeypatch):
    """A model, a folder of five images and one that is none, and an image beside it."""
    monkeypatch.chdir(tmp_path)
    small_lvlm("patches", tokenizer).image_text_model.save_pretrained("model")
    Path("images/deeper").mkdir(parents=True)
    for number in range(5):
        folder = "images/deeper" if number == 3 else "images"
        Path(folder, f"{number}.png").write_bytes(make_sample("validation", number)["image"])
    Path("images/2b.jpg").write_bytes(b"<html>not found</html>")
    Path("images/notes.txt").write_text("no image")
    Image.new("RGB", (31, 17), "red").save("photo.jpg")
    return tmp_path


def run(*words, expect=0):
    assert main(["model", *words, "max_new_tokens=8", "progress=false"]) == expect


def lines(file="captions.jsonl"):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_every_image_has_its_line(here, capsys):
    run("photo.jpg", "images", "batch_size=2", "num_workers=2")
    found = lines()
    names = [
        "photo.jpg",
        *(f"images/{name}" for name in ("0.png", "1.png", "2.png", "2b.jpg", "4.png", "deeper/3.png")),
    ]
    assert sorted(line["image"] for line in found) == sorted(names)
    broken = [line for line in found if "error" in line]
    assert [line["image"] for line in broken] == ["images/2b.jpg"]
    assert "HTML page" in broken[0]["error"]
    model = load("model")
    for line in found:
        if "caption" in line:
            with Image.open(line["image"]) as image:
                assert [line["caption"]] == model.generate_captions([image], max_new_tokens=8), line
    assert capsys.readouterr().out == "6 images captioned, 1 could not be used.\n"


def test_it_goes_on_where_it_was_stopped(here, capsys):
    run("images", "num_workers=0")
    whole = Path("captions.jsonl").read_text()
    Path("captions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"image": "images/4')
    run("images", "photo.jpg", "num_workers=0")
    found = lines()
    assert found[:3] == [json.loads(line) for line in whole.splitlines()[:3]]
    assert len({line["image"] for line in found}) == len(found) == 7
    assert "3 images captioned, 1 could not be used, 3 had been done before" in capsys.readouterr().out
    run("images", "num_beams=2", expect=1)
    error = capsys.readouterr().err
    assert "was not made with these options (num_beams differ)" in error
    assert error.count("\n") == 1
    run("images", "num_beams=2", "overwrite=true", "num_workers=0")
    assert len(lines()) == 6


def test_sampling_follows_its_seed(here):
    for out, seed in (("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl", 2)):
        run("images", "temperature=2.0", f"seed={seed}", f"out={out}", "num_workers=0")
    assert lines("a.jsonl") == lines("b.jsonl") != lines("c.jsonl")


@pytest.mark.parametrize("beams", [1, 2])
def test_the_page_shades_tokens_by_their_probability(here, beams):
    run("photo.jpg", "page=page.html", f"num_beams={beams}", "num_workers=0")
    page = Path("page.html").read_text()
    assert page.count("<figure>") == 1
    assert page.count("<mark") >= 1
    model = load("model")
    with Image.open("photo.jpg") as image:
        inputs = model.inputs([image])
        (caption,) = model.generate(inputs, max_new_tokens=8, probabilities=True, num_beams=beams)
    assert all(0 <= probability <= 1 for _, probability in caption.pieces)
    assert "".join(text for text, _ in caption.pieces) == caption.text == lines()[0]["caption"]


def test_the_page_has_all_captions_of_the_file(here):
    """In whatever number of calls they were made; those of a call without page= have no shades."""
    run("photo.jpg", "images", "num_workers=0", "page=whole/page.html", "out=whole.jsonl")
    whole = Path("whole/page.html").read_text()
    run("photo.jpg", "num_workers=0", "page=page.html")
    for _ in range(2):  # the last call has nothing left to do
        run("photo.jpg", "images", "num_workers=0", "page=page.html")
        assert Path("page.html").read_text() == whole
    named = [Path(name).name for name in re.findall(r"<small>([^<]*) · \d+ by \d+ pixels</small>", whole)]
    assert named == ["photo.jpg", "0.png", "1.png", "2.png", "4.png", "3.png"]
    run("photo.jpg", "num_workers=0", "out=other.jsonl")
    Path("photo.jpg").unlink()
    run("images/0.png", "num_workers=0", "out=other.jsonl", "page=other.html")
    first, second = re.findall("<figure>.*?</figure>", Path("other.html").read_text(), flags=re.DOTALL)
    assert ("<mark" in first, "no image" in first, lines("other.jsonl")[0]["caption"] in html.unescape(first)) == (
        False,
        True,
        True,
    )
    assert "<mark" in second


def test_the_shade_of_a_token_is_its_probability(here):
    run("images", "num_workers=0", "page=page.html")
    figures = "".join(re.findall("<figure>.*?</figure>", Path("page.html").read_text(), flags=re.DOTALL))
    shades = re.findall(r'<mark style="--w:([\d.]+)" title="([^"]+)"', figures)
    assert shades
    assert all(float(shade) == pytest.approx(float(value), abs=6e-4, rel=6e-3) for shade, value in shades)
    assert max(float(shade) for shade, _ in shades) < 0.5  # a model that was never trained is sure of nothing


def test_a_caption_is_whole_where_the_tokenizer_rewrites_what_it_said(here):
    model = load("model")
    model.tokenizer.clean_up_tokenization_spaces = True
    model.tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True  # transformers 5
    ids = model.tokenizer("I do n't , know .", add_special_tokens=False)["input_ids"]
    caption = model._in_pieces(ids, torch.full([len(ids)], 0.5))
    assert caption.text == model.tokenizer.decode(ids)
    assert "don't, know." in caption.text
    assert "".join(text for text, _ in caption.pieces) == caption.text


def test_images_from_a_bucket(here, monkeypatch):
    with s3_server("pictures") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        from streaming.base.storage.upload import CloudUploader

        uploader = CloudUploader.get(("images", "s3://pictures/some"), keep_local=True, exist_ok=True)
        for name in ("0.png", "2b.jpg"):
            uploader.upload_file(name)
        run("s3://pictures/some", "s3://pictures/some/0.png", "s3://pictures/some/lost.png", "num_workers=0")
    first, second, again, lost = lines()
    assert (first["image"], second["image"]) == ("s3://pictures/some/0.png", "s3://pictures/some/2b.jpg")
    assert "HTML page" in second["error"]
    assert again == first
    assert "error" in lost


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere: there is no such image or folder"),
        (["photo.jpg", "batch_size=0"], "batch_size"),
        (["photo.jpg", "beams=2"], "beams is not an option. Did you mean 'num_beams'?"),
    ],
)
def test_what_cannot_work_is_one_line(here, capsys, words, expected):
    run(*words, expect=1)
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_models_that_are_none(here, capsys):
    assert main(["images", "photo.jpg"]) == 1
    assert capsys.readouterr().err.startswith("error: images: expected a run folder")


def test_the_command_lists_its_options(capsys):
    with pytest.raises(SystemExit) as ended:
        command(["caption", "--help"])
    assert ended.value.code == 0
    assert "images that are captioned at once [16]" in capsys.readouterr().out
    assert caption_images.__doc__


def test_what_is_no_plain_file_is_a_bad_image(here):
    os.mkfifo("images/pipe.png")
    with open("images/sparse.png", "wb") as file:
        file.truncate(4 << 30)
    run("images", "num_workers=0")
    errors = {line["image"]: line["error"] for line in lines() if "error" in line}
    assert errors["images/pipe.png"] == "not a regular file"
    assert "image too large" in errors["images/sparse.png"]


def test_captions_need_neither_composer_nor_streaming(here):
    """Their imports take longer than a caption."""
    words = ["model", "photo.jpg", "out=captions.jsonl", "max_new_tokens=4", "progress=false"]
    code = f"""if True:
        import sys
        from composer_prior.commands.cli import main
        try:
            main(["caption", *{words}])
        except SystemExit as end:
            assert not end.code
        from composer_prior import load
        load("model")
        print(sorted({{"composer", "streaming", "matplotlib", "timm"}} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert json.loads(Path("captions.jsonl").read_text())["caption"] is not None
