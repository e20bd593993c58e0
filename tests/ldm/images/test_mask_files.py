"""Loss masks: where they are found, and their means over the cells of a latent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm.data.image_sources import find_images
from ldm.images.find import ImageItem, digest_images
from ldm.images.mask_files import read_loss_masks
from ldm.util import UserError
from tests.ldm.images.test_find import RED, metadata, put
from tests.ldm.shard_files import png, write_tar

MASK = png(np.full((4, 6), 255, np.uint8))


def masks(items: list[ImageItem]) -> dict[str, str | None]:
    return {item.name: item.mask and item.mask.name for item in items}


def test_masks_lie_beside_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"a.png": RED, "a.txt": "x", "a.mask.png": MASK, "sub/b.jpg": RED, "sub/B.txt": "y", "sub/b.txt": "y"}
    put(tmp_path, {**files, "sub/b.Mask.PNG": MASK, "c.mask.png": MASK, "d.png": RED, "d.txt": "z"})
    found = find_images(tmp_path, masks=True)
    assert masks(found) == {"a.png": "a.mask.png", "d.png": None, "sub/b.jpg": "sub/b.Mask.PNG"}
    assert "1 masks skipped, because no image is beside them, such as c.mask.png" in caplog.text
    named = find_images([tmp_path / "a.png", tmp_path / "sub/b.jpg"], masks=True)
    assert masks(named) == {"a.png": "a.mask.png", "b.jpg": "b.Mask.PNG"}
    assert "named like loss masks" not in caplog.text
    assert digest_images(found) != digest_images(find_images(tmp_path))
    assert "3 images are named like loss masks, such as a.mask.png, but are encoded as images" in caplog.text


def test_masks_of_listed_images_and_of_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = metadata({"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "y"})
    folder = put(tmp_path / "listed", {"metadata.jsonl": lines, "a.png": RED, "b.png": RED, "a.mask.jpg": MASK})
    assert masks(find_images(folder, masks=True)) == {"a.png": "a.mask.jpg", "b.png": None}
    assert not caplog.text
    tar = write_tar(tmp_path / "a.tar", [("1.png", RED), ("1.txt", b"x"), ("1.mask.png", MASK), ("2.png", RED)])
    [first, second] = find_images(tar, masks=True)
    assert first.mask.name == "a.tar/1.mask.png" and second.mask is None
    assert (read_loss_masks(first, [(0, 0, 4, 6)], (4, 6), (1, 1)) == 1).all()


def test_the_alpha_channel_is_a_mask(tmp_path: Path) -> None:
    pixels = np.full((2, 4, 4), 255, np.uint8)
    pixels[:, 2:, 3] = [0, 51]
    put(tmp_path, {"a.png": png(pixels), "a.txt": "x", "b.png": RED, "b.txt": "y"})
    first, second = find_images(tmp_path, masks=True)
    found = read_loss_masks(first, [(0, 0, 2, 4)], (2, 4), (1, 4))
    np.testing.assert_array_equal(found, np.float16([[[[1, 1, 0, 0.2]]]]))
    assert read_loss_masks(second, [(0, 0, 4, 6)], (4, 6), (1, 1)) is None
    (tmp_path / "a.png").write_bytes(png(pixels[..., :3]))
    with pytest.raises(UserError, match=r"--loss-masks: no image has a mask; give name\.mask\.png"):
        find_images(tmp_path, masks=True)


def test_read_loss_masks_by_hand(tmp_path: Path) -> None:
    """Of six columns, three are white. Three cells over four columns cut the second column in thirds."""
    mask = np.zeros((4, 6), np.uint8)
    mask[:, :3] = 255
    put(tmp_path, {"a.png": RED, "a.txt": "x", "a.mask.png": png(mask)})
    [item] = find_images(tmp_path, masks=True)
    plain, part = read_loss_masks(item, [(0, 0, 4, 6), (1, 1, 2, 4)], (4, 6), (1, 3))
    np.testing.assert_allclose(plain[0], [[1, 0.5, 0]])
    np.testing.assert_allclose(part[0], [[1, 0.5, 0]])
    [cut] = read_loss_masks(item, [(0, 2, 4, 4)], (4, 6), (1, 3))
    np.testing.assert_allclose(cut[0], [[0.75, 0, 0]])
    [larger] = read_loss_masks(item, [(0, 4, 8, 8)], (8, 12), (1, 3))  # the mask has half the size of the image
    np.testing.assert_array_equal(larger, cut)


def test_wrong_masks_are_refused(tmp_path: Path) -> None:
    files = {"a.png": RED, "a.txt": "x", "a.mask.png": png(np.zeros((4, 4), np.uint8))}
    files |= {"b.png": RED, "b.txt": "x", "b.mask.png": png(np.zeros((4, 6, 4), np.uint8))}
    put(tmp_path, {**files, "c.png": RED, "c.txt": "x", "c.mask.png": MASK[:30], "d.png": RED, "d.mask.psd": MASK})
    for item, said in zip(
        find_images(tmp_path, masks=True),
        (
            r"a\.mask\.png: the mask has 4x4 pixels, but the image 6x4; the aspect ratios",
            r"b\.mask\.png: a mask with transparent pixels; save it",
            r"c\.mask\.png: ",
            r"d\.mask\.psd: images of this kind are not read",
        ),
        strict=True,
    ):
        with pytest.raises(UserError, match=said):
            read_loss_masks(item, [(0, 0, 4, 6)], (4, 6), (1, 1))
