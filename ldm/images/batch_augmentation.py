"""Augmentation of image batches on the device with kornia, for training from images.

The name of a sample's random stream seeds its parameters. They depend only on seed, epoch and sample, not on the batch,
the processes or a resume. All images of a batch are transformed together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError, check_keys

# Operations by their name in YAML: kornia's class, and the valid arguments.
_OPERATIONS = {
    "random_resized_crop": ("RandomResizedCrop", {"scale", "ratio"}),
    "color_jitter": ("ColorJiggle", {"brightness", "contrast", "saturation", "hue"}),
    "affine": ("RandomAffine", {"degrees", "translate", "scale", "shear"}),
}
_OF_THE_BATCH = ("forward_input_shape", "order")  # parameters of the whole batch


class BatchAugmentation:
    """Random resized crop, colour jitter and small affine transforms, in this order. Each is optional.

    Args:
        operations: arguments by operation, such as `{"color_jitter": {"brightness": 0.1}}`. The crop keeps the image
            size. Affine transforms fill the border by reflection.

    Raises:
        UserError: an operation or argument is unknown, a value is out of range, or kornia is not installed.
    """

    def __init__(self, operations: Mapping[str, Mapping[str, Any]]) -> None:
        for name, arguments in operations.items():
            check_keys("data.params.augment", [name], _OPERATIONS)
            check_keys(f"data.params.augment.{name}", arguments, _OPERATIONS[name][1])
        self.operations = {name: dict(operations[name]) for name in _OPERATIONS if name in operations}
        self._built: dict[tuple[int, int], list[Any]] = {}  # by image size
        self._build((64, 64))  # checks the values before the first step

    def __call__(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Return the augmented images (B, H, W, 3) in [-1, 1]. `names` has the random stream of each sample."""
        batch = ((images + 1) / 2).clamp(0, 1).permute(0, 3, 1, 2)  # B 3 H W
        for operation in self._build((batch.shape[2], batch.shape[3])):
            batch = operation(batch, params=_parameters(operation, batch.shape, names))
        return (batch * 2 - 1).clamp(-1, 1).permute(0, 2, 3, 1).contiguous()

    def _build(self, size: tuple[int, int]) -> list[Any]:
        if size not in self._built:
            self._built[size] = [self._build_one(name, size) for name in self.operations]
        return self._built[size]

    def _build_one(self, name: str, size: tuple[int, int]) -> Any:
        try:
            import kornia.augmentation as kornia
        except ImportError as error:
            raise UserError("data.params.augment needs kornia: pip install -c constraints.txt '.[augment]'") from error
        arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in self.operations[name].items()}
        if name == "random_resized_crop":
            arguments["size"] = size
        if name == "affine":
            arguments = {"degrees": 0.0, "padding_mode": "reflection", **arguments}
        try:
            return getattr(kornia, _OPERATIONS[name][0])(**arguments, p=1.0)
        except Exception as error:  # kornia raises various exceptions for wrong values
            raise UserError(f"data.params.augment.{name} {self.operations[name]}: {error}") from error


def _parameters(operation: Any, shape: torch.Size, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters of `operation` for a batch of `shape`, seeded per sample by its name."""
    single = torch.Size((1, *shape[1:]))
    parts = []
    with torch.random.fork_rng(devices=[]):
        for name in names:
            seed = hashlib.sha256(f"{type(operation).__name__}/{name}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
            parts.append(operation.forward_parameters(single))
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key not in _OF_THE_BATCH}
    if "order" in parts[0]:
        joined["order"] = torch.arange(len(parts[0]["order"]))  # brightness, contrast, saturation, hue
    return {**joined, "forward_input_shape": torch.tensor(shape)}
