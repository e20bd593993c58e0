"""Settings for long captions and clip skip. A text encoder of CLIP's kind has 77 positions.

A caption is split into chunks of 75 tokens. Each chunk gets a start and an end token, is padded to 77, and is encoded
alone. B batch, K chunks per caption, L ids per chunk, D features. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.util import UserError, check_number, refuse_if

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

CHUNK = 75  # tokens per chunk, without start and end
MOST_CHUNKS = 10
MOST_TOKENS = MOST_CHUNKS * CHUNK
_LENGTH = CHUNK + 2


class CaptionSettings(NamedTuple):
    """Settings that the encoding of a caption depends on, besides the weights.

    `max_tokens` is the limit per caption, without start and end: a multiple of 75. With `clip_skip` n, the states are
    those of the n-th last layer.
    """

    max_tokens: int = CHUNK
    clip_skip: int = 1

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> CaptionSettings:
        """Return the settings among `entries`. Missing ones have their defaults, as in sets of earlier versions."""
        return cls(**{name: entries[name] for name in cls._fields if name in entries})

    def entries(self) -> dict[str, int]:
        """Return the settings by name that differ from their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    def __str__(self) -> str:
        return f"max_tokens {self.max_tokens} and clip_skip {self.clip_skip}"


DEFAULT = CaptionSettings()


def split_chunks(ids: Tensor, chunks: int) -> Tensor:
    """Return the ids of each chunk: (B, K · L) → (B · K, L)."""
    return ids.unflatten(1, (chunks, -1)).flatten(0, 1)


def joined_chunks(states: Tensor, chunks: int) -> Tensor:
    """Return the states of the chunks one after the other: (B · K, L, D) → (B, K · L, D)."""
    return states.unflatten(0, (-1, chunks)).flatten(1, 2)


def check_chunks(max_chunks: Any, max_length: int) -> None:
    """Raise `UserError` unless captions of `max_chunks` chunks can be read by a tower of `max_length` ids."""
    check_number("max_chunks", max_chunks, least=1, most=MOST_CHUNKS)
    refuse_if(
        max_chunks > 1 and max_length != _LENGTH,
        f"max_chunks {max_chunks}: needs max_length {_LENGTH}, not {max_length}; leave max_length out",
    )


def check_caption_options(max_tokens: int | None, clip_skip: int | None) -> None:
    """Raise `UserError` for a value of `--max-tokens` or `--clip-skip` that no text encoder takes."""
    check_number("--max-tokens", max_tokens, least=CHUNK, most=MOST_TOKENS, optional=True)
    if max_tokens is not None and max_tokens % CHUNK:
        raise UserError(f"--max-tokens {max_tokens}: must be a multiple of {CHUNK}, such as {2 * CHUNK} or {3 * CHUNK}")
    check_number("--clip-skip", clip_skip, least=1, optional=True)


def reads_captions(stage: nn.Module | None) -> bool:
    """Return True if a cond stage has a text encoder with a tokenizer."""
    return bool(_towers(stage))


def caption_settings(stage: nn.Module | None) -> CaptionSettings:
    """Return the settings of a cond stage; the defaults if it reads no captions, or none in chunks.

    Raises:
        UserError: its towers read different numbers of chunks.
    """
    towers = _towers(stage)
    chunks = {getattr(tower.tokenizer, "chunks", 1) for tower in towers} or {1}
    if len(chunks) > 1:
        raise UserError(f"max_chunks: the text encoders differ ({', '.join(map(str, sorted(chunks)))}); give them one")
    return CaptionSettings(CHUNK * chunks.pop(), max([getattr(tower, "clip_skip", 1) for tower in towers] or [1]))


def set_caption_settings(stage: nn.Module, max_tokens: int | None = None, clip_skip: int | None = None) -> None:
    """Change the settings of a cond stage to the values of `--max-tokens` and `--clip-skip`. None keeps a setting.

    Raises:
        UserError: the cond stage cannot have a value. The message begins with the option.
    """
    check_caption_options(max_tokens, clip_skip)
    own = caption_settings(stage)
    wanted = CaptionSettings(max_tokens or own.max_tokens, clip_skip or own.clip_skip)
    for name, reason in _refusals(stage, wanted).items():
        option = f"--{name.replace('_', '-')} {getattr(wanted, name)}"
        raise UserError(f"{option}: {reason}; leave it out")
    if own not in (wanted, DEFAULT):
        log.warning("captions are read with %s, in place of %s of the config or the release", wanted, own)
    _set(stage, wanted)


def follow(stage: nn.Module, wanted: CaptionSettings, whose: str) -> None:
    """Give `stage` the settings `wanted`, with which `whose` captions were encoded. A setting of its config must agree.

    Raises:
        UserError: the config has another setting, or the stage cannot have it.
    """
    own = caption_settings(stage)
    for name, ours, asked, default in zip(wanted._fields, own, wanted, DEFAULT, strict=True):
        refuse_if(
            ours not in (asked, default),
            f"{whose} captions have {name} {asked}, but cond_stage_config of the config has {ours}; give a config "
            "that agrees",
        )
    for name, reason in _refusals(stage, wanted).items():
        raise UserError(
            f"{whose} captions have {name} {getattr(wanted, name)}: {reason}; name the release that encoded them"
        )
    _set(stage, wanted)


def _refusals(stage: nn.Module, wanted: CaptionSettings) -> dict[str, str]:
    """Return the reasons, by name, why a cond stage cannot have the settings `wanted`."""
    own, towers, kind = caption_settings(stage), _towers(stage), type(stage).__name__
    reasons = {}
    if wanted.max_tokens != own.max_tokens:
        in_chunks = towers and all(hasattr(tower.tokenizer, "chunks") for tower in towers)
        if not (in_chunks and all(tower.max_length == _LENGTH for tower in towers)):
            reasons["max_tokens"] = f"the config's {kind} reads no captions in chunks"
    if wanted.clip_skip != own.clip_skip:
        if not hasattr(stage, "clip_skip"):
            reasons["clip_skip"] = (
                f"is for Stable Diffusion 1, not for the config's {kind}; SD 2 and SDXL read the layer before the last "
                "in any case"
            )
        elif stage.layer != "last":
            reasons["clip_skip"] = f"the config chooses the layer {stage.layer}"
        elif wanted.clip_skip > stage.blocks:
            reasons["clip_skip"] = f"the text encoder has no more layers than {stage.blocks}"
    return reasons


def _set(stage: nn.Module, wanted: CaptionSettings) -> None:
    if wanted.max_tokens != caption_settings(stage).max_tokens:
        for tower in _towers(stage):
            tower.tokenizer.chunks = wanted.max_tokens // CHUNK
    if wanted.clip_skip != caption_settings(stage).clip_skip:
        stage.clip_skip = wanted.clip_skip


def _towers(stage: Any) -> list[Any]:
    """Return the text encoders of a cond stage that have a tokenizer."""
    numbers = getattr(stage, "caption_embedders", None)
    parts = [stage] if numbers is None else [stage.embedders[number] for number in numbers]
    return [part for part in parts if hasattr(part, "tokenize") and hasattr(part, "tokenizer")]
