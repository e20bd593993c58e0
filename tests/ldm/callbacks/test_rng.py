"""Tests of the random streams per step, which do not depend on earlier random numbers."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from ldm.callbacks.rng import StepSeeds, preserved_rng, seed_all


def draw():
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


def test_seed_all_seeds_three_generators_from_all_words():
    drawn = set()
    for words in [(1, 2), (2, 1), (1, 3)]:
        seed_all(*words)
        first = draw()
        seed_all(*words)
        assert draw() == first
        drawn |= set(first)
    assert len(drawn) == 9


def test_preserved_rng():
    seed_all(1)
    expected = draw()
    seed_all(1)
    with preserved_rng():
        seed_all(2)
        draw()
    assert draw() == expected


def test_the_random_numbers_of_a_step_do_not_depend_on_earlier_ones():
    def stream(seed, step, batch_idx, rank=0, before=0):
        torch.rand(before)
        trainer = SimpleNamespace(global_step=step, global_rank=rank, fit_loop=SimpleNamespace(batch_idx=-1))
        StepSeeds(seed).on_train_batch_start(trainer, None, None, batch_idx)
        of_step = draw()
        StepSeeds(seed).on_train_batch_end(trainer, None, None, None, batch_idx)
        return of_step, draw()

    assert stream(1, 5, 2) == stream(1, 5, 2, before=9)
    different = [stream(1, 5, 2), stream(2, 5, 2), stream(1, 6, 2), stream(1, 5, 3), stream(1, 5, 2, rank=1)]
    assert len({drawn for pair in different for drawn in pair}) == 10, "noise and data of a step differ, too"


def test_an_optimizer_has_the_same_random_numbers_in_all_processes():
    def drawn(rank, world, step=3):
        trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world)
        seeds = StepSeeds(1)
        seeds.on_train_batch_start(trainer, None, None, 0)
        seeds.on_before_optimizer_step(trainer, None, None)
        return draw()

    assert drawn(0, 2) == drawn(1, 2) != drawn(0, 2, step=4)
    assert drawn(0, 1) != drawn(0, 2)  # alone, the step's stream goes on
