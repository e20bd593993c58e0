"""The numbers of a row are those of its name."""

from __future__ import annotations

import torch

from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams


def test_a_row_draws_the_same_in_every_batch() -> None:
    like = torch.zeros(3, 4, 2, 2, dtype=torch.float64)
    whole = RandomStreams(["a", "b", "c"])
    parts = RandomStreams(["c"]), RandomStreams(["a", "b"])
    for what in ("noise", "latent"):
        expected = whole.normal(what, like)
        assert expected.shape == like.shape and expected.dtype == like.dtype
        assert torch.cat([parts[1].normal(what, like[:2]), parts[0].normal(what, like[:1])]).equal(expected)
    steps = whole.integers("timestep", 1000, like)
    assert steps.shape == (3,) and steps.dtype == torch.long
    assert torch.cat(
        [parts[1].integers("timestep", 1000, like[:2]), parts[0].integers("timestep", 1000, like[:1])]
    ).equal(steps)


def test_names_and_uses_have_streams_of_their_own_whatever_was_drawn_before() -> None:
    like = torch.zeros(1, 8)
    drawn = []
    for name in ("1/0/7", "1/0/8", "1/1/7"):
        for what in ("noise", "latent"):
            drawn.append(RandomStreams([name]).normal(what, like))
            torch.rand(3)
            assert RandomStreams([name]).normal(what, like).equal(drawn[-1])
    assert len({tuple(values.flatten().tolist()) for values in drawn}) == 6


def test_the_numbers_are_standard_normal_and_uniform() -> None:
    like = torch.zeros(2000, 16)
    streams = RandomStreams([f"23/0/{number}" for number in range(2000)])
    noise = streams.normal("noise", like)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(noise.mean(0)).max() < 0.1 and abs(noise.std(0) - 1).max() < 0.1  # at each place, over the rows
    counts = streams.integers("timestep", 10, like).bincount(minlength=10)
    assert counts.min() > 140 and counts.max() < 260 and len(counts) == 10


def test_without_names_the_global_generator_gives_the_batch() -> None:
    like = torch.zeros(2, 3)
    torch.manual_seed(0)
    expected = torch.randn(2, 3), torch.randint(0, 9, (2,))
    torch.manual_seed(0)
    assert GLOBAL_STREAM.normal("noise", like).equal(expected[0])
    assert GLOBAL_STREAM.integers("timestep", 9, like).equal(expected[1])
    assert RandomStreams.of({"f8": like}) == GLOBAL_STREAM and RandomStreams.of({"stream": ["a"]}).names == ["a"]
