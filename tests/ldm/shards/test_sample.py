"""The sizes of an image in a sample's json, computed by hand, and the names of members."""

import numpy as np
import pytest

from ldm.shards.sample import (
    MASK,
    MASKED_IMAGE,
    blank_key,
    member_extension,
    numbered,
    plain,
    sizes_of,
    with_caption,
)
from ldm.util import UserError


@pytest.mark.parametrize(
    ("original", "crop", "target", "corner"),
    [
        ((1500, 1000), (250, 0, 1000, 1000), (1024, 1024), [256, 0]),  # 250 pixels, scaled by 1.024
        ((1000, 1500), (0, 250, 1000, 1000), (1024, 1024), [0, 256]),
        ((512, 512), (0, 0, 512, 512), (1024, 1024), [0, 0]),
        ((600, 800), (0, 8, 600, 784), (896, 1152), [0, 12]),  # 8 · 1152 / 784 = 11.76
        ((3000, 2000), (500, 0, 2000, 2000), (64, 64), [16, 0]),
        ((20, 21), (0, 3, 20, 16), (40, 32), [0, 6]),
    ],
)
def test_sizes_of_counts_the_crop_in_the_scaled_image(original, crop, target, corner):
    assert sizes_of(original, crop, target) == {
        "original_size": list(original),
        "crop_top_left": corner,
        "target_size": list(target),
    }


def test_numbered_members():
    assert [numbered(MASK, number) for number in range(3)] == ["mask", "mask.1", "mask.2"]
    assert [plain(key) for key in ("mask", "mask.12", "masked_image.1", "f8", "f8.1", "mask.x")] == [
        "mask", "mask", "masked_image", "f8", "f8.1", "mask.x",
    ]  # fmt: skip
    assert member_extension(numbered(MASKED_IMAGE, 1)) == "masked_image.1.npy"
    assert blank_key(8, 16) == "masked_image.8x16"
    assert member_extension("original_size_as_tuple") == member_extension("target_size") == "json"


def test_with_caption_takes_text_and_encodings_of_one_caption():
    several = {
        "txt": "a\nb",
        "t5": np.arange(2 * 77 * 3).reshape(2, 77, 3),
        "pooled": np.arange(8).reshape(2, 4),
        "n": 5,
    }
    found = with_caption(several, lambda count: count - 1, "here")
    assert found["txt"] == "b" and found["n"] == 5 and found["pooled"].tolist() == [4, 5, 6, 7]
    assert found["t5"].shape == (77, 3) and found["t5"][0, 0] == 77 * 3
    one = {"txt": "a\nb", "t5": np.zeros((77, 3)), "pooled": np.zeros(4)}
    assert with_caption(one, lambda count: 1 / 0, "here") is one
    assert with_caption({"txt": "a\n\nb\n"}, lambda count: count - 1, "here") == {"txt": "b"}
    with pytest.raises(UserError, match="here: has 2 captions, but 2 of t5, no number of pooled; encode the images"):
        with_caption({**several, "pooled": np.zeros(4)}, lambda count: 0, "here")
