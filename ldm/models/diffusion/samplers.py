"""Table of the samplers, which command lines and sampling read. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.util import get_obj_from_str

if TYPE_CHECKING:
    from ldm.models.diffusion.sampling import Sampler

# Name → class.
SAMPLERS = {
    "ddim": "ldm.models.diffusion.ddim.DDIMSampler",
    "plms": "ldm.models.diffusion.plms.PLMSSampler",
    "dpm_solver": "ldm.models.diffusion.dpm_solver.DPMSolverSampler",
}


def sampler_class(name: str) -> type[Sampler]:
    """Import and return the class of a key of `SAMPLERS`."""
    return get_obj_from_str(SAMPLERS[name])
