"""Pairs of images, before and after an edit, wherever they are listed."""

import json

import pytest

from ldm.data.image_sources import find_images
from ldm.images.find import digest_images
from ldm.util import UserError
from tests.ldm.images.test_find import RED, metadata, put
from tests.ldm.shard_files import write_tar


def pairs(items):
    return [(item.name, item.caption, item.edited and item.edited.name, item.error) for item in items]


def test_pairs_by_name(tmp_path, caplog):
    files = {"b.png": RED, "b.edited.jpg": RED, "b.txt": "make it snow", "sub/a.photo.jpg": RED}
    files |= {"sub/a.photo.Edited.png": RED, "sub/a.photo.txt": "as a drawing", "c.edited.png": RED}
    assert pairs(find_images(put(tmp_path, files), pairs=True)) == [
        ("b.png", "make it snow", "b.edited.jpg", None),
        ("sub/a.photo.jpg", "as a drawing", "sub/a.photo.Edited.png", None),
    ]
    assert "1 edited images" in caplog.text and "c.edited.png" in caplog.text


def test_an_image_without_its_edited_one_has_an_error(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": "x", "b.png": RED, "b.edited.png": RED, "b.txt": "y", "c.png": RED})
    first, second, third = find_images(tmp_path, pairs=True)
    assert second.error is None and "c.edited.png" in third.error
    with pytest.raises(UserError, match=r"a\.png: .*a\.edited\.png"):
        first.read()
    (tmp_path / "b.edited.png").unlink()
    with pytest.raises(UserError, match=r"give name\.edited\.jpg beside name\.jpg"):
        find_images(tmp_path, pairs=True)


@pytest.mark.parametrize(
    "keys",
    [
        ("input_image", "edited_image", "edit_prompt"),
        ("original_image", "edited_image", "edit_prompt"),
        ("source_img", "target_img", "instruction"),
        ("input", "output", "text"),
        ("before", "after", "edit"),
        ("input_file_name", "edited_file_name", "prompt"),
        ("file_name", "edited_file_name", "caption"),
        ("image", "target", "prompt"),
    ],
)
def test_from_metadata_knows_the_columns_of_pairs(tmp_path, caplog, keys):
    line = dict(zip(keys, ("a.png", "after/a.png", " make it  snow"), strict=True))
    put(tmp_path, {"metadata.jsonl": metadata(line), "a.png": RED, "after/a.png": RED})
    assert pairs(find_images(tmp_path, pairs=True)) == [("a.png", "make it snow", "after/a.png", None)]
    assert not caplog.text


def test_one_image_may_have_several_edits_and_instructions(tmp_path):
    def line(after, prompt):
        return {"input_image": "a.png", "edited_image": after, "edit_prompt": prompt}

    lines = [line("b.png", "make it snow"), line("c.png", "make it rain"), line("c.png", "let it rain")]
    put(tmp_path, {"metadata.jsonl": metadata(*lines), **dict.fromkeys(("a.png", "b.png", "c.png"), RED)})
    assert pairs(find_images(tmp_path, pairs=True)) == [
        ("a.png", "make it snow", "b.png", None),
        ("a.png", "make it rain", "c.png", None),
        ("a.png", "let it rain", "c.png", None),
    ]
    (tmp_path / "metadata.jsonl").write_text(metadata(*lines, lines[0]))
    with pytest.raises(UserError, match=r"a\.png: occurs twice"):
        find_images(tmp_path, pairs=True)


def test_from_metadata_reads_pairs_of_published_sets(tmp_path, caplog):
    """The columns of InstructPix2Pix's own set; those of captions are told of."""
    columns = "original_prompt,original_image,edit_prompt,edited_prompt,edited_image\n"
    text = columns + "a cat,cat.png,make it snow,a cat in snow,snow.png\n"
    put(tmp_path, {"metadata.csv": text, "cat.png": RED, "snow.png": RED})
    assert pairs(find_images(tmp_path, pairs=True)) == [("cat.png", "make it snow", "snow.png", None)]
    assert "'original_prompt', 'edited_prompt'" in caplog.text


def test_a_listed_image_finds_its_edited_one_by_name(tmp_path, caplog):
    put(tmp_path, {"metadata.jsonl": metadata({"file_name": "a.png", "text": "x"}), "a.png": RED, "a.edited.png": RED})
    assert pairs(find_images(tmp_path, pairs=True)) == [("a.png", "x", "a.edited.png", None)]
    assert not caplog.text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input": "a.png", "edited": "../b.png"}, "outside the folder"),
        ({"input": "a.png", "edited": 3}, "edited is not a string: 3"),
        ({"input": "a.png", "edited": []}, r"edited is not a string: \[\]"),
        ({"input": False, "edited": "b.png"}, "line 1: expected"),
        ({"edited": "a.png", "edit": "x"}, "line 1: expected"),
    ],
)
def test_metadata_of_pairs_that_is_wrong_names_its_line(tmp_path, entry, message):
    put(tmp_path, {"metadata.jsonl": json.dumps(entry), "a.png": RED})
    with pytest.raises(UserError, match=message):
        find_images(tmp_path, pairs=True)


def test_pairs_in_tars_and_of_named_files(tmp_path):
    members = [("0.jpg", RED), ("0.edited.png", RED), ("0.txt", b"x"), ("1.png", RED), ("1.txt", b"y")]
    write_tar(tmp_path / "t/a.tar", members)
    first, second = find_images(tmp_path / "t/a.tar", pairs=True)
    assert pairs([first]) == [("a.tar/0.jpg", "x", "a.tar/0.edited.png", None)]
    assert first.edited.read().shape == (4, 6, 3) and "1.edited.png" in second.error
    put(tmp_path, {"a.png": RED, "a.edited.png": RED, "a.txt": "x"})
    named = find_images([tmp_path / name for name in ("a.png", "a.edited.png", "a.txt")], pairs=True)
    assert pairs(named) == [("a.png", "x", "a.edited.png", None)]


def test_digest_images_tells_edited_images_apart(tmp_path):
    put(tmp_path, {"a.png": RED, "a.edited.png": RED, "a.txt": "x"})
    before = digest_images(find_images(tmp_path, pairs=True))
    assert before == digest_images(find_images(tmp_path, pairs=True))
    (tmp_path / "a.edited.png").write_bytes(RED + b"0")
    assert digest_images(find_images(tmp_path, pairs=True)) != before
