"""Models and conditionings of the second edition's golden cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.golden_data import case, fill_seeded, seeded_tensor


def build_v2(name: str, target: str | None = None, filled: bool = True, **changes: Any) -> LatentDiffusion:
    """Return the model of the case `name`, with seeded weights if `filled`; keyword arguments change its params."""
    spec = case(name)
    params = {**spec["params"], **changes}
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": params["cond_stage_key"]}}
    if "hybrid" in params["conditioning_key"] and not (target or "target" in spec):
        params.setdefault("concat_keys", ["map"])
    stages = {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": spec["unet"],
        },
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": spec["first_stage"]},
        "cond_stage_config": spec.get("cond_stage", dummy),
    }
    target = target or spec.get("target", "ldm.models.diffusion.ddpm.LatentDiffusion")
    model = instantiate_from_config({"target": target, "params": {**stages, **params}})
    return fill_seeded(model) if filled else model


def given(value: Any, name: str) -> Tensor:
    """Return the numbers of a case, or the seeded tensor of the shape in it."""
    return seeded_tensor(name, value["shape"]) if isinstance(value, dict) else torch.tensor(value)


def conditioning_of(name: str, prefix: str = "") -> dict[str, Any]:
    """Return the conditioning of the case `name`; with the prefix `un`, the unconditional one."""
    spec, cond = case(name)["cond"], {}
    if "c_crossattn" in spec:
        cond["c_crossattn"] = [seeded_tensor(f"{name}/{prefix}c_crossattn", spec["c_crossattn"])]
    if "c_concat" in spec:
        parts = [(part, seeded_tensor(f"{name}/{part['name']}", part["shape"])) for part in spec["c_concat"]]
        maps = [(values > 0).float() if part.get("binary") else values for part, values in parts]
        cond["c_concat"] = [torch.cat(maps, dim=1)]
    if "c_adm" in spec:
        cond["c_adm"] = given(spec["c_adm"], f"{name}/{prefix}c_adm")
    return cond


def dropped(cond: dict[str, Any], null: Tensor, text: list[bool], images: list[bool]) -> dict[str, Any]:
    """`cond` with the context `null` in rows `text`, and no image in rows `images`."""
    no_text, no_image = torch.tensor(text)[:, None, None], torch.tensor(images)[:, None, None, None]
    context, maps = cond["c_crossattn"][0], cond["c_concat"][0]
    return {**cond, "c_crossattn": [torch.where(no_text, null, context)], "c_concat": [maps * ~no_image]}


def without_noise(model: LatentDiffusion) -> LatentDiffusion:
    """Return the model, whose first stage's posterior has no variance."""
    conv = model.first_stage_model.quant_conv
    half = len(conv.bias) // 2
    with torch.no_grad():
        conv.weight[half:] = 0
        conv.bias[half:] = -30
    return model
