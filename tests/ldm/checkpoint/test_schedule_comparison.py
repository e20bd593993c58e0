"""The noise schedule is the config's, whatever a file holds."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import load_into
from ldm.modules.diffusionmodules.schedule import diffusion_buffers, make_beta_schedule


class Model(nn.Module):
    scale_by_std = False

    def __init__(self, steps=1000):
        super().__init__()
        self.model = nn.Linear(2, 2)
        for key, value in schedule(steps=steps).items():
            self.register_buffer(key, value)


def schedule(end=0.012, steps=1000):
    buffers = diffusion_buffers(make_beta_schedule("linear", steps, 0.00085, end))
    return {key: torch.as_tensor(np.asarray(value), dtype=torch.float32) for key, value in buffers.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_without_schedule_takes_no_rounded_schedule_and_says_nothing(dtype, caplog):
    model = Model()
    cast = {key: value.to(dtype) for key, value in schedule().items()}
    load_into(model, {**dict(model.model.state_dict(prefix="model.")), **cast}, source="r.safetensors")
    assert all(torch.equal(getattr(model, key), value) for key, value in schedule().items())
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_without_schedule_compares_infinite_values(caplog):
    """At zero terminal SNR, the last values of two buffers are infinite."""
    model = Model()
    for key in ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"):
        getattr(model, key)[-1] = torch.inf
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    load_into(model, weights, source="r.safetensors")
    assert not caplog.records
    weights["sqrt_recip_alphas_cumprod"][:] *= 2
    load_into(model, weights, source="r.safetensors")
    load_into(Model(), weights, source="r.safetensors")
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["recip_" in message for message in messages] == [True, True]


OTHER = {
    "another end": schedule(end=0.02),
    "another length": schedule(steps=500),
    "NaN": {"betas": torch.full((1000,), torch.nan)},
    "integers": {"alphas_cumprod": torch.zeros(1000, dtype=torch.int64)},
}


@pytest.mark.parametrize("other", OTHER)
def test_without_schedule_names_another_schedule(other, caplog):
    model = Model()
    load_into(model, {**dict(model.model.state_dict(prefix="model.")), **OTHER[other]}, source="r.safetensors")
    assert all(torch.equal(getattr(model, key), value) for key, value in schedule().items())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("r.safetensors: the noise schedule (") and "config, whose schedule is used" in warning


@pytest.mark.parametrize("measured", [False, True])
def test_without_schedule_leaves_a_measured_scale_factor(measured):
    model = Model()
    model.register_buffer("scale_factor", torch.tensor(1.0))
    model.scale_by_std = measured
    load_into(model, {**dict(model.model.state_dict(prefix="model.")), "scale_factor": torch.tensor(0.25)})
    assert model.scale_factor.item() == (0.25 if measured else 1.0)
