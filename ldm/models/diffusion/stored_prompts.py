"""Encodings of prompts, made once and kept in a file, for a model without a text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import open_checkpoint, save_state_dict, weights_of
from ldm.models.diffusion.conditioning import caption_encodings
from ldm.modules.encoders.caption_settings import DEFAULT, CaptionSettings, caption_settings
from ldm.shards.sample import CONTEXT
from ldm.util import UserError, refuse_if

_ABOUT = "prompts"  # metadata of the file, as JSON: texts, release and digests


@dataclass(frozen=True)
class StoredPrompts:
    """Encodings of prompts.

    Args:
        encodings: by prompt and by member of a sample: `t5` (77, D), and for SDXL `pooled` (E,). float32.
        release: path of the release whose text encoder made them.
        digests: digests of the text towers, by their names in an index.
        captions: settings of the text encoder.
    """

    encodings: dict[str, dict[str, Tensor]]
    release: str
    digests: dict[str, str | None] = field(default_factory=dict)
    captions: CaptionSettings = DEFAULT

    @classmethod
    @torch.no_grad()
    def encoded(
        cls, stage: nn.Module, texts: Sequence[str], release: str, digests: Mapping[str, str | None]
    ) -> StoredPrompts:
        """Encode `texts` one by one, so that no encoding depends on the others.

        Raises:
            UserError: an encoding is not finite.
        """
        encodings = {}
        for text in dict.fromkeys(texts):
            parts = caption_encodings(stage, [text])
            encodings[text] = {member: part[0].float().cpu() for member, part in parts.items()}
            refuse_if(
                not all(part.isfinite().all() for part in encodings[text].values()),
                f"{release}: its text encoder encodes {text!r:.100} to NaN or infinities",
            )
        return cls(encodings, release, dict(digests), caption_settings(stage))

    def save(self, path: Path) -> None:
        """Write the encodings to `path`, a `.safetensors` file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{number}.{member}": part.contiguous()
            for number, parts in enumerate(self.encodings.values())
            for member, part in parts.items()
        }
        about = {"texts": list(self.encodings), "release": self.release, "digests": self.digests}
        about |= self.captions.entries()
        save_state_dict(tensors, path, metadata={_ABOUT: json.dumps(about)})

    def check_length(self, shapes: Mapping[str, Iterable[tuple[int, ...]]], option: str) -> None:
        """Check that captions with encodings of these `shapes`, by member, have as many states as the prompts.

        Raises:
            UserError: the numbers differ. The message ends in `option`, which names another config.
        """
        own = next(iter(self.encodings.values())).get(CONTEXT)
        other = next((shape for shape in shapes.get(CONTEXT, ()) if own is not None and len(shape) == own.ndim), None)
        if own is not None and other is not None and other[0] != len(own):
            raise UserError(
                f"encodes a prompt to {len(own)} states, but the captions in the shards have {other[0]}; give a config "
                f"with the max_chunks of the shards: {option}"
            )

    @classmethod
    def load(cls, path: Path) -> StoredPrompts:
        """Read a file of `save`.

        Raises:
            UserError: the file is damaged, or a value is not finite.
        """
        opened = open_checkpoint(path)
        try:
            about: dict[str, Any] = json.loads(opened.metadata[_ABOUT])
            texts = {str(number): text for number, text in enumerate(about["texts"])}
            encodings: dict[str, dict[str, Tensor]] = {text: {} for text in about["texts"]}
            for key, part in weights_of(opened.content, path).items():
                number, _, member = key.partition(".")
                encodings[texts[number]][member] = part.clone()
            stored = cls(encodings, about["release"], {**about["digests"]}, CaptionSettings.from_entries(about))
            stored._check()
            return stored
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
            raise UserError(f"{path}: not a file of encoded prompts, or damaged; remove it") from error

    def _check(self) -> None:
        """Raise `ValueError` unless texts are text, and all prompts have finite encodings of equal shapes."""
        texts = [*self.encodings, self.release, *(digest for digest in self.digests.values() if digest is not None)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text is of another type")
        if not all(type(value) is int for value in self.captions):
            raise ValueError("a setting is no number")
        shapes = [{member: part.shape for member, part in parts.items()} for parts in self.encodings.values()]
        if not shapes or not shapes[0] or any(each != shapes[0] for each in shapes):
            raise ValueError("its encodings differ in shape")
        if not all(part.float().isfinite().all() for parts in self.encodings.values() for part in parts.values()):
            raise ValueError("an encoding is not finite")
