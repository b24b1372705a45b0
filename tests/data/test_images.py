"""What an image is: pixels of any mode, no refusal over metadata, one verdict at conversion and at reading."""

import io
import json
import logging
import re
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from common.models import patch_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from streaming import MDSWriter

from composer_prior import StreamingCaptionDataset
from composer_prior.conversion.convert import convert_captions
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import BadSampleError, caption_data_spec
from composer_prior.data.images import MAX_ASPECT_RATIO, ImageError, check_image, decode_rgb, reencode_image

MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
RAMP_16 = RAMP.astype(np.uint16) * 257
NOISE = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour, pixels, *more):
    """A PNG as Pillow writes none: any depth, any chunks before the pixels."""
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in pixels]
    else:
        bits = (pixels[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + data + chunk(b"IEND", b"")


def tiff(pixels, photometric=1, sample_format=1, bits=None):
    """A grey TIFF as Pillow writes none."""
    data = pixels.tobytes() + bytes(pixels.nbytes % 2)
    height, width = len(pixels), 256
    tags = {256: width, 257: height, 258: bits or pixels.itemsize * 8, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: pixels.nbytes, 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def twelve_bits(values):
    even, odd = values[:, 0::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=-1)
    return packed.reshape(len(values), -1).astype(np.uint8)


def steps(depth):
    return np.tile(np.arange(1 << depth).repeat(256 >> depth), (8, 1))


# The pixels -----------------------------------------------------------------------------------------------------------

WHITE_16 = np.full_like(RAMP_16, 65535)
RAMPS = {
    "PNG 16 bits": encoded(RAMP_16),
    "PNG 16 bits, a transparent value": png(16, 0, RAMP_16, chunk(b"tRNS", b"\xff\xff")),
    "PNG 16 bits with alpha": png(16, 4, np.dstack([RAMP_16, WHITE_16])),
    "PNG RGB 16 bits": png(16, 2, np.dstack([RAMP_16] * 3)),
    "PNG RGBA 16 bits": png(16, 6, np.dstack([RAMP_16] * 3 + [WHITE_16])),
    "PNG 1 bit": png(1, 0, steps(1)),
    "PNG 2 bits": png(2, 0, steps(2)),
    "PNG 4 bits": png(4, 0, steps(4)),
    "PNG L": encoded(RAMP),
    "PNG LA": encoded(Image.fromarray(RAMP).convert("LA")),
    "TIFF 12 bits": tiff(twelve_bits(RAMP_16 >> 4), bits=12),
    "TIFF 16 bits": encoded(RAMP_16, "TIFF"),
    "TIFF 16 bits, compressed": encoded(RAMP_16, "TIFF", compression="tiff_lzw"),
    "TIFF 16 bits, big-endian": encoded(Image.frombytes("I;16B", (256, 8), RAMP_16.astype(">u2").tobytes()), "TIFF"),
    "TIFF 16 bits, white is zero": tiff(65535 - RAMP_16, photometric=0),
    "TIFF 16 bits, signed": tiff((RAMP_16 // 2).astype("<i2"), sample_format=2),
    "TIFF 32 bits, 8 used": encoded(RAMP.astype(np.int32), "TIFF"),
    "TIFF 32 bits, 16 used": tiff(RAMP_16.astype("<u4")),
    "TIFF 32 bits, 31 used": encoded((RAMP * (2**31 - 1.0) / 255).astype(np.int32), "TIFF"),
    "TIFF float to 1": encoded((RAMP / 255).astype(np.float32), "TIFF"),
    "TIFF float to 255": encoded(RAMP.astype(np.float32), "TIFF"),
    "TIFF float to 65535": encoded(RAMP_16.astype(np.float32), "TIFF"),
    "TIFF float, white is zero": tiff((1 - RAMP / 255).astype("<f4"), photometric=0, sample_format=3),
    "TIFF LA": encoded(Image.fromarray(RAMP).convert("LA"), "TIFF"),
    "TIFF CMYK": encoded(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "TIFF"),
    "TIFF YCbCr": encoded(Image.fromarray(RAMP).convert("RGB").convert("YCbCr"), "TIFF", compression="jpeg"),
    "JPEG CMYK": encoded(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "JPEG", quality=100),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_from_black_to_white_stays_one(name):
    check_image(RAMPS[name])
    check_image(RAMPS[name], "full")
    pixels = np.asarray(decode_rgb(RAMPS[name])).astype(float)
    assert pixels.shape == (8, 256, 3)
    assert pixels.mean() == pytest.approx(127.5, abs=1)
    assert (np.diff(pixels.mean((0, 2))) >= 0).all()
    assert pixels[:, 0].max() <= 2
    assert pixels[:, -1].min() >= 253


def test_lightness_of_lab_stays_monotone_and_grey():
    pixels = np.dstack([RAMP, RAMP * 0, RAMP * 0])
    found = np.asarray(decode_rgb(encoded(Image.frombytes("LAB", (256, 8), pixels.tobytes()), "TIFF"))).astype(float)
    assert (np.diff(found.mean((0, 2))) >= 0).all()
    assert found.std(2).max() <= 2
    assert 110 < found.mean() < 135  # L* is not linear in sRGB


@pytest.mark.parametrize("low_and_high", [(-1.0, 0.5), (0.0, 1e6), (0.0, np.inf), (0.0, np.nan), (-3, 70), (0, -1)])
def test_values_of_no_known_range_are_refused_and_not_shown_black_or_white(low_and_high):
    image = np.array([low_and_high] * 2, np.float32 if isinstance(low_and_high[0], float) else np.int32)
    for read in (check_image, decode_rgb):
        with pytest.raises(ImageError, match=r"^unknown range of values: \S+ to \S+, expected 0 to "):
            read(encoded(image, "TIFF"))


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (png(16, 0, RAMP_16, chunk(b"tRNS", struct.pack(">H", 40 * 257))), 40),
        (png(16, 2, np.dstack([RAMP_16] * 3), chunk(b"tRNS", struct.pack(">HHH", *[40 * 257] * 3))), 40),
        (png(8, 0, RAMP, chunk(b"tRNS", struct.pack(">H", 40))), 40),
        (png(4, 0, steps(4), chunk(b"tRNS", struct.pack(">H", 3))), 48),
        (png(2, 0, steps(2), chunk(b"tRNS", struct.pack(">H", 1))), 64),
        (png(1, 0, steps(1), chunk(b"tRNS", struct.pack(">H", 1))), 128),
    ],
)
def test_a_transparent_colour_is_white_at_every_depth(data, at):
    pixels = np.asarray(decode_rgb(data))[0, :, 0]
    assert pixels[at] == 255
    assert pixels[at - 1] < 255
    assert (pixels == 255).sum() <= 130  # that colour alone, and white itself


# Metadata -------------------------------------------------------------------------------------------------------------

EXIF = Image.Exif()
EXIF[274] = 6
EXIF[305] = "a program"
EXIF.get_ifd(0x8769)[36867] = "2020:01:01 00:00:00"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ICC = bytes(range(128)) * 3
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("comment", "hello", zip=True)
TEXT.add_itxt("XML:com.adobe.xmp", XMP.decode())
PALETTE = Image.fromarray(NOISE).convert("P", palette=Image.Palette.ADAPTIVE, colors=7)
FRAMES = {"save_all": True, "append_images": [Image.fromarray(NOISE).rotate(90)]}
ALPHA = Image.fromarray(np.dstack([NOISE, NOISE[..., 0]]))
GREY_16 = np.random.default_rng(1).integers(0, 65535, (12, 17), dtype=np.uint16)
IMAGES = {
    "JPEG": encoded(NOISE, "JPEG", exif=EXIF, icc_profile=ICC, comment=b"hi"),
    "JPEG progressive": encoded(NOISE, "JPEG", exif=EXIF, progressive=True),
    "PNG": encoded(NOISE, exif=EXIF, icc_profile=ICC, pnginfo=TEXT, dpi=(72, 72)),
    "PNG palette": encoded(PALETTE, exif=EXIF, transparency=bytes([0, 100, 255, 3])),
    "PNG alpha": encoded(ALPHA),
    "PNG key": encoded(NOISE[..., 0], transparency=7),
    "PNG 16 bits": encoded(GREY_16, exif=EXIF),
    "PNG animated": encoded(NOISE, **FRAMES),
    "WebP": encoded(NOISE, "WEBP", exif=EXIF, icc_profile=ICC, xmp=XMP),
    "WebP alpha": encoded(ALPHA, "WEBP", lossless=True),
    "WebP animated": encoded(NOISE, "WEBP", **FRAMES),
    "GIF": encoded(PALETTE, "GIF", transparency=3, comment=b"hi"),
    "GIF animated": encoded(PALETTE, "GIF", **FRAMES),
    "BMP": encoded(NOISE, "BMP"),
    "BMP palette": encoded(PALETTE, "BMP"),
    "TIFF": encoded(NOISE, "TIFF", exif=EXIF),
    "TIFF compressed": encoded(NOISE, "TIFF", exif=EXIF, compression="tiff_lzw"),
    "TIFF JPEG": encoded(NOISE, "TIFF", compression="jpeg"),
    "TIFF 16 bits": encoded(GREY_16, "TIFF", exif=EXIF),
    "TIFF float": encoded((GREY_16 / 65535).astype(np.float32), "TIFF"),
}


def verdict(check, *arguments):
    """The reason of refusal, or None; anything but an ImageError fails the test."""
    try:
        check(*arguments)
    except ImageError as error:
        return error.reason
    return None


def mended(data):
    """A PNG with the right checksums."""
    data, position = bytearray(data), 8
    while (end := position + 12 + int.from_bytes(data[position : position + 4], "big")) <= len(data):
        data[end - 4 : end] = struct.pack(">I", zlib.crc32(data[position + 4 : end - 4]))
        position = end
    return bytes(data)


def test_every_image_is_accepted_as_it_is():
    for data in IMAGES.values():
        assert verdict(check_image, data) is verdict(check_image, data, "full") is verdict(decode_rgb, data) is None


@MANY
@given(
    st.sampled_from(sorted(IMAGES)),
    st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=6),
    st.floats(0.5, 1) | st.just(1.0),
    st.booleans(),
)
def test_conversion_and_reading_agree_on_every_image(name, changes, kept, mend):
    data = bytearray(IMAGES[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    data = bytes(data[: int(kept * len(data))])
    if mend and name.startswith("PNG"):
        data = mended(data)
    full = verdict(check_image, data, "full")
    assert verdict(decode_rgb, data) == full
    assert full or not verdict(check_image, data), "what decodes is never refused"
    with suppress(ImageError):
        image = decode_rgb(data)
        assert np.asarray(image).shape == (image.height, image.width, 3)


CHUNKS = {
    b"eXIf": EXIF.tobytes()[6:],
    b"iCCP": b"ICC\0\0" + zlib.compress(ICC),
    b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + XMP,
    b"tEXt": b"Raw profile type exif\0\nexif\n 20\n" + EXIF.tobytes().hex().encode(),
    b"zTXt": b"comment\0\0" + zlib.compress(bytes(1 << 21)),  # longer than Pillow accepts
    b"pHYs": struct.pack(">IIB", 1, 1, 1),
    b"tRNS": bytes(6),
    b"gAMA": bytes(4),
    b"cHRM": bytes(32),
    b"acTL": struct.pack(">II", 2, 0),
    b"tIME": bytes(7),
}
SEGMENTS = {
    "EXIF": (0xE1, EXIF.tobytes()),
    "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
    "ICC": (0xE2, b"ICC_PROFILE\0\1\1" + ICC),
    "MPF": (0xE2, b"MPF\0II*\0\x08\0\0\0" + bytes(60)),
    "IPTC": (0xED, b"Photoshop 3.0\0008BIM\4\4\0\0\0\0\0\6\x1c\2\0\0\2\0\4"),
}


def broken(draw, content):
    """Other bytes, or the same ones cut and changed."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=60))
    changed = bytearray(content[: draw(st.integers(0, len(content)))])
    for place, value in draw(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=4)):
        if changed:
            changed[place % len(changed)] = value
    return bytes(changed)


def assert_the_same_picture(data, plain):
    """Upright or turned, whatever an orientation still says."""
    assert verdict(check_image, data) is None
    assert verdict(check_image, data, "full") is None
    found, expected = np.asarray(decode_rgb(data)), np.asarray(decode_rgb(plain))
    assert sorted(found.shape) == sorted(expected.shape)
    assert found.mean() == pytest.approx(expected.mean(), abs=12)


@settings(MANY, max_examples=400)
@given(st.data(), st.sampled_from(sorted(CHUNKS)), st.booleans())
def test_a_broken_chunk_costs_no_png(data, kind, after):
    plain = encoded(NOISE)
    place = len(plain) - 12 if after else 33
    junk = chunk(kind, broken(data.draw, CHUNKS[kind]))
    assert_the_same_picture(plain[:place] + junk + plain[place:], plain)


@settings(MANY, max_examples=400)
@given(st.data(), st.sampled_from(sorted(SEGMENTS)))
def test_a_broken_segment_costs_no_jpeg(data, name):
    plain = encoded(NOISE, "JPEG")
    marker, content = SEGMENTS[name]
    junk = broken(data.draw, content)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(junk) + 2) + junk
    assert_the_same_picture(plain[:2] + segment + plain[2:], plain)


@settings(MANY, max_examples=200)
@given(st.data(), st.sampled_from(["exif", "xmp", "icc_profile"]))
def test_broken_metadata_cost_no_webp(data, kind):
    content = {"exif": EXIF.tobytes(), "xmp": XMP, "icc_profile": ICC}[kind]
    junk = broken(data.draw, content) or b"?"
    assert_the_same_picture(encoded(NOISE, "WEBP", **{kind: junk}), encoded(NOISE, "WEBP"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("kind", "value", "turned"),
    [(3, 0, False), (3, 1, False), (3, 6, True), (3, 9, False), (2, 0x36, False), (99, 6, False)],
)
def test_an_orientation_that_says_nothing_turns_nothing(form, kind, value, turned):
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 274, kind, 1, value) + bytes(4)
    data = encoded(NOISE, form, exif=exif)
    assert verdict(check_image, data) is None
    assert decode_rgb(data).size == ((12, 17) if turned else (17, 12))


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (1, False), (6, True), (9, False)])
def test_an_orientation_of_a_tiff(orientation, turned):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(NOISE, "TIFF", exif=exif)
    assert verdict(check_image, data) is None
    assert decode_rgb(data).size == ((12, 17) if turned else (17, 12))


@pytest.mark.parametrize("index", [0, 6, 7, 200, 255])
def test_a_transparent_index_outside_the_palette_costs_no_gif(index):
    data = encoded(PALETTE, "GIF", transparency=3)
    place = data.index(b"\x21\xf9") + 6
    data = data[:place] + bytes([index]) + data[place + 1 :]
    assert verdict(check_image, data) is None
    assert decode_rgb(data).size == (17, 12)


@pytest.mark.parametrize("key", [b"", b"\0", bytes(256), bytes(300)])
def test_alphas_that_do_not_fit_the_palette_cost_no_png(key):
    data = encoded(PALETTE)
    place = data.index(b"IDAT") - 4
    assert verdict(check_image, data[:place] + chunk(b"tRNS", key) + data[place:]) is None
    assert decode_rgb(data[:place] + chunk(b"tRNS", key) + data[place:]).size == (17, 12)


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_no_metadata_survive_a_new_encoding(form):
    for data in (IMAGES["PNG"], IMAGES["PNG key"], IMAGES["WebP"], encoded(PALETTE, "GIF", comment=b"x" * 70_000)):
        again = Image.open(io.BytesIO(reencode_image(data, None, form)))
        assert not {"exif", "xmp", "icc_profile", "transparency"} & set(again.info)
        assert again.size == decode_rgb(data).size


# Size -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_extreme_aspect_ratio_is_refused_from_the_header(form):
    for size in ((4, 4 * MAX_ASPECT_RATIO), (4 * MAX_ASPECT_RATIO, 4)):
        assert verdict(check_image, encoded(Image.new("RGB", size), form)) is None
        assert decode_rgb(encoded(Image.new("RGB", size), form)).size == size
    for size in ((4, 4 * MAX_ASPECT_RATIO + 1), (1, 16_000)):
        data = encoded(Image.new("RGB", size), form)
        for check in ("structure", "full"):
            assert verdict(check_image, data, check) == "extreme aspect ratio"
        with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]} pixels, at most {MAX_ASPECT_RATIO} to 1"):
            decode_rgb(data)


@pytest.mark.parametrize("longest", [*range(1, 130, 3), 149, 150])
def test_shrinking_makes_no_aspect_ratio_extreme(longest):
    for size in ((5000, 100), (100, 5000), (300, 7), (200, 200)):
        small = decode_rgb(reencode_image(encoded(Image.new("RGB", size)), longest, "png"))
        assert max(small.size) == min(longest, max(size))


def test_an_image_too_long_for_its_new_format_is_refused():
    with pytest.raises(ImageError, match=r"^too long for the new format: 17000 x 400, webp"):
        reencode_image(encoded(Image.new("RGB", (17_000, 400))), None, "webp")


def source(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number}.img").write_bytes(image)
    lines = [json.dumps({"image": f"{number}.img", "caption": "a fox"}) for number in range(len(images))]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("options", [{}, {"check": "full"}, {"resize": 100}, {"reencode": "png"}])
def test_a_conversion_rejects_what_a_loader_would(tmp_path, options):
    images = [encoded(NOISE), encoded(Image.new("L", (1, 20_000))), b"<!DOCTYPE html><title>404</title>"]
    summary = convert_captions(
        source(tmp_path / "in", images), tmp_path / "out", max_rejected=1.0, processes=1, **options
    )
    assert summary.samples == 1
    assert summary.reasons == {"HTML page": 1, "extreme aspect ratio": 1}


def write(folder, images):
    with MDSWriter(out=str(folder), columns={"image": "bytes", "caption": "str"}) as writer:
        for image in images:
            writer.write({"image": image, "caption": "a fox"})
    return str(folder)


def processor(image):
    if image.width == 7:
        raise ValueError("height and width\nmust be > 0")
    return patch_inputs(image, 8, 32)


def turn(image):
    if image.width == 9:
        raise OSError("no such augmentation")
    return image.rotate(90)


def test_what_the_processor_cannot_handle_is_a_bad_sample(tmp_path, tokenizer, caplog):
    images = [encoded(Image.new("RGB", (width, 8))) for width in (16, 9, 1, 8)]
    images[2] = encoded(Image.new("RGB", (1, 20_000)))
    images.append(encoded(Image.new("RGB", (8, 7))))
    arguments = {"local": write(tmp_path / "data", images), "tokenizer": tokenizer, "batch_size": 5}
    arguments |= {"image_processor": processor, "transform": turn}
    data = StreamingCaptionDataset(**arguments)
    expected = {
        1: "the image of 9 x 8 pixels cannot be processed: no such augmentation",
        2: "the image cannot be decoded: extreme aspect ratio: 1 x 20000 pixels",
    }
    for index, message in expected.items():
        with pytest.raises(BadSampleError, match=rf"^sample {index} \(number {index} of .*\): {re.escape(message)}"):
            data[index]
    del data
    skipping = StreamingCaptionDataset(**arguments, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        (batch,) = caption_data_spec(skipping, 5).dataloader
    labelled = (batch["labels"] != IGNORE_INDEX).any(1)
    assert labelled[batch["sample_id"].argsort()].tolist() == [True, False, False, True, True]
    assert sum("Skipped sample" in record.message for record in caplog.records) == 2


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_wrong_checksum_is_named():
    data = bytearray(encoded(NOISE))
    data[30] ^= 1
    with pytest.raises(ImageError, match=r"^damaged PNG: broken PNG file \(bad header checksum in b'IHDR'\)$"):
        check_image(bytes(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_starts_as_a_format_is_a_damaged_image_of_it(form):
    data = encoded(NOISE, form)
    for cut in range(16, min(len(data) - 40, 200)):
        assert verdict(check_image, data[:cut]) in (f"damaged {form}", "truncated image", f"unsupported {form}"), cut
        with suppress(ImageError):
            decode_rgb(data[:cut])
            pytest.fail("decoded")
    garbage = data[:12] + b"\x55" * 400
    assert verdict(decode_rgb, garbage) != "undecodable image"


OTHERS = {
    "HTML page": b"\xef\xbb\xbf\n<!-- saved -->\n<!doctype HTML><html><svg></svg>",
    "SVG image": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "JSON document": b'{"error": "not found"}',
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "AVIF image": b"\0\0\0\x20ftypavif\0\0\0\0",
    "HEIC image": b"\0\0\0\x20ftypheic\0\0\0\0",
    "video": b"\0\0\0\x20ftypisom\0\0\0\0",
    "JPEG XL image": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG 2000 image": b"\0\0\0\x0cjP  \r\n\x87\n",
    "PDF document": b"%PDF-1.7\n",
    "PostScript document": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "Photoshop image": b"8BPS\0\1",
    "archive": b"PK\x03\x04\0\0",
    "undecodable image": b"neither one nor the other",
    "empty image": b"",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_as_what_they_are(kind):
    assert verdict(check_image, OTHERS[kind]) == verdict(check_image, OTHERS[kind], "full") == kind
    assert verdict(decode_rgb, OTHERS[kind]) == kind


@pytest.mark.parametrize("text", [b"<!---->", b" ", b"<sv", b"{ ", b"<!--"])
def test_naming_a_file_takes_no_time_whatever_it_repeats(text):
    assert verdict(decode_rgb, text * 100_000) == "undecodable image"


def test_what_pillow_knows_but_cannot_read_is_not_called_damaged():
    assert verdict(decode_rgb, tiff((RAMP / 255).astype("<f8"), sample_format=3)) == "unsupported TIFF"
