import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ldm.data.batch_sampler import EpochBatchSampler
from ldm.data.loader import ReadTogether, ResumableLoader, SeededDataset
from ldm.util import UserError


class Noisy(Dataset):
    """Numbers with noise from all three generators."""

    def __len__(self):
        return 13

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return torch.tensor([index, noise], dtype=torch.float64)


class Broken(Noisy):
    def __getitem__(self, index):
        raise UserError(f"a.tar: sample {index} is broken")


def loader(num_workers=0, dataset=None, batch_size=3, groups=None, keys=()):
    dataset = dataset or Noisy()
    groups = groups or [np.arange(len(dataset))]
    sampler = EpochBatchSampler(groups, batch_size, keys, shuffle=True, seed=5)
    return ResumableLoader(SeededDataset(dataset, seed=5), sampler, num_workers=num_workers)


def epoch_of(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return torch.cat(list(loader))


def test_order_and_augmentation_do_not_depend_on_workers():
    torch.manual_seed(0)
    alone, shared = loader(0), loader(2)
    for epoch in (0, 1, 4):
        torch.testing.assert_close(epoch_of(alone, epoch), epoch_of(shared, epoch), rtol=0, atol=0)
    assert not torch.equal(epoch_of(alone, 0), epoch_of(alone, 1))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_more_workers_than_samples():
    assert sorted(epoch_of(loader(4, batch_size=8), 0)[:, 0].tolist()) == list(range(13))


def test_reading_leaves_the_global_generators_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    epoch_of(loader(0), 0)
    epoch_of(loader(1), 0)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize(("num_workers", "consumed"), [(0, 0), (0, 1), (0, 5), (2, 0), (2, 3)])
def test_a_new_loader_goes_on_after_the_batches_handed_out(num_workers, consumed):
    whole = epoch_of(loader(), 3).split(3)
    first = loader(num_workers)
    first.batch_sampler.set_epoch(3)
    batches = iter(first)
    for _ in range(consumed):
        next(batches)
    state = first.state_dict()
    assert (state["epoch"], state["batch"]) == (3, consumed)

    second = loader(num_workers)
    second.load_state_dict(state)
    assert second.state_dict() == state
    second.batch_sampler.set_epoch(3)  # as Lightning does
    assert len(second) == len(whole)
    rest = list(second)
    assert len(rest) == len(whole) - consumed
    for ours, theirs in zip(rest, whole[consumed:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(epoch_of(second, 4), epoch_of(first, 4))


def test_a_position_in_other_data_starts_the_epoch_again(caplog):
    state = loader().state_dict() | {"epoch": 2, "batch": 3}
    other = loader(batch_size=4)
    other.load_state_dict(state)
    assert (other.batch_sampler.epoch, other.batch_sampler.start) == (2, 0)
    assert "batch_size was 3, is 4" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"keys": [f"dog{n}" for n in range(13)]},
        {"keys": [f"cat{12 - n}" for n in range(13)]},
        {"groups": [np.arange(6), np.arange(6, 13)]},
        {"groups": [np.arange(12, -1, -1)]},
    ],
    ids=["other samples", "another order", "sizes apart", "another group"],
)
def test_as_many_samples_need_not_be_the_same_data(options, caplog):
    same = {"keys": [f"cat{n}" for n in range(13)]}
    state = loader(**same).state_dict() | {"epoch": 2, "batch": 3}
    for other, start in ((loader(**same), 3), (loader(**{**same, **options}), 0)):
        other.load_state_dict(state)
        assert (other.batch_sampler.epoch, other.batch_sampler.start) == (2, start)
    assert "data was" in caplog.text


def test_a_state_that_does_not_tell_the_data_is_taken():
    state = loader().state_dict() | {"epoch": 2, "batch": 3}
    del state["data"]
    other = loader()
    other.load_state_dict(state)
    assert (other.batch_sampler.epoch, other.batch_sampler.start) == (2, 3)


def test_a_state_without_a_position_starts_the_epoch_again():
    other = loader()
    other.load_state_dict({})
    assert (other.batch_sampler.epoch, other.batch_sampler.start) == (0, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_one_line(num_workers):
    with pytest.raises(UserError, match=r"^a\.tar: sample \d+ is broken$"):
        next(iter(loader(num_workers, Broken())))


def test_read_together_keeps_order_and_errors():
    class Numbers(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, number):
            if number == 33:
                raise UserError("33 cannot be read")
            return number

    together = ReadTogether(Numbers())
    assert len(together) == 40 and together[5] == 5
    assert together.__getitems__(list(range(32, -1, -1))) == list(range(32, -1, -1))
    with pytest.raises(UserError, match="33 cannot be read"):
        together.__getitems__(list(range(40)))
