import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ldm.images.decode import decode_alpha, decode_image, has_transparency
from ldm.images.decode_lock import DecodeLock
from ldm.util import UserError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(height=6, width=4, channels=3):
    return (np.arange(height * width * channels) % 256).astype(np.uint8).reshape(height, width, channels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(gradient())
    undo = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(stored, "PNG", exif=exif), "x"), np.asarray(upright))


def test_transparent_parts_become_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[1, 1] = (0, 0, 0, 128)
    decoded = decode_image(encoded(Image.fromarray(rgba), "PNG"), "x")
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert np.allclose(decoded[1, 1], 127, atol=1)


def test_a_palette_with_a_transparent_colour():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    image.putpalette([200, 0, 0, 0, 200, 0])
    assert decode_image(encoded(image, "PNG", transparency=0), "x").tolist() == [[[255, 255, 255], [0, 200, 0]]]
    assert decode_image(encoded(image, "GIF"), "x").tolist() == [[[200, 0, 0], [0, 200, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_images_have_three_equal_channels(mode):
    decoded = decode_image(encoded(Image.fromarray(gradient()).convert(mode), "PNG"), "x")
    assert decoded.shape == (6, 4, 3) and decoded.dtype == np.uint8
    assert (decoded == decoded[..., :1]).all()


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encoded(Image.fromarray(levels), kind), "x")
        assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_transparent_level_of_16_bit_grey_has_16_bits():
    levels = np.array([[100, 100 * 257, 200]], np.uint16)
    decoded = decode_image(encoded(Image.fromarray(levels), "PNG", transparency=100), "x")
    assert decoded[0, :, 0].tolist() == [255, 100, 1]


def test_cmyk_becomes_rgb():
    cmyk = Image.fromarray(np.full((8, 8, 3), (250, 20, 20), np.uint8)).convert("CMYK")
    decoded = decode_image(encoded(cmyk, "JPEG", quality=95), "x")
    assert np.abs(decoded.astype(int) - (250, 20, 20)).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(kind):
    assert decode_image(encoded(Image.fromarray(gradient()), kind), "x").shape == (6, 4, 3)


def bomb(side: int) -> bytes:
    """Return a tiny PNG that claims `side` x `side` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (bomb(12_000), "image file is truncated"),
        (bomb(17_000), "decompression bomb"),
        (bomb(200_000), "decompression bomb"),
        (bomb(40), "image file is truncated"),
        (encoded(Image.fromarray(gradient(64, 64)), "JPEG")[:-40], "truncated"),
        (encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"), "no standard range"),
    ],
)
def test_what_is_not_a_whole_image_is_refused_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as caught:
        decode_image(data, "folder/x.jpg")
    assert str(caught.value).startswith("folder/x.jpg: ") and "\n" not in str(caught.value)


def test_has_transparency_refuses_a_tiff_whose_tiles_would_fill_the_memory():
    image = Image.fromarray(np.zeros((32, 32, 4), np.uint8))
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd[65000] = ifd[65001] = 1 << 20
    data = encoded(image, "TIFF", tiffinfo=ifd)
    for tag, name in ((65000, 322), (65001, 323)):  # width and length of a tile, which Pillow does not write
        data = data.replace(struct.pack("<H", tag), struct.pack("<H", name))
    for read in (has_transparency, decode_alpha):
        with pytest.raises(UserError, match=r"^x\.tif: a TIFF with tiles of 1048576x1048576 pixels"):
            read(data, "x.tif")


def test_has_transparency_takes_the_lock_of_a_large_image_alone(monkeypatch):
    taken = []
    monkeypatch.setattr(DecodeLock, "take", lambda self: taken.append(self))
    monkeypatch.setattr("ldm.images.decode.LARGE", 20)
    for side in (4, 8):
        with DecodeLock() as lock:
            assert has_transparency(encoded(Image.new("RGBA", (side, side)), "PNG"), "x", lock)
    assert taken == [lock]


def test_a_lack_of_memory_is_said(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("ldm.images.decode._pixels", fail)
    with pytest.raises(UserError, match=r"x.png: this machine has too little memory left to decode it"):
        decode_image(encoded(Image.fromarray(gradient()), "PNG"), "x.png")


def test_damaged_images_decode_or_are_refused():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        whole = encoded(Image.fromarray(gradient(32, 32)), kind)
        for _ in range(40):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 3):
                data[position] = rng.integers(256)
            try:
                assert decode_image(bytes(data), "x").ndim == 3
            except UserError as error:
                assert "\n" not in str(error)
