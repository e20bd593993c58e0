"""Captions as other programs and systems write them."""

import json
import unicodedata

import pytest

from ldm.data.image_sources import find_images
from ldm.images.captions import same_name
from ldm.util import UserError
from tests.ldm.images.test_find import RED, described, metadata, put

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("file_key", ["file_name", "file", "file_path", "image", "filename", "path"])
@pytest.mark.parametrize("text_key", ["text", "caption", "prompt"])
def test_from_metadata_knows_synonyms(tmp_path, caplog, file_key, text_key):
    put(tmp_path, {"metadata.jsonl": metadata({file_key: "a.png", text_key: "tom"}), "a.png": RED})
    assert described(find_images(tmp_path)) == [("a.png", "tom")] and not caplog.text


def test_from_metadata_names_keys_that_are_not_read(tmp_path, caplog):
    line = {"file_name": "a.png", "text": "tom", "caption": "other", "width": 3}
    put(tmp_path, {"metadata.jsonl": metadata(line), "a.png": RED})
    assert described(find_images(tmp_path)) == [("a.png", "tom")]
    assert "metadata.jsonl: unknown keys ignored: 'caption', 'width'" in caplog.text


def test_from_metadata_in_subfolders_beside_captions_in_files(tmp_path, caplog):
    listed = metadata({"file_name": "b.png", "caption": "b"}, {"file_name": "deep/c.png", "caption": "c"})
    files = {"a.png": RED, "a.txt": "a", "sub/metadata.jsonl": listed, "sub/b.png": RED, "sub/deep/c.png": RED}
    items = find_images(put(tmp_path, {**files, "sub/d.png": RED, "sub/d.txt": "d"}))
    assert described(items) == [("a.png", "a"), ("sub/b.png", "b"), ("sub/deep/c.png", "c")]
    assert "1 images skipped, such as sub/d.png, because they are not in sub/metadata.jsonl" in caplog.text
    assert "1 caption files without an image: sub/d.txt" in caplog.text


def test_from_metadata_leaves_the_caption_to_a_text_file(tmp_path):
    put(tmp_path, {"metadata.jsonl": metadata({"file_name": "a.png"}), "a.png": RED, "a.txt": "a"})
    assert described(find_images(tmp_path)) == [("a.png", "a")]


def test_from_metadata_reads_csv(tmp_path):
    text = '\ufefffile_name,text\r\na.png,"red, a flag"\r\nb.png,\r\n'
    put(tmp_path, {"metadata.csv": text, "a.png": RED, "b.png": RED})
    assert described(find_images(tmp_path)) == [("a.png", "red, a flag"), ("b.png", None)]
    put(tmp_path, {"metadata.csv": "file_name,text\na.png,red, a flag\n"})
    with pytest.raises(UserError, match=r"metadata\.csv, line 2: has more values than the 2 columns"):
        find_images(tmp_path)
    put(tmp_path, {"metadata.csv": "a.png,red\n"})
    with pytest.raises(UserError, match=r"line 1: expected the columns file_name and text, got a\.png, red"):
        find_images(tmp_path)


def test_from_metadata_takes_backslashes_and_absolute_paths_inside(tmp_path):
    lines = metadata({"file_name": "sub\\a.png", "text": "a"}, {"file_name": str(tmp_path / "b.png"), "text": "b"})
    put(tmp_path, {"metadata.jsonl": lines.replace("\n", "\r\n"), "sub/a.png": RED, "b.png": RED})
    assert described(find_images(tmp_path)) == [("sub/a.png", "a"), ("b.png", "b")]
    for name in ("..\\x.png", "sub\\..\\..\\x.png", "/etc/x.png", f"{tmp_path}/../x.png", "\\x.png", "."):
        put(tmp_path, {"metadata.jsonl": metadata({"file_name": name, "text": "a"})})
        with pytest.raises(UserError, match=r"line 1: file_name .* is outside the folder"):
            find_images(tmp_path)


@pytest.mark.parametrize(("image", "caption"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_caption_files_of_another_unicode_form(tmp_path, image, caption):
    put(tmp_path / "beside", {f"{image}.png": RED, f"{caption}.TXT": "tom"})
    assert described(find_images(tmp_path / "beside")) == [(f"{image}.png", "tom")]
    assert described(find_images(tmp_path / f"beside/{image}.png")) == [(f"{image}.png", "tom")]
    listed = json.dumps({"file_name": f"{caption}.png", "text": "tom"}, ensure_ascii=False)
    put(tmp_path / "listed", {f"{image}.png": RED, "metadata.jsonl": listed})
    assert described(find_images(tmp_path / "listed")) == [(f"{image}.png", "tom")]


def test_captions_among_the_images_of_a_glob(tmp_path, caplog):
    put(
        tmp_path, {"a.png": RED, "a.txt": "a", "b.png": RED, "metadata.jsonl": metadata({"file": "b.png", "text": "b"})}
    )
    every = sorted(map(str, tmp_path.iterdir()))
    assert described(find_images(every)) == [("a.png", "a"), ("b.png", "b")] and not caplog.text
    put(tmp_path, {"notes.txt": "x", "film.mp4": "x"})
    assert len(find_images(sorted(map(str, tmp_path.iterdir())))) == 2
    assert "2 files skipped, because they are neither images nor tars" in caplog.text and "notes.txt" in caplog.text


def test_same_name_of_the_spellings_of_one():
    assert same_name(f"x/{COMPOSED}.TXT") == same_name(f"x/{DECOMPOSED}.txt") != same_name("x/cafe.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_of_other_systems(tmp_path, encoding):
    text = "ein  Hündchen\r\n\tim Gras\r\n" + "und so weiter, " * 2000
    put(tmp_path, {"a.png": RED, "a.txt": text.encode(encoding), "b/b.png": RED})
    put(tmp_path, {"b/metadata.jsonl": metadata({"file_name": "b.png", "text": text}).encode(encoding)})
    caption = " ".join(text.split())
    assert described(find_images(tmp_path)) == [("a.png", caption), ("b/b.png", caption)]


@pytest.mark.parametrize("name", ["a.caption", "a.png.txt", "a.CAPTION", "a.png.TXT"])
def test_caption_files_of_other_programs(tmp_path, caplog, name):
    put(tmp_path, {"a.png": RED, name: "tom"})
    for source in (tmp_path, [str(tmp_path / "a.png"), str(tmp_path / name)], f"{tmp_path}/*"):
        assert described(find_images(source)) == [("a.png", "tom")] and not caplog.text


def test_a_text_file_takes_precedence_among_caption_files(tmp_path, caplog):
    put(tmp_path, {"a.png": RED, "a.txt": "one", "a.caption": "two", "a.png.txt": "three"})
    assert described(find_images(tmp_path)) == [("a.png", "one")]
    assert "files of other types skipped: .caption" in caplog.text and "a.png.txt" in caplog.text


def test_a_pattern_names_images_beside_other_files(tmp_path, caplog):
    put(tmp_path, {"a.png": RED, "a.txt": "one", "Thumbs.db": "x"})
    assert described(find_images(f"{tmp_path}/*")) == [("a.png", "one")]
    assert "1 files skipped, because they are neither images nor tars" in caplog.text and "Thumbs.db" in caplog.text
