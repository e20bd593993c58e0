"""Ordinary datasets by config: every split, and a stopped fit that goes on."""

import pytest
import torch

from ldm.data.config_module import DataModuleFromConfig
from ldm.util import UserError
from tests.ldm.data.test_datamodule import Recorder, batches, fit


class Numbers:
    """A dataset without a base class."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index >= self.count:
            raise IndexError(index)
        return {"__key__": str(index), "f8": torch.rand(2, 2), "t5": torch.rand(2, 2)}


def numbers(count):
    return {"target": f"{__name__}.Numbers", "params": {"count": count}}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ordinary_datasets_resume_exactly_with_their_augmentations(tmp_path, num_workers):
    def data():
        return DataModuleFromConfig(3, numbers(8), validation=numbers(2), wrap=True, num_workers=num_workers, seed=0)

    whole, first, second = Recorder(), Recorder(4, tmp_path / "last.ckpt"), Recorder()
    for module in (whole, first, second):
        module.check_batch_shapes = None
    fit(whole, data(), tmp_path)
    fit(first, data(), tmp_path)
    fit(second, data(), tmp_path, tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen
    assert len(whole.seen) == 9 and len(whole.validated) > 0


def test_ordinary_datasets_for_every_split():
    splits = {"train": 5, "validation": 4, "test": 3, "predict": 2}
    data = DataModuleFromConfig(2, **{split: numbers(count) for split, count in splits.items()}, num_workers=0)
    found = [sum(len(b["__key__"]) for b in batches(data, split)) for split in ("train", "val", "test", "predict")]
    assert found == list(splits.values())
    with pytest.raises(UserError, match=r"data\.params\.train is missing"):
        DataModuleFromConfig(2).train_dataloader()
