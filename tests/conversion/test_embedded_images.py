"""Images that a list holds itself, as base64 in any of its forms, and names in two Unicode forms."""

import base64
import csv
import json
import textwrap
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from conversion.test_field import IMAGE, captions, items, jsonl, pairs, picture, rejections, tar_bytes, write
from streaming.base.local import LocalDataset

from composer_prior.conversion.convert import convert_captions
from composer_prior.conversion.sources import open_source, read_image

BASE64 = base64.b64encode(IMAGE).decode()
LARGE = base64.b64encode(picture(200, 300)).decode()
URL_SAFE = base64.urlsafe_b64encode(IMAGE).decode()
FORMS = {
    "plain": BASE64,
    "without padding": BASE64.rstrip("="),
    "url-safe": URL_SAFE.rstrip("="),
    "lines": "\r\n".join(textwrap.wrap(BASE64, 76)),
    "data URI": f"data:image/png;base64,{BASE64}",
    "data URI in capitals": f"DATA:image/png;charset=x;BASE64, {BASE64}",
    "data URI with escapes": f"data:image/png;base64,{quote(BASE64, safe='')}",
    "data URI of bytes": f"data:image/png,{quote(IMAGE)}",
    "bytes": {"bytes": BASE64},
    "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    "OpenAI": {"url": f"data:image/png;base64,{BASE64}"},
}


@pytest.mark.parametrize("form", FORMS)
def test_base64_in_any_form_is_the_image(form, tmp_path):
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": FORMS[form], "caption": "a tile"})})
    assert convert_captions(source, tmp_path / "out", processes=1).samples == 1
    assert LocalDataset(str(tmp_path / "out"))[0]["image"] == IMAGE


@pytest.mark.parametrize("part", ["Anthropic", "OpenAI"])
def test_base64_in_a_conversation(part, tmp_path):
    shown = FORMS[part] if part == "Anthropic" else {"type": "image_url", "image_url": FORMS[part]}
    turns = [{"role": "user", "content": [{"type": "text", "text": "Describe."}, shown]}]
    turns.append({"role": "assistant", "content": "a tile"})
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"messages": turns})})
    convert_captions(source, tmp_path / "out", processes=1)
    assert (LocalDataset(str(tmp_path / "out"))[0]["image"], captions(tmp_path / "out")) == (IMAGE, ["a tile"])


@pytest.mark.parametrize("form", ["csv", "json", "coco"])
def test_base64_in_every_list(form, tmp_path):
    (tmp_path / "in").mkdir()
    uri = FORMS["data URI"]
    if form == "csv":
        with open(tmp_path / "in" / "captions.csv", "w", newline="") as file:
            csv.writer(file).writerows([["image", "caption"], [uri, "a tile"]])
    entries = [{"image": uri, "caption": "a tile"}]
    coco = {"images": [{"id": 1, "file_name": uri}], "annotations": [{"image_id": 1, "caption": "a tile"}]}
    if form != "csv":
        (tmp_path / "in" / "captions.json").write_text(json.dumps(entries if form == "json" else coco))
    assert open_source(tmp_path / "in").format == form
    assert convert_captions(tmp_path / "in", tmp_path / "out", processes=1).samples == 1


CUT = {
    "cut": (LARGE[: len(LARGE) // 2], "truncated image"),
    "cut within four": (f"data:image/png;base64,{LARGE[:201]}", "truncated image"),
    "elided": (LARGE[:300] + "...", "undecodable image"),
    "no image": (base64.b64encode(b"a text " * 99).decode(), "undecodable image"),
    "a page": (base64.b64encode(b"<html>" + b" " * 999).decode(), "HTML page"),
    "nothing": ("data:image/png;base64,", "empty image"),
    "a long name": ("a name " * 50, "unreadable file"),
}


@pytest.mark.parametrize("case", CUT)
def test_what_is_cut_is_said_in_few_words(case, tmp_path):
    image, reason = CUT[case]
    entries = {"image": image, "caption": "cut"}, {"image": BASE64, "caption": "a tile"}
    source = write(tmp_path / "in", {"captions.jsonl": jsonl(*entries)})
    convert_captions(source, tmp_path / "out", processes=1, max_rejected=1)
    (line,) = rejections(tmp_path / "out")
    assert (line["reason"], line["source"]) == (reason, "captions.jsonl:1")
    assert len(json.dumps(line)) < 500


def test_paths_are_no_base64(tmp_path):
    name = "a" * 60 + "/" + "b" * 60 + "/9j/iVBORw0KGgo"
    source = write(tmp_path / "in", {name: IMAGE, "captions.jsonl": jsonl({"image": name, "caption": "a tile"})})
    assert convert_captions(source, tmp_path / "out", processes=1).samples == 1


NFC, NFD = (unicodedata.normalize(form, "dossiér/café한") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("listed", "there"), [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
@pytest.mark.parametrize("below", ["", "images/"])
@pytest.mark.parametrize("absolute", [False, True])
def test_names_are_found_in_either_unicode_form(listed, there, below, absolute, tmp_path):
    name = str(tmp_path / "in" / below / f"{listed}.png") if absolute else f"{listed}.png"
    lines = jsonl({"image": name, "caption": "a tile"})
    source = write(tmp_path / "in", {f"{below}{there}.png": IMAGE, "captions.jsonl": lines})
    assert convert_captions(source, tmp_path / "out", processes=1).samples == 1


def test_two_files_of_one_text_are_told_apart_or_rejected(tmp_path):
    forms = ["\u1e69", "s\u0323\u0307", "s\u0307\u0323"]  # one letter in three spellings
    entries = [{"image": f"{form}.png", "caption": form} for form in forms]
    source = write(tmp_path / "in", {f"{form}.png": picture(n) for n, form in enumerate(forms[:2])})
    write(source, {"captions.jsonl": jsonl(*entries)})
    convert_captions(source, tmp_path / "out", processes=1, max_rejected=1)
    data = LocalDataset(str(tmp_path / "out"))
    assert [data[n]["image"] for n in range(len(data))] == [picture(0), picture(1)]
    assert [line["reason"] for line in rejections(tmp_path / "out")] == ["ambiguous name"]


def test_members_of_two_unicode_forms_are_one_sample(tmp_path):
    source = write(tmp_path / "in", {"0.tar": tar_bytes([(f"{NFC}.png", IMAGE), (f"{NFD}.txt", b"a tile")])})
    assert [item.captions for item in items(source)] == [("a tile",)]
    apart = [(f"{NFC}.png", IMAGE), *pairs("b"), (f"{NFD}.txt", b"a tile")]
    found = items(write(tmp_path / "apart", {"0.tar": tar_bytes(apart)}))
    assert "one Unicode form" in found[0].note
    assert "one Unicode form" in found[2].detail


def test_a_link_does_not_lead_out_by_its_other_form(tmp_path):
    write(tmp_path, {"secret.png": IMAGE})
    source = write(tmp_path / "in", {"captions.jsonl": jsonl({"image": f"{NFC[-2:]}.png", "caption": "a tile"})})
    Path(source, f"{unicodedata.normalize('NFD', NFC[-2:])}.png").symlink_to(tmp_path / "secret.png")
    (item,) = items(source)
    with pytest.raises(match="symbolic link"):
        read_image(source.resolve(), item.image, 1 << 20)
