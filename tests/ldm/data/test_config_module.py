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


class Sized:
    """Images of one size each."""

    def __init__(self, sizes: list) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.zeros(*self.sizes[index], 3)}


def sized(*sizes):
    return {"target": f"{__name__}.Sized", "params": {"sizes": [list(size) for size in sizes]}}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_of_unequal_sizes_is_one_line(num_workers):
    data = DataModuleFromConfig(2, sized((8, 8), (8, 6)), num_workers=num_workers, shuffle=False)
    with pytest.raises(UserError, match="samples of one batch differ in size") as caught:
        list(batches(data, "train"))
    assert "\n" not in str(caught.value)


def test_num_val_workers_are_those_of_every_split_but_training():
    splits = {name: numbers(2) for name in ("train", "validation", "test", "predict")}
    data = DataModuleFromConfig(2, **splits, num_workers=2, num_val_workers=0)
    data.setup()
    assert data.train_dataloader().num_workers == 2
    assert [data.val_dataloader().num_workers, data.test_dataloader().num_workers] == [0, 0]
    assert data.predict_dataloader().num_workers == 0
    assert DataModuleFromConfig(2, num_workers=3).num_val_workers == 3
    with pytest.raises(UserError, match="num_val_workers -1"):
        DataModuleFromConfig(2, num_val_workers=-1)


@pytest.mark.parametrize("name", ["num_workers", "num_val_workers"])
def test_more_workers_than_a_machine_can_have_are_refused(name):
    with pytest.raises(UserError, match=rf"^data\.params\.{name} 100000: give a whole number from 0 to 256"):
        DataModuleFromConfig(batch_size=1, **{name: 100_000})
