"""Tests of the file with the initial results of a run, which may be damaged."""

import math

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.evaluation.baseline import load_start, save_start
from ldm.evaluation.denoising import Record
from ldm.util import UserError

TIMESTEPS = [5, 20]


class ImageSet:
    """Set of two images named `new`."""

    name = "new"

    def __len__(self):
        return 2

    def digest(self, timesteps):
        return bytes(32)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "start.safetensors"
    record = Record(np.ones((2, 2)), [torch.full((2, 4, 3, 3), float(number)) for number in range(2)])
    save_start(path, [ImageSet()], [record], TIMESTEPS)
    return path


def test_load_start_returns_the_saved_record(path):
    (record,) = load_start(path, [ImageSet()], TIMESTEPS)
    assert record.loss.dtype == np.float64 and record.loss.shape == (2, 2)
    assert [eps.unique().tolist() for eps in record.eps] == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("new.000001", None, "lacks new.000001"),
        ("new.loss", None, "lacks new.loss"),
        ("new.digest", None, "other images"),
        ("new.loss", torch.ones(2), "damaged"),
        ("new.loss", torch.ones(2, 2, dtype=torch.bfloat16), "damaged"),
        ("new.000000", torch.ones(3, 4, 3, 3), "damaged"),
        ("new.000000", torch.ones(()), "damaged"),
        ("new.000000", torch.full((2, 4, 3, 3), math.nan), "not finite"),
        ("new.loss", torch.full((2, 2), math.inf, dtype=torch.float64), "not finite"),
    ],
)
def test_load_start_refuses_a_wrong_file_in_one_line(path, key, value, message):
    tensors = {name: tensor.clone() for name, tensor in load_state_dict(path).items()} | {key: value}
    save_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=rf"start\.safetensors: .*{message}"):
        load_start(path, [ImageSet()], TIMESTEPS)
