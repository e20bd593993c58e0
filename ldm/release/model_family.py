"""Family of a model by its parts, whatever their sizes: a small model of a family's kind is of that family."""

from __future__ import annotations

from ldm.checkpoint.keys import COND_STAGE, CONDITIONER
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.release.families import FAMILIES, Family

_TOKENS = "token_embedding.weight"


def family_of_model(model: LatentDiffusion) -> Family | None:
    """Return the family with the text encoders, the conditioning and the input maps of `model`; None if there is none.

    Among several, the one that predicts what `model` does.
    """
    keys = model.state_dict().keys()
    towers = {key for key in keys if key.endswith(_TOKENS) and key.startswith((COND_STAGE, CONDITIONER))}
    maps = getattr(model.model.diffusion_model, "in_channels", model.channels) - model.channels
    found = [
        family
        for family in FAMILIES.values()
        if family.layout.towers.keys() == towers
        and family.conditioning_key == model.model.conditioning_key
        and family.in_channels - family.channels == maps
    ]
    return next(
        (family for family in found if family.parameterization == model.parameterization), next(iter(found), None)
    )
