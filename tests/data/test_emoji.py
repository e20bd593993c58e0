"""Tests that the committed images are as data/README.md describes them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parents[2] / "data"
FOLDERS = ["emoji", "cats", "clocks"]


def read(folder: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def load_images(folder: str) -> np.ndarray:
    """Return the images (N, 64, 64, 3) uint8, in the order of the metadata."""
    opened = [Image.open(DATA / folder / row["file_name"]) for row in read(folder)]
    assert {(image.mode, image.size) for image in opened} == {("RGB", (64, 64))}
    return np.stack([np.asarray(image) for image in opened])


def captions(folder: str) -> list[str]:
    return [caption for row in read(folder) for caption in [row["text"], *row["paraphrases"]]]


def test_the_readme_gives_the_number_of_images():
    assert len(read("cats")) == 10
    assert f"{len(read('emoji'))} colour emoji" in (DATA / "README.md").read_text(encoding="utf-8")
    assert 600 <= len(read("emoji")) <= 1000


@pytest.mark.parametrize("folder", FOLDERS)
def test_metadata_and_images_match(folder):
    listed = [row["file_name"] for row in read(folder)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in (DATA / folder).glob("*.png")}


def test_captions_are_unique_plain_lower_case():
    everything = [caption for folder in FOLDERS for caption in captions(folder)]
    assert [caption for caption, count in Counter(everything).items() if count > 1] == []
    assert [caption for caption in everything if caption != " ".join(caption.lower().split())] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_image_has_paraphrases(folder):
    assert [row["text"] for row in read(folder) if not row["paraphrases"]] == []


def test_groups():
    groups = Counter(row["group"] for row in read("emoji"))
    assert set(groups) == {"faces", "people", "animals", "food", "plants", "places", "vehicles", "things"}
    assert min(groups.values()) >= 20
    neighbours = {row["text"] for row in read("emoji") if row.get("cat_neighbour")}
    assert {"bear", "mouse face", "dog face", "tiger face", "fox", "lion"} <= neighbours
    assert {row["group"] for row in read("emoji") if row["text"] in neighbours} == {"animals"}


def test_the_training_set_has_no_cat():
    cats = {"1F431", "1F408", *(f"{point:X}" for point in range(0x1F638, 0x1F641))}
    assert [row["text"] for row in read("emoji") if cats & set(row["codepoints"].split())] == []
    assert [caption for caption in captions("emoji") if {"cat", "kitten", "tom", "kitty"} & set(caption.split())] == []
    assert {row["codepoints"] for row in read("cats")} == cats - {"1F408"}


def test_the_training_set_has_no_clock_face():
    clocks = {f"{point:X}" for point in range(0x1F550, 0x1F568)}
    assert [row["text"] for row in read("emoji") if clocks & set(row["codepoints"].split())] == []
    assert [row["codepoints"] for row in read("clocks")] == [f"{point:X}" for point in range(0x1F550, 0x1F55C)]
    neighbours = {row["text"] for row in read("emoji") if row.get("clock_neighbour")}
    assert len(neighbours) == 20 and {"alarm clock", "wristwatch", "stopwatch"} < neighbours


def test_images_are_filled_and_differ():
    images = np.concatenate([load_images(folder) for folder in FOLDERS]).astype(np.float32) / 255
    assert (images.reshape(len(images), -1) < 0.95).mean(axis=1).min() > 0.02  # something is drawn
    flat = images.reshape(len(images), -1)
    squared = (flat**2).sum(1)
    distance = np.sqrt(np.maximum(squared[:, None] + squared[None] - 2 * flat @ flat.T, 0) / flat.shape[1])
    np.fill_diagonal(distance, 1)
    assert distance.min() > 0.05  # root mean square, of 1; the closest pair are two locks


def test_the_licence_of_the_font_exists():
    licence = (DATA / "LICENSE-NotoEmoji.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    assert "Google Inc" in licence
