"""Every sampler against the golden case."""

from __future__ import annotations

import pytest

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from tests.golden_data import case, cases, relative_error, seeded_tensor, tensors

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", cases("sampler"))
def test_golden(name: str, sampler: str, model: LatentDiffusion) -> None:
    spec = case(name)
    samples, _ = SAMPLERS[sampler](model).sample(
        S=spec["steps"],
        batch_size=2,
        shape=spec["shape"],
        conditioning=seeded_tensor(f"{name}/context", (2, 7, 64)),
        unconditional_conditioning=seeded_tensor(f"{name}/uncond", (2, 7, 64)),
        unconditional_guidance_scale=spec["unconditional_guidance_scale"],
        eta=spec["eta"],
        x_T=seeded_tensor(f"{name}/x_T", (2, *spec["shape"])),
        verbose=False,
    )
    assert relative_error(samples, tensors("cases")[f"{name}/{sampler}"]) < 1e-4
