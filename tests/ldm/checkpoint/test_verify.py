"""Every byte of a checkpoint's records is held against its checksum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import save_checkpoint, save_state_dict, verify_checkpoint
from ldm.util import UserError

CONTENT = {"state_dict": {"a": torch.arange(100.0)}, "global_step": 3}


@pytest.fixture(params=[save_checkpoint, torch.save], ids=["ours", "torch's"])
def checkpoint(request, tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    request.param(CONTENT, path)
    return path


def test_what_was_written_is_whole(checkpoint: Path) -> None:
    verify_checkpoint(checkpoint)


def test_one_flipped_bit_of_a_weight_is_found(checkpoint: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    place = data.index(CONTENT["state_dict"]["a"].numpy().tobytes()) + 8
    data[place] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(UserError, match=r"last.ckpt: cut short or damaged \(Bad CRC-32 .*data/0'\)"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_found(checkpoint: Path, share: float) -> None:
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"last.ckpt: cut short or damaged"):
        verify_checkpoint(checkpoint)


def test_a_format_without_checksums_is_taken_as_it_is(tmp_path: Path) -> None:
    save_state_dict({"a": torch.zeros(1)}, tmp_path / "release.safetensors")
    verify_checkpoint(tmp_path / "release.safetensors")
