import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.batch_sampler import EpochBatchSampler, epoch_batches, held_out_entries, repeated, sample_name
from ldm.data.loader import ResumableLoader

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=3)


def groups_of(counts):
    return np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])


@given(sizes, st.integers(1, 7), st.integers(1, 5), st.booleans(), st.booleans())
def test_ranks_share_an_epoch_evenly(counts, batch_size, world, shuffle, drop_last):
    groups = groups_of(counts)
    options = {"shuffle": shuffle, "drop_last": drop_last, "seed": 3, "epoch": 5, "world": world}
    ranks = [epoch_batches(groups, batch_size, rank=rank, **options) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [number for batches in ranks for batch in batches for number in batch]
    assert len(seen) == len(set(seen))
    for batch in (batch for batches in ranks for batch in batches):
        assert 1 <= len(batch) <= batch_size
        assert sum(len(np.intersect1d(batch, group)) > 0 for group in groups) == 1
    if not drop_last:  # less than one sample a rank is left out, and only where there is no way to spread it
        full = sum(count // (batch_size * world) for count in counts)
        assert len(ranks[0]) >= full
        lost = sum(counts) - len(seen)
        assert lost == 0 or batch_size == 1 or any(0 < count < world for count in counts)
        assert world > 1 or lost == 0


@given(st.integers(1, 60), st.integers(2, 6), st.integers(2, 4))
def test_ranks_together_see_what_one_process_sees(count, batch_size, world):
    groups = [np.arange(count)]
    options = {"shuffle": True, "seed": 1, "epoch": 2}
    one = epoch_batches(groups, batch_size * world, **options)
    ranks = [epoch_batches(groups, batch_size, rank=rank, world=world, **options) for rank in range(world)]
    together = [np.concatenate(step) for step in zip(*ranks, strict=True)]
    for ours, theirs in list(zip(together, one, strict=False))[:-2]:  # the last two may share the tail differently
        np.testing.assert_array_equal(ours, theirs)


def test_a_last_partial_batch_is_kept_or_dropped():
    batches = epoch_batches([np.arange(10)], 4)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(batch) for batch in epoch_batches([np.arange(10)], 4, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in epoch_batches([np.arange(8)], 4, drop_last=True)] == [4, 4]


def test_a_tail_smaller_than_the_ranks_is_spread():
    ranks = [epoch_batches([np.arange(13)], 3, rank=rank, world=4) for rank in range(4)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[3, 1], [2, 1], [2, 1], [2, 1]]


def test_order_follows_seed_and_epoch():
    def order(**options):
        return np.concatenate(epoch_batches([np.arange(50)], 8, shuffle=True, **options)).tolist()

    assert order(seed=1, epoch=0) == order(seed=1, epoch=0)
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_sampler_goes_on_where_it_is_told_to():
    sampler = EpochBatchSampler([np.arange(10)], 3, shuffle=True, seed=0)
    sampler.set_epoch(2)
    whole = list(sampler)
    assert len(whole) == len(sampler) == 4
    assert {epoch for batch in whole for epoch, _ in batch} == {2}
    sampler.start = 3
    assert list(sampler) == whole[3:]
    sampler.set_epoch(2)
    assert sampler.start == 3
    sampler.set_epoch(3)
    assert sampler.start == 0


@pytest.mark.parametrize("world", [1, 3])
def test_length_is_that_of_every_epoch(world):
    sampler = EpochBatchSampler(groups_of([11, 7]), 2, shuffle=True, seed=0, rank=world - 1, world=world)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)


@pytest.mark.slow
@given(sizes, st.integers(1, 7), st.integers(1, 5), st.booleans(), st.booleans())
def test_what_is_never_seen_is_counted(counts, batch_size, world, shuffle, drop_last):
    groups = groups_of(counts)
    options = {"shuffle": shuffle, "drop_last": drop_last, "seed": 3, "world": world}
    missing = EpochBatchSampler(groups, batch_size, **options).never_seen()
    for epoch in range(20):
        ranks = [epoch_batches(groups, batch_size, rank=rank, epoch=epoch, **options) for rank in range(world)]
        seen = np.concatenate([np.zeros(0, int), *(batch for batches in ranks for batch in batches)])
        for group, lost in zip(groups, missing, strict=True):
            unseen = len(np.setdiff1d(group, seen))
            assert unseen >= lost
            if not shuffle or lost:
                assert unseen == lost


def test_held_out_entries_spread_the_timesteps_of_any_number_of_samples():
    places = [held_out_entries(number)["quantile"] for number in range(100)]
    assert places[:3] == pytest.approx([0.5, 0.118034, 0.736068], abs=1e-6) and all(0 <= place < 1 for place in places)
    for count in (8, 20, 100):
        counts = np.histogram(places[:count], count // 4, (0, 1))[0]
        assert counts.min() >= 2 and counts.max() <= 6


def test_repeated_samples_come_as_often_as_their_weight():
    group, weights = np.arange(6), np.array([2.5] * 4 + [1.0] * 2)
    epochs = [repeated(group, weights, epoch, seed=0) for epoch in range(4)]
    for found in epochs:
        assert len(set(found.tolist())) == len(found) == 4 * 2 + 2 + 2  # each time has its own number
        counts = np.bincount(found % 6)
        assert sorted(counts[:4]) == [2, 2, 3, 3] and counts[4:].tolist() == [1, 1]
    for pair in (epochs[:2], epochs[2:]):
        assert np.bincount(np.concatenate(pair) % 6).tolist() == [5, 5, 5, 5, 2, 2]
    assert repeated(np.arange(1), np.array([0.3]), 7, 0).tolist() == [0]


def test_items_of_repeated_samples_have_names_of_their_own():
    options = {"shuffle": True, "seed": 1}
    sampler = EpochBatchSampler([np.arange(3)], 2, "abc", np.array([2.0, 1.0, 0.5]), **options)
    plain = EpochBatchSampler([np.arange(3)], 2, "abc", **options)
    items = [item for batch in sampler for item in batch]
    assert len(sampler) == 2 and sorted(items) == [(0, 0), (0, 0, 1), (0, 1), (0, 2)]
    assert sorted(map(sample_name, items), key=str) == [0, "0/1", 1, 2]
    assert sampler.described() != plain.described() and plain.described()["weights"] == ""


def test_a_loader_continues_only_with_the_same_weights():
    plain, weighted = (EpochBatchSampler([np.arange(8)], 2, weights=weights) for weights in (None, np.full(8, 2.0)))
    state = {**ResumableLoader(range(8), plain).state_dict(), "batch": 1}
    older = {key: value for key, value in state.items() if key != "weights"}
    for found, sampler, start in ((state, plain, 1), (older, plain, 1), (state, weighted, 0), (older, weighted, 0)):
        ResumableLoader(range(8), sampler).load_state_dict(found)
        assert sampler.start == start


def test_steps_of_repeated_samples_are_counted_with_their_weights():
    heavy = EpochBatchSampler([np.arange(6)], 16, (), np.full(6, 10.0), shuffle=True, seed=0)
    assert sum(map(len, heavy)) == 60 and heavy.largest_step(4) == 60 and heavy.largest_step(2) == 32
    groups, options = groups_of([8, 3]), {"shuffle": True, "drop_last": True, "seed": 0}
    for weight, missing in ((0.5, [0, 3]), (1.0, [0, 3]), (1.4, [0, 0])):
        weights = np.array([1.0] * 8 + [weight] * 3)
        assert EpochBatchSampler(groups, 4, (), weights, **options).never_seen() == missing
