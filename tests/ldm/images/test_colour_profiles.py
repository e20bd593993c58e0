"""Colours of images in other colour spaces than sRGB, against Pillow's own conversion and known values."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.images import colour_profiles
from ldm.images.decode import decode_image
from tests.ldm.images.test_decode import encoded, gradient

PIXELS = np.array(
    [[[250, 20, 20], [20, 240, 30], [10, 30, 230], [128, 128, 128], [255, 255, 255], [0, 0, 0]]], np.uint8
)
ADOBE = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
P3 = (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
D50 = (0.9642, 1.0, 0.8249)


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def icc(space, tags, kind=b"mntr"):
    """Return an ICC profile, version 2, of `tags`."""
    body, table, offset = b"", struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, kind, space, b"XYZ ") + bytes(12) + b"acsp"
    header += bytes(28) + b"".join(map(fixed, D50))
    return header + bytes(128 - len(header)) + table + body


def xyz(values):
    return b"XYZ " + bytes(4) + b"".join(map(fixed, values))


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries, gamma=2.2):
    matrix = (
        np.linalg.inv(colour_profiles._BRADFORD)
        @ np.diag(
            (colour_profiles._BRADFORD @ D50) / (colour_profiles._BRADFORD @ colour_profiles._to_xyz(primaries).sum(1))
        )
        @ colour_profiles._BRADFORD
        @ colour_profiles._to_xyz(primaries)
    )
    tags = {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    return icc(
        b"RGB ", {**tags, b"wtpt": xyz(D50), b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(80)}
    )


def grey_profile(gamma):
    return icc(b"GRAY", {b"wtpt": xyz(D50), b"kTRC": curve(gamma), b"desc": b"desc" + bytes(90)})


def expected(profile, pixels=PIXELS):
    """Pillow's conversion of RGB pixels."""
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(pixels), source, target)).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("primaries", [P3, ADOBE])
def test_to_srgb_follows_embedded_profiles(kind, primaries):
    profile = rgb_profile(primaries)
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encoded(Image.fromarray(PIXELS), kind, icc_profile=profile, **options), "x")
    assert np.abs(decoded.astype(int) - expected(profile)).max() <= 1
    assert np.abs(decoded.astype(int) - PIXELS).max() > 5
    assert decoded[0, 4].tolist() == [255, 255, 255]


def test_to_srgb_of_a_jpeg_keeps_its_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    profile, pixels = rgb_profile(P3), np.full((16, 8, 3), (200, 60, 60), np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels), "JPEG", icc_profile=profile, exif=exif, quality=100), "x")
    assert decoded.shape == (8, 16, 3)
    assert np.abs(decoded.astype(int) - expected(profile, pixels[:1, :1])).max() <= 2


def test_to_srgb_keeps_every_value_of_srgb():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = gradient(64, 64)
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(pixels), "PNG", icc_profile=profile), "x"), pixels
    )


def test_to_srgb_of_grey_and_of_grey_in_an_rgb_profile():
    grey = np.array([[0, 64, 128, 255]], np.uint8)
    for mode in ("L", "LA"):
        image = Image.fromarray(grey).convert(mode)
        decoded = decode_image(encoded(image, "PNG", icc_profile=grey_profile(1.0)), "x")[0, :, 0]
        light = grey[0] / 255
        encoded_light = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
        assert np.abs(decoded - encoded_light).max() <= 1.5
        decoded = decode_image(encoded(image, "PNG", icc_profile=rgb_profile(SRGB, 1.0)), "x")[0, :, 0]
        assert np.abs(decoded - encoded_light).max() <= 1.5


@pytest.mark.parametrize("kind", ["transparent level", "RGB", "RGBA", "palette"])
def test_to_srgb_of_grey_in_other_modes_follows_a_grey_profile(kind, caplog):
    """Grey with a transparent level, and grey of a palette or of 16 bits with alpha, are decoded as colours."""
    grey = Image.fromarray(np.array([[64, 128, 255]], np.uint8))
    options = {"transparency": 255} if kind == "transparent level" else {}
    image = grey if options else grey.convert("P" if kind == "palette" else kind)
    decoded = decode_image(encoded(image, "PNG", icc_profile=grey_profile(1.0), **options), "x")
    assert np.abs(decoded[0, :, 0].astype(int) - [137, 188, 255]).max() <= 1 and not caplog.text
    assert (decoded == decoded[..., :1]).all()


def test_to_srgb_keeps_alpha():
    rgba = np.concatenate([PIXELS, np.array([[[255], [0], [255], [255], [255], [255]]], np.uint8)], axis=-1)
    profile = rgb_profile(P3)
    decoded = decode_image(encoded(Image.fromarray(rgba), "PNG", icc_profile=profile), "x").astype(int)
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert np.abs(decoded[0, [0, 2, 3]] - expected(profile)[0, [0, 2, 3]]).max() <= 1


def test_to_srgb_says_once_what_it_ignores(caplog):
    colour_profiles._said.clear()
    image = Image.fromarray(PIXELS)
    for profile in (b"no profile", grey_profile(2.2), rgb_profile(P3)[:200]):
        for name in ("one.png", "two.png"):
            np.testing.assert_array_equal(decode_image(encoded(image, "PNG", icc_profile=profile), name), PIXELS)
    assert caplog.text.count("colour profile ignored and sRGB assumed") == 3 and "two.png" not in caplog.text
    cmyk = encoded(image.convert("CMYK"), "TIFF", icc_profile=rgb_profile(P3))
    assert np.abs(decode_image(cmyk, "cmyk.tif").astype(int) - PIXELS).max() <= 1
    assert "cmyk.tif: colour profile ignored and sRGB assumed: its colour space is RGB" in caplog.text


def with_chunks(*chunks):
    """Return the PNG of the pixels with chunks behind its header."""
    data = encoded(Image.fromarray(PIXELS), "PNG")
    made = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return data[:33] + made + data[33:]


def chrm(primaries):
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in primaries))


def gama(gamma):
    return b"gAMA", struct.pack(">I", round(gamma * 100_000))


def test_to_srgb_reads_gamma_and_primaries_of_png(caplog):
    decoded = decode_image(with_chunks(gama(1 / 2.2), chrm(ADOBE)), "x").astype(int)
    assert np.abs(decoded - expected(rgb_profile(ADOBE))).max() <= 1
    linear = decode_image(with_chunks(gama(1.0)), "x")
    assert linear[0, 3].tolist() == [188, 188, 188]  # half of the light
    for chunks in ([gama(1 / 2.2), chrm(SRGB)], [gama(0.45455)], [(b"sRGB", b"\0"), gama(1.0)]):
        np.testing.assert_array_equal(decode_image(with_chunks(*chunks), "x"), PIXELS)
    for chunks in ([gama(0)], [chrm((0,) * 8)], [chrm((0.3, 0.3) * 4)]):
        np.testing.assert_array_equal(decode_image(with_chunks(*chunks), "broken"), PIXELS)
    assert "broken: colour profile ignored" in caplog.text


@pytest.mark.parametrize(("curve", "gamma"), [(13, None), (1, None), (4, 2.2)])
def test_to_srgb_reads_the_coding_of_png(curve, gamma):
    coding = (b"cICP", bytes([12, curve, 0, 1]))
    decoded = decode_image(with_chunks((b"iCCP", b"x\0\0" + zlib.compress(grey_profile(2.2))), coding), "x").astype(int)
    by_chunks = decode_image(with_chunks(chrm(P3), *([gama(1 / gamma)] if gamma else [])), "x")
    np.testing.assert_array_equal(decoded, by_chunks)
    assert np.abs(decoded - PIXELS).max() > 5
    np.testing.assert_array_equal(decode_image(with_chunks((b"cICP", bytes([1, 13, 0, 1])), gama(1.0)), "x"), PIXELS)


def test_to_srgb_says_that_a_wide_range_of_light_is_ignored(caplog):
    colour_profiles._said.clear()
    np.testing.assert_array_equal(decode_image(with_chunks((b"cICP", bytes([9, 16, 0, 1]))), "hdr.png"), PIXELS)
    assert "hdr.png: colour profile ignored" in caplog.text and "its coding 9/16" in caplog.text
    both = with_chunks((b"cICP", bytes([9, 16, 0, 1])), (b"iCCP", b"x\0\0" + zlib.compress(rgb_profile(P3))))
    assert np.abs(decode_image(both, "x").astype(int) - expected(rgb_profile(P3))).max() <= 1


@pytest.mark.parametrize("how", ["number", "interoperability"])
def test_to_srgb_reads_adobe_rgb_in_exif(how):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 2 if how == "number" else 0xFFFF
    if how == "interoperability":
        exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    exif[0x010F] = "camera"
    decoded = decode_image(encoded(Image.fromarray(PIXELS), "PNG", exif=exif), "x").astype(int)
    assert np.abs(decoded - expected(rgb_profile(ADOBE, 563 / 256))).max() <= 1
    exif.get_ifd(0x8769)[0xA001] = 1
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(PIXELS), "PNG", exif=exif), "x"), PIXELS)
