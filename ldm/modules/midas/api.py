"""MiDaS, which estimates the depth of an image for Stable Diffusion 2 (arXiv:1907.01341; arXiv:2103.13413).

B batch, H and W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.midas.released_names import from_released, released_name, to_released
from ldm.util import check_choice

# Network of Stable Diffusion 2: a vision transformer over the features of a ResNet-50.
_DPT_HYBRID = {
    "is_hybrid": True,
    "hidden_size": 768,
    "image_size": 384,
    "layer_norm_eps": 1e-6,
    "neck_hidden_sizes": [256, 512, 768, 768],
    "neck_ignore_stages": [0, 1],
    "reassemble_factors": [1, 1, 1, 0.5],
    "readout_type": "project",
    "use_bias_in_fusion_residual": True,
}
_CLASSES = 1000


class MiDaSInference(nn.Module):
    """Relative depth of images: (B, 3, H, W) in [-1, 1] → (B, 1, H, W), larger for nearer objects.

    H and W must be multiples of 32; the network was trained at 384. The package transformers builds the network from
    its layer sizes. The weights come with the checkpoint, and nothing is ever downloaded. State-dict keys are those of
    the released weights, `model.*`. The network is never trained.

    Args:
        model_type: `dpt_hybrid`.

    Raises:
        UserError: `model_type` is not `dpt_hybrid`.
    """

    def __init__(self, model_type: str) -> None:
        super().__init__()
        check_choice("model_type", model_type, ("dpt_hybrid",))
        self.model = _DepthNet(_DPT_HYBRID)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> MiDaSInference:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        depth = self.model(x)[:, None]  # (B, 1, h, w)
        if depth.shape[2:] != x.shape[2:]:
            depth = F.interpolate(depth, x.shape[2:], mode="bicubic", align_corners=False)
        return depth


class _DepthNet(nn.Module):
    """transformers' depth network under MiDaS' state-dict keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import DPTConfig, DPTForDepthEstimation  # takes seconds; only this class needs it

        self.net = DPTForDepthEstimation(DPTConfig(**config))
        self.classifier = nn.Linear(config["hidden_size"], _CLASSES)  # in the release, but not used
        self._names = {released_name(name): name for name in self.net.state_dict()}
        self.register_state_dict_post_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def forward(self, x: Tensor) -> Tensor:
        """Return depths (B, H, W) of images (B, 3, H, W). transformers' own forward takes only squares of one size."""
        net, (height, width) = self.net, x.shape[2:]
        net.dpt.embeddings.image_size = height, width  # its positions can be resized to any size
        embedded = net.dpt.embeddings(x)
        features, h = list(embedded.intermediate_activations), embedded.last_hidden_states
        for number, block in enumerate(net.dpt.encoder.layer):
            h = block(h)
            if number in net.config.backbone_out_indices[2:]:  # the first two are the ResNet's
                features.append(h)
        patch = net.config.patch_size
        return net.head(net.neck(features, height // patch, width // patch))


def _rename_saved(module: _DepthNet, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}net.")}
    released = to_released({key.removeprefix(f"{prefix}net."): value for key, value in own.items()})
    state_dict.update({prefix + key: value for key, value in released.items()})
    for kind in ("weight", "bias"):
        state_dict[f"{prefix}pretrained.model.head.{kind}"] = state_dict.pop(f"{prefix}classifier.{kind}")


def _rename_loaded(module: _DepthNet, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    given = {key: state_dict[key] for key in state_dict if key.startswith(prefix)}
    for key, value in from_released({k.removeprefix(prefix): v for k, v in given.items()}, module._names).items():
        state_dict[f"{prefix}net.{key}"] = value
    for key in given:
        name = key.removeprefix(prefix)
        if name in ("pretrained.model.head.weight", "pretrained.model.head.bias"):
            state_dict[f"{prefix}classifier.{name.rpartition('.')[2]}"] = given[key]
    for key in given:
        if key.startswith((f"{prefix}pretrained.", f"{prefix}scratch.")):
            del state_dict[key]
