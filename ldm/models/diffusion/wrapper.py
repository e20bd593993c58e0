"""UNet with conditioning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock
from ldm.util import UserError, check_choice, instantiate_from_config, refuse_if

logger = logging.getLogger(__name__)

# By key: whether maps join the input channels, whether there is a context, and the source of `y`.
_PLACES: dict[str | None, tuple[bool, bool, str | None]] = {
    None: (False, False, None),
    "concat": (True, False, None),
    "crossattn": (False, True, None),
    "hybrid": (True, True, None),
    "adm": (False, False, "c_crossattn"),
    "crossattn-adm": (False, True, "c_adm"),
    "hybrid-adm": (True, True, "c_adm"),
}
CONDITIONING_KEYS = tuple(_PLACES)
_PARTS = (True, False, "all", "attn", "conv_in")  # of the UNet, that may train


class DiffusionWrapper(nn.Module):
    """UNet whose `conditioning_key` selects the inputs of the conditioning.

        None            no conditioning
        concat          maps, concatenated to the input's channels
        crossattn       contexts of the attention, concatenated along the tokens
        hybrid          maps and contexts
        adm             class labels or vectors `y`
        crossattn-adm   contexts and `y`
        hybrid-adm      maps, contexts and `y`

    Raises:
        UserError: the key is unknown, the UNet has labels and the key has none or the reverse, or
            `sequential_crossattn` is true.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        check_choice("conditioning_key", conditioning_key, CONDITIONING_KEYS)
        self.diffusion_model = instantiate_from_config(_without_order(diff_model_config))
        self.conditioning_key = conditioning_key
        if _PLACES[conditioning_key][1] and getattr(self.diffusion_model, "context_dim", 0) is None:
            logger.warning(
                "conditioning_key %s: the UNet ignores the cond stage; set use_spatial_transformer and context_dim in "
                "the params of unet_config",
                conditioning_key,
            )
        if hasattr(self.diffusion_model, "num_classes"):
            self._check_labels(self.diffusion_model.num_classes)

    def _check_labels(self, num_classes: int | str | None) -> None:
        """Raise `UserError` unless the key gives labels to a UNet with classes, and to no other."""
        key, has_labels = self.conditioning_key, _PLACES[self.conditioning_key][2] is not None
        refuse_if(
            has_labels and num_classes is None,
            f"conditioning_key {key!r} needs labels, but unet_config has no num_classes; name a key without "
            "adm, or set num_classes",
        )
        refuse_if(
            num_classes is not None and not has_labels,
            f"num_classes {num_classes!r}: conditioning_key {key!r} gives the UNet no labels; name one of "
            f"{', '.join(name for name, place in _PLACES.items() if place[2])}, or leave num_classes out",
        )

    @property
    def takes_maps(self) -> bool:
        """True if maps join the input's channels."""
        return _PLACES[self.conditioning_key][0]

    def train_only(self, part: bool | str) -> None:
        """Turn gradients on for `part` of the UNet, and off for the rest; see `unet_trainable` of `LatentDiffusion`.

        Raises:
            UserError: `part` is unknown, or this UNet has no such part.
        """
        if part not in _PARTS:
            raise UserError(f"unet_trainable {part!r} is unknown; valid: true, false, {', '.join(_PARTS[2:])}")
        self.requires_grad_(part in (True, "all"))
        unet = self.diffusion_model
        if part == "attn":
            chosen = [block.attn2 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
        else:
            chosen = [unet.input_blocks[0]] if part == "conv_in" else []
        refuse_if(
            part == "attn" and not chosen,
            "unet_trainable 'attn': the UNet has no attention to a context; set it to true",
        )
        for module in chosen:
            module.requires_grad_(True)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction for x (B, C, H, W) at t (B,), with the conditioning of the key.

        Args:
            c_concat: maps (B, C', H, W).
            c_crossattn: contexts (B, M, D); for `adm`, the labels (B,) or vectors (B, D).
            c_adm: labels (B,) or vectors (B, D).

        Raises:
            UserError: a part of the conditioning is missing, or a map does not have the size of `x`.
        """
        maps, context, labels = _PLACES[self.conditioning_key]
        parts = {"c_concat": c_concat, "c_crossattn": c_crossattn, "c_adm": c_adm}
        for name, wanted in (("c_concat", maps), ("c_crossattn", context), (labels, labels is not None)):
            if wanted and parts[name] is None:
                raise UserError(
                    f"conditioning_key {self.conditioning_key!r} needs {name}, but the conditioning has none"
                )
        kwargs: dict[str, Tensor] = {}
        if maps:
            self._check_maps(x, c_concat)
            x = torch.cat([x, *c_concat], dim=1)
        if context:
            kwargs["context"] = torch.cat(list(c_crossattn), dim=1)
            self._check_context(kwargs["context"])
        if labels is not None:
            kwargs["y"] = c_adm if labels == "c_adm" else c_crossattn[0]
        return self.diffusion_model(x, t, **kwargs)

    def _check_maps(self, x: Tensor, maps: Sequence[Tensor]) -> None:
        """Raise `UserError` unless the maps have the size of `x`, and the UNet as many input channels as all."""
        for each in maps:
            if each.ndim != x.ndim or each.shape[2:] != x.shape[2:]:
                raise UserError(
                    f"conditioning_key {self.conditioning_key!r} needs maps of the input's size {tuple(x.shape[2:])}, "
                    f"but the conditioning has shape {tuple(each.shape)}; captions need conditioning_key: crossattn"
                )
        own = getattr(self.diffusion_model, "in_channels", None)
        if own is not None and own != x.shape[1] + sum(part.shape[1] for part in maps):
            found = ", ".join(str(tuple(part.shape[1:])) for part in maps)
            raise UserError(
                f"unet_config: in_channels {own}, but the latent has {x.shape[1]} channels and the maps of the "
                f"conditioning have the shapes {found}; give their sum"
            )

    def _check_context(self, context: Tensor) -> None:
        """Raise `UserError` unless the context has as many features as the UNet's attention takes."""
        own = getattr(self.diffusion_model, "context_dim", None)
        if own is not None and context.shape[-1] != own:
            raise UserError(
                f"unet_config: context_dim {own}, but the cond stage gives {context.shape[-1]} features per token; "
                "set context_dim to them, or use another text encoder"
            )


def _without_order(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the UNet's config without `sequential_crossattn`, a key beside `target` in some published configs."""
    if not isinstance(config, Mapping) or "sequential_crossattn" not in config:
        return config
    refuse_if(config["sequential_crossattn"], "sequential_crossattn: true is not supported; set it to false")
    return {key: value for key, value in config.items() if key != "sequential_crossattn"}
