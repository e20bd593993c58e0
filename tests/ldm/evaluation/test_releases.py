"""Tests of the evaluation of two releases, and of the distances of their samples."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch

from ldm.evaluation.releases import Settings, evaluate_releases
from ldm.evaluation.samples import Sampling, sample_distances
from ldm.models.diffusion.text_to_image import Request
from ldm.shards.index import write_index
from ldm.util import UserError
from tests.ldm.evaluation.conftest import KEYS, constant
from tests.training_runs import TEXT_TOWER

BASE, TUNED = Path("base.ckpt"), Path("tuned.ckpt")


class Loader:
    """Loader that returns copies of models by path, and counts the earlier copies still in memory at each load."""

    def __init__(self, **models) -> None:
        self.models = models
        self.alive: list[int] = []
        self._returned: list[weakref.ref] = []

    def __call__(self, path: Path):
        self.alive.append(sum(reference() is not None for reference in self._returned))
        model = copy.deepcopy(self.models[path.stem])
        self._returned.append(weakref.ref(model))
        return model


def test_one_model_is_in_memory_at_a_time(shard, reader):
    load = Loader(base=reader, tuned=reader)
    sampling = Sampling(count=1, steps=2, scale=1.0)
    evaluate_releases(load, BASE, TUNED, {"one": str(shard), "two": str(shard)}, Settings(2, sampling=sampling))
    assert load.alive == [0, 0]


def test_captions_are_read_with_the_settings_of_the_sets(shard, reader, make_model):
    long = {**TEXT_TOWER, "params": {**TEXT_TOWER["params"], "max_chunks": 2}}
    double = make_model(use_ema=False, cond_stage_key="txt", cond_stage_config=long)

    def loss(model, **options):
        write_index(shard.parent, {"shards": [{"name": shard.name}], **options})
        (result,) = evaluate_releases(Loader(base=model, tuned=model), BASE, TUNED, {"one": str(shard)}, Settings(1))
        assert (result.comparison.base == result.comparison.tuned).all()
        return result.comparison.base

    expected = loss(double)  # a setting of its config, whatever the set has
    assert (loss(reader, max_tokens=150) == expected).all() and (loss(double, max_tokens=225) == expected).all()
    assert (loss(reader) != expected).any()
    with pytest.raises(UserError, match="clip_skip 2: the text encoder has no more layers than 1"):
        loss(reader, clip_skip=2)


def test_a_model_compared_with_itself_has_no_drift(shard, reader):
    sampling = Sampling(count=2, seed=7, steps=2, scale=2.0, sampler="dpm_solver")
    (result,) = evaluate_releases(
        Loader(base=reader, tuned=reader), BASE, TUNED, {"one": str(shard)}, Settings(4, 2, 3, sampling)
    )
    assert result.timesteps == [6, 18, 31, 43] and result.comparison.base.shape == (3, 4)
    assert (result.comparison.drift == 0).all()
    assert (result.comparison.base == result.comparison.tuned).all()
    assert result.distances.base_to_tuned == [0.0, 0.0]
    assert result.distances.base_to_image == result.distances.tuned_to_image
    assert all(0 < distance <= 1 for distance in result.distances.base_to_image)
    assert result.tuned.keys == ["a", "b"]  # two of the three that the limit keeps: a, b, d
    assert [tuple(request) for request in result.tuned.requests] == [
        Request("an image of a", 7),
        Request("an image of b", 8),
    ]


def test_distances_of_samples_by_hand():
    black, white = -torch.ones(3, 8, 8), torch.ones(3, 8, 8)
    found = sample_distances(torch.stack([black, black]), torch.stack([black, white]), [white, white])
    assert found == ([0, 1], [1, 1], [1, 0])
    assert {name: interval.value for name, interval in found.means().items()} == {
        "base_to_tuned": 0.5,
        "base_to_image": 1.0,
        "tuned_to_image": 0.5,
    }


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (0.0, 1.0, "base.ckpt: predicts zero, as an untrained model does"),
        (float("nan"), 1.0, "base.ckpt: predicts NaN or infinity for 'a' of set 'new' at timestep 12"),
        (1.0, float("inf"), "tuned.ckpt: predicts NaN or infinity for 'a' of set 'new' at timestep 12"),
    ],
)
def test_zero_and_non_finite_predictions_are_refused(shard, model, base, tuned, message):
    values = {"base": base, "tuned": tuned}

    def load(path: Path):
        return constant(copy.deepcopy(model), values[path.stem])

    with pytest.raises(UserError, match=message):
        evaluate_releases(load, BASE, TUNED, {"new": str(shard)}, Settings(2))


def test_samples_need_a_model_that_reads_captions(shard, model):
    with pytest.raises(UserError, match="reads no captions"):
        evaluate_releases(Loader(base=model), BASE, TUNED, {"new": str(shard)}, Settings(sampling=Sampling(1)))


def test_all_images_without_a_limit(shard, model):
    (result,) = evaluate_releases(Loader(base=model, tuned=model), BASE, TUNED, {"n": str(shard)}, Settings(1))
    assert result.image_set.keys == KEYS and result.distances is None
