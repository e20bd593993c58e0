"""Text encoder of a release, without the release's other networks."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.checkpoint import encoder_digests, load_into, open_checkpoint
from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, TEXT_ENCODERS
from ldm.config.load import plain
from ldm.modules.encoders.caption_settings import CaptionSettings, follow
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.release.caption_record import apply_record
from ldm.release.initialisation import without_initialisation
from ldm.release.opening import release_of
from ldm.util import UserError, instantiate_from_config, refuse_if

_WHERE = "model.params.cond_stage_config"


def load_text_encoder(
    ckpt: str | Path, config: DictConfig, captions: CaptionSettings | None = None
) -> tuple[nn.Module, dict[str, str | None]]:
    """Return the cond stage of `config` with the weights of the release `ckpt`, and the digests of its text towers.

    Args:
        captions: settings that the captions of the training set were encoded with; None for those that the release
            records.

    Raises:
        UserError: a file is invalid, the config has no text encoder, or the weights or `captions` do not match it.
    """
    described = plain(OmegaConf.select(config, _WHERE))
    opened = open_checkpoint(ckpt)
    if not isinstance(described, dict):
        raise UserError(f"{_WHERE} {described!r}: names no text encoder; give the config of the release")
    with without_initialisation():
        stage = instantiate_from_config(described)
    refuse_if(
        not (getattr(stage, "caption_embedders", None) or hasattr(stage, "tokenize")),
        f"{_WHERE}: {type(stage).__name__} reads no captions; give the config of the release, such as "
        "stable_diffusion_v1.yaml",
    )
    prefix = CONDITIONER if isinstance(stage, GeneralConditioner) else COND_STAGE
    holder = nn.Module()
    holder.add_module(prefix.removesuffix("."), stage)
    weights = release_of(opened, ckpt, own=holder.state_dict()).weights
    weights = {key: value for key, value in weights.items() if key.startswith(TEXT_ENCODERS)}
    refuse_if(not weights, f"{ckpt}: holds no text encoder; name the release that the images were encoded with")
    load_into(holder, weights, source=str(ckpt))
    if captions is None:
        apply_record(stage, opened.metadata, ckpt)
    else:
        follow(stage, captions, "the training set's")
    digests = encoder_digests(holder.state_dict())
    return stage.eval().requires_grad_(False), {name: value for name, value in digests.items() if value is not None}
