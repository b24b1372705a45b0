"""A conversion is right, says what it rejected, and cannot be told from one that was killed and resumed."""

import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from common.commands import convert as main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import MDSWriter
from streaming.base.hashing import get_hash
from streaming.base.local import LocalDataset

from composer_prior.conversion import convert
from composer_prior.conversion.convert import (
    ConversionError,
    ConversionOptions,
    ConversionSummary,
    convert_captions,
)
from composer_prior.data.images import ImageError, check_image, decode_rgb, reencode_image
from composer_prior.data.locks import locked
from composer_prior.data.mds import ShardWriter

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_captions.py"


def encoded(form: str = "JPEG", size=(48, 32), mode: str = "RGB", seed: int = 0, **options) -> bytes:
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, noise).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=50)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def write_source(folder: Path, samples, name: str = "captions.jsonl") -> Path:
    """A folder with an image file for each (bytes, caption), or for each (bytes, dict of more fields)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as lines:
        for number, (image, caption) in enumerate(samples):
            (folder / f"{number}.img").write_bytes(image)
            more = caption if isinstance(caption, dict) else {"caption": caption}
            lines.write(json.dumps({"image": f"{number}.img", **more}) + "\n")
    return folder


def simple_source(folder: Path, count: int) -> Path:
    return write_source(folder, [(encoded(seed=number), f"picture {number}") for number in range(count)])


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, str]:
    """A digest of each file, hidden ones included."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_streaming_reads_what_was_converted(tmp_path):
    images = [encoded(seed=number) for number in range(30)]
    source = write_source(tmp_path / "in", [(image, f"picture {n} \u2603") for n, image in enumerate(images)])
    summary = convert_captions(source, tmp_path / "out", size_limit="6kb", unit_samples=8, processes=1)
    data = LocalDataset(str(tmp_path / "out"))
    assert [data[n] for n in range(30)] == [
        {"image": image, "caption": f"picture {n} \u2603"} for n, image in enumerate(images)
    ]
    assert (summary.read, summary.captions, summary.samples, summary.rejected) == (30, 30, 30, 0)
    shards = json.loads((tmp_path / "out" / "index.json").read_text())["shards"]
    assert len(shards) == summary.shards > 4
    for shard in shards:
        raw = shard["raw_data"]
        file = (tmp_path / "out" / raw["basename"]).read_bytes()
        assert raw["hashes"] == {"xxh64": get_hash("xxh64", file)}
        assert len(file) == raw["bytes"] <= 6 * 1024
    assert (tmp_path / "out" / "rejected.jsonl").read_bytes() == b""
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.suffix != ".mds") == [".json"] * 2 + [
        ".jsonl"
    ]


def test_shards_are_those_of_mds_writer(tmp_path):
    columns = {"image": "bytes", "caption": "str", "image_related_spans": "json"}
    samples = [
        {"image": bytes(n * 37 % 900), "caption": "é" * (n % 9), "image_related_spans": [[0, n]] if n % 3 else None}
        for n in range(200)
    ]
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), hashes=["xxh64"], size_limit=5000) as theirs:
        for sample in samples:
            theirs.write(sample)
    (tmp_path / "ours").mkdir()
    ours = ShardWriter(tmp_path / "ours", "shard", columns, 5000)
    for sample in samples:
        ours.write(sample)
    ours.finish()
    index = json.loads((tmp_path / "theirs" / "index.json").read_text())["shards"]
    assert len(index) == len(ours.shards) > 10
    for their, our in zip(index, ours.shards, strict=True):
        name = our["raw_data"].pop("basename")
        assert (tmp_path / "ours" / name).read_bytes() == (
            tmp_path / "theirs" / their["raw_data"].pop("basename")
        ).read_bytes()
        assert our == their


def test_several_captions_become_samples_or_a_choice(tmp_path):
    image = encoded()
    spans = [[[0, 1]], [], [[0, 3]]]
    source = write_source(
        tmp_path / "in", [(image, {"captions": ["one", "", "three"], "image_related_spans": spans}), (image, "four")]
    )
    every = convert_captions(source, tmp_path / "all", processes=1, max_rejected=0.5)
    data = LocalDataset(str(tmp_path / "all"))
    found = [data[n] for n in range(len(data))]
    assert [(s["caption"], s["image_related_spans"]) for s in found] == [
        ("one", [[0, 1]]),
        ("three", [[0, 3]]),
        ("four", None),
    ]
    assert (every.read, every.captions, every.samples, every.rejected) == (4, 3, 3, 1)
    assert rejected(tmp_path / "all")[0]["id"] == "0.img#1"
    drawn = convert_captions(source, tmp_path / "sample", captions="sample", processes=1, max_rejected=0.5)
    data = LocalDataset(str(tmp_path / "sample"))
    assert [data[n]["captions"] for n in range(2)] == [["one", "three"], ["four"]]
    assert [data[n]["image_related_spans"] for n in range(2)] == [[[[0, 1]], [[0, 3]]], [None]]
    assert (drawn.read, drawn.captions, drawn.samples, drawn.rejected) == (4, 3, 2, 1)


BAD = {
    "truncated image": (encoded()[:-200], "x"),
    "undecodable image": (b"this is no image", "x"),
    "empty image": (b"", "x"),
    "SVG image": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "x"),
    "decompression bomb": (bomb(10_000), "x"),
    "image too large": (encoded("BMP", (200, 200)), "x"),
    "empty caption": (encoded(), " \n\t"),
    "missing caption": (encoded(), {"caption": None}),
    "caption too long": (encoded(), "x" * 1001),
    "caption is not text": (encoded(), 7),
    "invalid UTF-8": (encoded(), "\ud800"),
    "missing file": (encoded(), {"image": "none.img", "caption": "x"}),
    "path leaves the source": (encoded(), {"image": "../in/0.img", "caption": "x"}),
    "bad spans": (encoded(), {"caption": "x", "image_related_spans": [[0, 2]]}),
    "duplicate key": (encoded(), {"image": "fine.img", "caption": "fine"}),
}


def test_every_rejected_sample_has_a_line(tmp_path):
    source = write_source(
        tmp_path / "in",
        [(encoded(), {"image": "fine.img", "caption": "fine", "image_related_spans": [[0, 4]]}), *BAD.values()],
    )
    (source / "fine.img").write_bytes(encoded())
    summary = convert_captions(source, tmp_path / "out", max_rejected=0.99, max_caption_chars=1000,
                               max_image_bytes=100_000, processes=1)  # fmt: skip
    lines = rejected(tmp_path / "out")
    assert [line["reason"] for line in lines] == list(BAD)
    assert [line["source"] for line in lines] == [f"captions.jsonl:{number + 2}" for number in range(len(BAD))]
    assert all(set(line) == {"id", "reason", "source", "detail"} and line["id"] for line in lines)
    assert summary.reasons == dict.fromkeys(sorted(BAD), 1)
    assert (summary.read, summary.rejected) == (len(BAD) + 1, len(BAD))
    assert "1 bad spans" in str(summary)
    data = LocalDataset(str(tmp_path / "out"))
    assert [data[n]["caption"] for n in range(len(data))] == ["fine"]


def test_too_many_rejected_leave_no_index_and_can_be_allowed_later(tmp_path):
    samples = [(encoded() if number % 3 else b"no image", "x") for number in range(12)]
    source = write_source(tmp_path / "in", samples)
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(ConversionError, match=r"4 of 12 captions were rejected \(4 undecodable image\)"):
            convert_captions(source, out, processes=1)
        assert len(rejected(out)) == 4
        assert not (out / "index.json").exists()
    summary = convert_captions(source, out, max_rejected=0.34, processes=1)
    assert (summary.samples, summary.rejected) == (8, 4)
    assert len(LocalDataset(str(out))) == 8


def test_an_empty_source_and_one_without_any_good_sample_end_in_an_error(tmp_path):
    with pytest.raises(ConversionError, match="holds no captions"):
        convert_captions(write_source(tmp_path / "none", []), tmp_path / "a", processes=1)
    with pytest.raises(ConversionError, match="1 of 1 captions were rejected"):
        convert_captions(write_source(tmp_path / "bad", [(b"", "x")]), tmp_path / "b", processes=1, max_rejected=1.0)


def test_output_does_not_depend_on_the_number_of_processes(tmp_path):
    samples = [(encoded(seed=n) if n % 20 else b"bad", f"picture {n}") for n in range(200)]
    source = write_source(tmp_path / "in", samples)
    for processes in (1, 2, 5):
        convert_captions(source, tmp_path / str(processes), processes=processes, unit_samples=7)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_a_complete_conversion_is_left_alone(tmp_path):
    source, out = simple_source(tmp_path / "in", 5), tmp_path / "out"
    first = convert_captions(source, out, processes=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert_captions(source, out, processes=2, max_rejected=0.5) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ConversionError, match="begun with captions=all, not sample"):
        convert_captions(source, out, captions="sample")
    with pytest.raises(ConversionError, match="another source"):
        convert_captions(simple_source(tmp_path / "other", 5), out)


def test_other_folders_are_left_alone(tmp_path):
    source = simple_source(tmp_path / "in", 2)
    before = contents(source)
    with pytest.raises(ConversionError, match="holds something else"):
        convert_captions(source, source)
    assert contents(source) == before
    assert not (source / ".convert").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="this is a file"):
        convert_captions(source, tmp_path / "file")
    with pytest.raises(ConversionError, match="ftp:// is unknown"):
        convert_captions(source, "ftp://host/data")


def test_two_conversions_do_not_write_to_one_place(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_LOCK_SECONDS", 0)
    source, options = simple_source(tmp_path / "in", 2), ConversionOptions(processes=1)
    with (
        locked(tmp_path / "out/.convert/lock"),
        pytest.raises(ConversionError, match="another conversion is writing here"),
    ):
        convert_captions(source, tmp_path / "out", options)


def test_a_unit_that_changed_is_converted_again(tmp_path):
    source, out = simple_source(tmp_path / "in", 20), tmp_path / "out"
    with pytest.raises(ConversionError):
        convert_captions(write_source(tmp_path / "in", [(b"bad", "x")] * 20), out, processes=1, unit_samples=4)
    simple_source(source, 20)
    assert convert_captions(source, out, processes=1, unit_samples=4).samples == 20
    convert_captions(source, tmp_path / "fresh", processes=1, unit_samples=4)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_and_resumed_it_is_the_same(processes, tmp_path):
    samples = [(encoded(seed=n) if n % 30 else b"bad", f"picture {n}") for n in range(600)]
    source = write_source(tmp_path / "in", samples)
    options = ["unit_samples=10", "check=full", "size_limit=40kb"]
    assert main([str(source), str(tmp_path / "whole"), *options, "processes=2", "progress=false"]) == 0
    moments, out = random.Random(processes), tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(source), str(out), *options, f"processes={processes}"]
    units, kills = out / ".convert" / "units", 0
    for goal in sorted(moments.sample(range(1, 55), 3)):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while running.poll() is None and (len(list(units.glob("*.json"))) if units.exists() else 0) < goal:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        kills += running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert kills >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(tmp_path / "whole")


def test_stopped_before_any_file_is_put_in_place_and_resumed_it_is_the_same(tmp_path, monkeypatch):
    source, options = simple_source(tmp_path / "in", 8), {"unit_samples": 3, "size_limit": "4kb", "processes": 1}
    convert_captions(source, tmp_path / "whole", **options)
    really, stops = os.replace, 0
    for last in range(1000):
        steps = iter(range(last))

        def replace(old, new, steps=steps):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            really(old, new)

        out = tmp_path / f"out{last}"
        monkeypatch.setattr(os, "replace", replace)
        try:
            convert_captions(source, out, **options)
        except KeyboardInterrupt:
            stops += 1
        else:
            break
        monkeypatch.setattr(os, "replace", really)
        assert not (out / "index.json").exists()
        convert_captions(source, out, **options)
        assert contents(out) == contents(tmp_path / "whole"), last
    assert stops >= 10


def test_the_progress_bar_shows_both_speeds(tmp_path, capsys):
    source = simple_source(tmp_path / "in", 40)
    for processes in (1, 2):
        convert_captions(source, tmp_path / str(processes), processes=processes, unit_samples=4, progress=True)
        shown = capsys.readouterr().err
        assert "samples/s" in shown
        assert "MB/s" in shown


def test_a_process_that_dies_ends_the_conversion_with_one_line(tmp_path, monkeypatch, capsys):
    killed = "composer_prior.conversion.distribute.convert_unit"
    monkeypatch.setattr(killed, lambda task, number, unit: os.kill(os.getpid(), signal.SIGKILL))
    assert main([str(simple_source(tmp_path / "in", 8)), str(tmp_path / "out"), "processes=2", "unit_samples=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a process died" in line


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(source, out):
        raise KeyboardInterrupt

    monkeypatch.setattr("composer_prior.commands.convert.convert_captions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["source", "out"])
    assert capsys.readouterr().err == "Run the same command again to go on.\n"


def test_processes_end_with_their_parent(tmp_path):
    source = simple_source(tmp_path / "in", 400)
    command = [sys.executable, str(SCRIPT), str(source), str(tmp_path / "out"), "processes=2", "unit_samples=2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    pids: list[str] = []
    while running.poll() is None and len(pids) < 2:
        pids = children.read_text().split()
        time.sleep(0.001)
    running.kill()
    running.wait()
    assert len(pids) >= 2
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and _cmdline(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


# Images ---------------------------------------------------------------------------------------------------------------

WHOLE = {
    "baseline": encoded(),
    "progressive": encoded(progressive=True),
    "restarts": encoded(restart_marker_rows=1),
    "grey": encoded(mode="L"),
    "CMYK": encoded(mode="CMYK"),
    "PNG": encoded("PNG"),
    "palette": encoded("PNG", mode="P"),
    "WebP": encoded("WEBP"),
    "GIF": encoded("GIF"),
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "animated GIF": animated("GIF"),
    "animated WebP": animated("WEBP"),
    "animated PNG": animated("PNG"),
}


def accepted(data: bytes, check: str) -> bool:
    """Whether the check accepts; anything but an ImageError fails the test."""
    try:
        check_image(data, check)
    except ImageError:
        return False
    return True


@pytest.mark.parametrize("name", WHOLE)
def test_whole_images_pass_and_become_rgb(name):
    assert accepted(WHOLE[name], "structure")
    assert accepted(WHOLE[name], "full")
    image = decode_rgb(WHOLE[name])
    assert (image.mode, image.size) == ("RGB", (16, 16) if "animated" in name else (48, 32))


def test_the_first_frame_stands_for_an_animation():
    for form in ("GIF", "PNG"):
        assert decode_rgb(animated(form)).getpixel((8, 8)) == (255, 0, 0)


def test_transparency_is_laid_on_white_and_images_stand_upright():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encoded(exif=exif)).size == (32, 48)


@pytest.mark.parametrize("name", ["baseline", "progressive", "restarts", "PNG", "WebP", "GIF", "animated WebP"])
def test_an_image_cut_anywhere_is_caught(name):
    data = WHOLE[name]
    for length in range(0, len(data), 1 if len(data) < 4000 else 7):
        cut = data[:length]
        assert accepted(cut, "structure") <= accepted(cut, "full"), length
        if length < len(data) - 32:  # all pixels may be there without the last few bytes of a file
            assert not accepted(cut, "structure"), length


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1))
def test_flipped_bits_never_crash_a_check(name, flips):
    data = bytearray(WHOLE[name])
    for place, value in flips:
        data[place % len(data)] ^= value
    full = accepted(bytes(data), "full")
    assert accepted(bytes(data), "structure") >= full, "what decodes is never refused"
    with suppress(ImageError):
        assert decode_rgb(bytes(data)).mode == "RGB"


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF89a", b"BM", b"II*\0"]),
)
def test_random_bytes_never_crash_a_check(data, magic):
    assert accepted(magic + data, "structure") >= accepted(magic + data, "full")


def test_a_jpeg_with_more_behind_its_end_is_decoded_whole():
    data = encoded(size=(256, 256))
    assert accepted(data + bytes(100), "structure")
    assert not accepted(data[:1000] + bytes(100), "structure")


def test_bombs_are_refused_from_their_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a user's own setting does not matter
    for side in (9_500, 30_000):
        with pytest.raises(ImageError, match="decompression bomb"):
            check_image(bomb(side))


def test_resize_and_reencode(tmp_path):
    large, small = encoded(size=(300, 200)), encoded(size=(40, 60))
    assert reencode_image(small, 100, None) is small
    shrunk = Image.open(io.BytesIO(reencode_image(large, 150, None)))
    assert (shrunk.format, shrunk.size) == ("JPEG", (150, 100))
    png = Image.open(io.BytesIO(reencode_image(encoded(mode="CMYK"), None, "png")))
    assert (png.format, png.mode, png.size) == ("PNG", "RGB", (48, 32))
    source = write_source(tmp_path / "in", [(large, "x"), (small, "y")])
    convert_captions(source, tmp_path / "out", resize=100, reencode="webp:80", processes=1)
    data = LocalDataset(str(tmp_path / "out"))
    found = [Image.open(io.BytesIO(data[n]["image"])) for n in range(2)]
    assert [(image.format, image.size) for image in found] == [("WEBP", (100, 67)), ("WEBP", (40, 60))]


# Captions -------------------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(), max_size=200)
ODD = ["\u202ethe end\u2069", "\x00\x1b[31m", "\ufeff", "👩‍👩‍👧", "a\u0301" * 50, "\ud800", "x" * 100_000, "\U0010ffff"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY_TEXT | st.sampled_from(ODD), min_size=1, max_size=8))
def test_any_caption_comes_out_as_it_went_in_or_is_rejected(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("any")
    source = write_source(folder / "in", [(encoded(), caption) for caption in captions])
    good = [
        c for c in captions if c.strip() and len(c) <= 32_768 and not any("\ud800" <= char <= "\udfff" for char in c)
    ]
    if not good:
        with pytest.raises(ConversionError):
            convert_captions(source, folder / "out", max_rejected=1.0, processes=1)
        return
    summary = convert_captions(source, folder / "out", max_rejected=1.0, processes=1)
    data = LocalDataset(str(folder / "out"))
    assert [data[n]["caption"] for n in range(len(data))] == good
    assert summary.rejected == len(rejected(folder / "out")) == len(captions) - len(good)


# The command line -----------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys):
    source = simple_source(tmp_path / "in", 3)
    assert main([str(source), str(tmp_path / "out"), "processes=1", "size_limit=1mb"]) == 0
    assert "3 captions read, 3 written as 3 samples in 1 shards" in capsys.readouterr().out
    assert main([str(source)]) == 2
    assert "usage: composer-prior convert SOURCE OUT [option=value ...]" in capsys.readouterr().err
    for word, message in {
        "caption=all": "caption is not an option. Did you mean 'captions'?",
        "captions=some": "captions='some' is not accepted: expected all or sample",
        "max_rejected=2": "max_rejected=2 is not accepted",
        "size_limit=64tb": "size_limit='64tb' is not accepted",
        "reencode=gif": "reencode='gif' is not accepted",
        "processes=0": "processes=0 is not accepted",
    }.items():
        assert main([str(source), str(tmp_path / "out"), word]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_script_without_a_main_guard_may_convert(tmp_path):
    source = simple_source(tmp_path / "in", 6)
    script = tmp_path / "script.py"
    script.write_text(
        "from composer_prior.conversion.convert import convert_captions\n"
        f"print(convert_captions({str(source)!r}, {str(tmp_path / 'out')!r}, processes=2, unit_samples=2).samples)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "6\n"


def test_the_conversion_does_not_import_torch():
    code = "import sys, composer_prior.conversion.convert; print(*{'torch', 'streaming', 'composer'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == ""


def test_summary_of_nothing_has_words():
    assert str(ConversionSummary()).startswith("0 captions read")
