from __future__ import annotations

from pathlib import Path

from ldm.images.find import ImageItem
from ldm.images.tags import with_tag_variants


def variants(caption: str | None, *options: float, name: str = "a.png") -> list[str | None]:
    item = with_tag_variants(ImageItem(name, Path(name), caption=caption), *options)
    return [None] if item.caption is None else item.caption.split("\n")


def test_variants_shuffle_all_but_the_kept_tags() -> None:
    found = variants("tom, cat,  red, sofa", 6, 1)
    assert (
        found[0] == "tom, cat,  red, sofa" and 3 <= len(found) <= 6 and found == variants("tom, cat,  red, sofa", 6, 1)
    )
    for variant in found[1:]:
        tags = variant.split(", ")
        assert tags[0] == "tom" and sorted(tags[1:]) == ["cat", "red", "sofa"]
    assert variants("tom, cat,  red, sofa", 6, 1, name="b.png") != found


def test_variants_drop_tags() -> None:
    assert variants("tom, cat, red", 3, 1, 1.0) == ["tom, cat, red", "tom"]
    lengths = {len(variant.split(", ")) for variant in variants("a, b, c, d, e, f", 20, 2, 0.5)}
    assert min(lengths) >= 2 and len(lengths) > 2


def test_captions_without_tags_have_no_variants() -> None:
    assert variants("a cat on a sofa", 4) == ["a cat on a sofa"] and variants(None, 4) == [None]
