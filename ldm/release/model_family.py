"""Family of a model by its parts, whatever their sizes: a small model of a family's kind is of that family."""

from __future__ import annotations

import logging

from ldm.checkpoint.keys import COND_STAGE, CONDITIONER
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.release.families import FAMILIES, PARAMETERIZATIONS, Family
from ldm.release.recognition import find_family, shapes_of

logger = logging.getLogger(__name__)

_ANY_SIDE = 64  # cells: `image_size` of the first released configs, whatever the size of the training images
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


def own_side(model: LatentDiffusion) -> int:
    """Return the side in pixels of the images that a model samples by default.

    It is the config's `image_size`, or that of the family if the config has the 64 cells of the first released configs.
    """
    side = model.image_size * model.first_stage_model.downsampling
    if model.image_size != _ANY_SIDE or model.parameterization not in PARAMETERIZATIONS:
        return side
    family = find_family(shapes_of(model.state_dict()), parameterization=model.parameterization)
    if family is None or family.size == side:
        return side
    logger.info("%s samples images of %d pixels by default, not %d", family.name, family.size, side)
    return family.size
