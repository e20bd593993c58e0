"""Releases whose text encoder encodes the prompts of previews."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.training.preview_setup import build_previews
from tests.diffusers_folders import write_tiny_folder


def encode(noted: str | None, **given: str):
    section = {"prompts": ["a cat"], "config": "sd1.yaml", **given}
    [previews] = build_previews(OmegaConf.create({"lightning": {"previews": section}}))
    return previews.encode(["a cat", ""], noted, None)


def test_build_previews_encodes_with_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_folder("sd1", tmp_path)
    of_file = encode(None, release="sd1.safetensors")
    for of_folder in (encode(None, release="sd1"), encode("sd1")):
        assert of_folder.release == "sd1" and of_folder.digests == of_file.digests
        for text, parts in of_file.encodings.items():
            assert torch.equal(of_folder.encodings[text]["t5"], parts["t5"])
