"""Recognition, by their keys, of files that hold something else than a release, and what to do with each.

To add a kind, add a row to `_KINDS`. The first row with a match applies.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_UNETS = "this program takes the UNets of Stable Diffusion 1, 2 and XL"
_ADAPTER = "which works beside a release; name the release itself"
_UNET = r"(?:model\.diffusion_model\.|unet\.|diffusion_model\.)?"
# Pattern of a key, name of the kind, and what to do.
_KINDS = [
    # Models of other architectures.
    (rf"^{_UNET}(?:double_blocks|single_blocks|single_transformer_blocks)\.\d+\.", "a Flux model", _UNETS),
    (rf"^{_UNET}joint_blocks\.\d+\.|^{_UNET}transformer_blocks\.\d+\.norm1_context\.", "a Stable Diffusion 3 model",
     _UNETS),
    (rf"^{_UNET}.*(?:\.time_stack\.|\.time_mixer\.|temporal_transformer_blocks\.|\.temporal_res_block\.)",
     "a Stable Video Diffusion model", _UNETS),
    (rf"^{_UNET}(?:clip_txt(?:_pooled)?_mapper|clip_mapper|effnet_mapper|pixels_mapper)\.", "a Stable Cascade model",
     _UNETS),
    (rf"^{_UNET}(?:adaln_single|caption_projection|t_block\.1)\b", "a PixArt model", _UNETS),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner", "give the base model, sd_xl_base_1.0, which is trained"),
    (rf"^{_UNET}(?:time_embed|time_embedding)\.cond_proj\.", "a latent consistency model",
     "fine-tune the model that it was distilled from, and add its LCM LoRA to the result"),
    (rf"^{_UNET}(?:add_embedding\.(?:image|pool|norm1)|encoder_hid_proj\.|add_embedding\.image_proj\.)",
     "a Kandinsky or DeepFloyd model", _UNETS),
    (rf"^{_UNET}(?:blocks|layers|double_layers|transformer_blocks)\.\d+\.", "a diffusion transformer", _UNETS),
    # Files that work beside a release. A release may also carry them.
    (r"^control_model\.|^controlnet_(?:cond_embedding|down_blocks|mid_block)\.", "a ControlNet", _ADAPTER),
    (r"motion_modules?\.", "an AnimateDiff motion module", _ADAPTER),
    (r"^(?:adapter\.)?body\.\d+\.(?:in_conv|block\d?|resnets)\.", "a T2I-Adapter", _ADAPTER),
    (r"^(?:image_proj|ip_adapter)\.", "an IP-Adapter", _ADAPTER),
    (r"^(?:emb_params|\*|clip_[lg]|string_to_(?:param|token)(?:\..*)?)$", "a textual-inversion embedding", _ADAPTER),
    (r"^layer_structure$", "a hypernetwork", _ADAPTER),
    (r"^<[^<>]+>$", "a textual-inversion embedding of diffusers", _ADAPTER),
]  # fmt: skip
_PATTERNS = [(re.compile(pattern), name, remedy) for pattern, name, remedy in _KINDS]
_ARCHITECTURES = _PATTERNS[: next(n for n, (_, name, _) in enumerate(_PATTERNS) if name == "a ControlNet")]


def other_architecture(keys: Collection[str]) -> str | None:
    """Return what a file with these `keys` is, and what to do, if no network here has its architecture."""
    return _found(keys, _ARCHITECTURES)


def other_model(keys: Collection[str]) -> str | None:
    """Return a phrase that names the kind of a file without a UNet, and the remedy. None if its `keys` are unknown."""
    return _found(keys, _PATTERNS)


def _found(keys: Collection[str], patterns: list[tuple[re.Pattern, str, str]]) -> str | None:
    for pattern, name, remedy in patterns:
        if any(pattern.search(key) for key in keys):
            return f"the file is {name}: {remedy}"
    return None
