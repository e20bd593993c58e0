"""Loading of the weights of LPIPS, the perceptual distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import load_state_dict
from ldm.checkpoint.keys import FIRST_STAGE
from ldm.modules.losses.lpips import LPIPS
from ldm.util import UserError

# Prefixes of the keys of LPIPS in checkpoints of autoencoders.
_PREFIXES = (f"{FIRST_STAGE}loss.perceptual_loss.", "loss.perceptual_loss.", "perceptual_loss.")


def fill_lpips(model: LPIPS, files: str | Sequence[str]) -> None:
    """Load the weights of one or several `files` into `model`.

    A file is the checkpoint of an autoencoder trained with LPIPS (`loss.perceptual_loss.*`), the weights of VGG16 from
    torchvision (`features.*`), or those of LPIPS (`lin*.model.1.weight`). By default, the last are taken from
    torchmetrics.

    Raises:
        UserError: a file cannot be read, or weights are missing or have other shapes.
    """
    own = model.state_dict()
    slices = {key.split(".", 2)[2]: key for key in own if key.startswith("net.")}  # "0.weight" → the key in its slice
    paths = [files] if isinstance(files, str) else list(files)
    found: dict[str, Tensor] = {}
    for path in [_published_weights(), *paths]:
        for key, value in load_state_dict(path).items():
            for prefix in _PREFIXES:
                key = key.removeprefix(prefix)
            name = slices.get(key.removeprefix("features."), key) if key.startswith("features.") else key
            if name in own:
                if own[name].shape != value.shape:
                    raise UserError(f"{path}: {key} has shape {tuple(value.shape)}; {tuple(own[name].shape)} is needed")
                found[name] = value
    missing = [key for key in own if key not in found and not key.startswith("scaling_layer.")]
    if missing:
        raise UserError(
            f"perceptual_ckpt {', '.join(map(str, paths))}: lacks {missing[0]} ({len(missing)} of {len(own)} weights "
            "are missing); give VGG16's weights, such as vgg16-397923af.pth, or an autoencoder's training checkpoint"
        )
    model.load_state_dict({**own, **found})


def _published_weights() -> Path:
    """Return the file with the weights of LPIPS on VGG16 in the package torchmetrics."""
    import torchmetrics

    return Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
