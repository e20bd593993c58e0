"""Conditioning of latent diffusion: from batch entries to the inputs of the UNet.

B: batch. C, h, w: channels, height and width of a latent. t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.shards.sample import CONTEXT, POOLED, SIZE_ENTRIES
from ldm.util import UserError, refuse_if

# Outputs of a `GeneralConditioner`, and the arguments of `DiffusionWrapper` that they become.
_PARTS = {"crossattn": "c_crossattn", "concat": "c_concat", "vector": "c_adm"}
# Parts of the conditioning from captions, and the members of a sample that store them.
_MEMBERS = {"crossattn": CONTEXT, "vector": POOLED}


def check_reads_captions(model: Any) -> None:
    """Raise `UserError` unless the model's cond stage takes captions, and no other input except image sizes."""
    stage = model.cond_stage_model
    name = "none" if stage is None else type(stage).__name__
    takes_sizes = isinstance(stage, GeneralConditioner) and set(stage.other_keys) <= SIZE_ENTRIES.keys()
    refuse_if(
        stage is None or stage is model.first_stage_model or getattr(stage, "key", None) is not None,
        f"the config's cond_stage_config, {name}, reads no captions; "
        "name a config with a text encoder, such as stable_diffusion_v1.yaml",
    )
    refuse_if(
        hasattr(stage, "input_keys") and not (takes_sizes and stage.caption_embedders),
        f"the config's cond_stage_config, {name}, takes {', '.join(getattr(stage, 'input_keys', ()))}, which this "
        "command does not have; train with main.py on data that has them, or name the config of another model",
    )


def caption_encodings(stage: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
    """Return the encodings of captions by the text encoder `stage`, by member of a sample."""
    if isinstance(stage, GeneralConditioner):
        return {_MEMBERS[name]: part for name, part in stage.encode_captions(captions).items()}
    return {CONTEXT: getattr(stage, "encode", stage)(list(captions))}


def check_takes_encodings(model: Any) -> None:
    """Raise `UserError` unless stored caption encodings and image sizes are all that conditions the model."""
    entries = set(model.conditioning_entries)
    takes_them = entries <= {model.cond_stage_key, CONTEXT, POOLED, *SIZE_ENTRIES}
    is_stored = getattr(model.cond_stage_model, "key", None) is not None or CONTEXT in entries
    if not (takes_them and is_stored):
        what = ", ".join(sorted(entries)) or "nothing"
        raise UserError(f"the model is conditioned on {what}, not on stored caption encodings alone")


class WithConditioning:
    """Mixin of `LatentDiffusion` for its `cond_stage_model`, which is None for an unconditional model.

    It calls `get_input` of `DDPM`, which must be a later base.
    """

    model: DiffusionWrapper
    cond_stage_model: nn.Module | None
    cond_stage_key: str
    cond_stage_trainable: bool
    cond_stage_forward: str | None
    concat_keys: tuple[str, ...]
    num_timesteps_cond: int
    # Default of `concat_keys`.
    default_concat_keys: tuple[str, ...] = ()

    def get_learned_conditioning(self, c: Any) -> Conditioning:
        """Return the encoding of raw conditioning, such as captions → (B, 77, D) or labels → (B, 1, D)."""
        if self.cond_stage_model is None:
            return c
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        encoded = encode(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the encodings of captions by member of a sample."""
        if self.cond_stage_forward is not None:
            return {CONTEXT: self.get_learned_conditioning(list(captions))}
        return caption_encodings(self.cond_stage_model, captions)

    def stored_conditioning(self, sample: Batch) -> Conditioning:
        """Return the conditioning of stored caption encodings and of sizes."""
        encoded = self._of_stored(sample)
        return _placed(encoded) if isinstance(encoded, Mapping) else encoded

    def _of_stored(self, sample: Batch) -> Tensor | dict[str, Tensor]:
        """Return what the cond stage makes of stored caption encodings and of sizes."""
        stage = self.cond_stage_model
        if not isinstance(stage, GeneralConditioner):
            return sample[CONTEXT]
        # A conditioner without text encoders has embedders that pass stored encodings on.
        replaced = [name for name in _MEMBERS if stage.caption_embedders and _MEMBERS[name] in sample]
        return stage(sample, captions={name: sample[_MEMBERS[name]] for name in replaced})

    @property
    def conditioning_entries(self) -> tuple[str, ...]:
        """Batch entries of the conditioning."""
        stage = self.cond_stage_model
        if self.model.conditioning_key is None:
            return ()
        own = getattr(stage, "input_keys", None) or [getattr(stage, "key", None) or self.cond_stage_key]
        maps = self.concat_keys if self.model.takes_maps and self.model.conditioning_key != "concat" else ()
        return (*own, *maps)

    def check_vector(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that stored samples of these `shapes`, by entry, give a vector of the UNet's width.

        Raises:
            UserError: the width differs, or the UNet takes labels of another kind.
        """
        stage, kind = self.cond_stage_model, getattr(self.model.diffusion_model, "num_classes", None)
        if kind is None or not isinstance(stage, GeneralConditioner) or stage.caption_embedders:
            return
        refuse_if(
            kind != "sequential", f"num_classes {kind!r}: a GeneralConditioner gives a vector, which sequential takes"
        )
        width = self.model.diffusion_model.adm_in_channels
        shapes = {**shapes, **dict.fromkeys(SIZE_ENTRIES, (2,))}
        if not all(key in shapes for key in stage.input_keys):
            return
        vector = stage({key: torch.zeros(1, *shapes[key]) for key in stage.input_keys}).get("vector")
        if vector is None or vector.shape[1] != width:
            stored = ", ".join(f"{key} {tuple(shapes[key])}" for key in stage.input_keys)
            made = 0 if vector is None else vector.shape[1]
            raise UserError(
                f"{stored} make a vector of {made} features, but the UNet's adm_in_channels is {width}; encode the "
                "captions with the text encoder of this model"
            )

    def check_input_channels(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that the latent and the maps of stored samples of these `shapes` have the channels of the UNet's input.

        Raises:
            UserError: the number differs.
        """
        unet = getattr(self.model.diffusion_model, "in_channels", None)
        keys = self.concat_keys if self.model.takes_maps else ()
        if unet is None or self.model.conditioning_key == "concat" or not all(key in shapes for key in keys):
            return
        maps = {key: shapes[key][0] for key in keys}
        channels = [self.channels if count == 2 * self.channels else count for count in maps.values()]
        if self.channels + sum(channels) != unet:
            given = " and ".join(["latent", *keys])
            raise UserError(
                f"in_channels of the UNet is {unet}, but its input of {given} has {self.channels + sum(channels)} "
                "channels; name the config of the model that is trained"
            )

    def raw_conditioning(self, batch: Batch) -> Any:
        """Return the batch entry `cond_stage_key`, or the whole batch if the cond stage selects its entries."""
        stage = self.cond_stage_model
        if getattr(stage, "key", None) is not None or hasattr(stage, "input_keys"):
            return batch
        entry = batch_entry(batch, self.cond_stage_key)
        images = isinstance(entry, Tensor) and entry.ndim == 4  # channels last, as in all of latent diffusion
        return super().get_input(batch, self.cond_stage_key) if images else entry

    def encode_conditioning(self, batch: Batch) -> Conditioning:
        """Return the conditioning of a batch for `apply_model`, or None if there is none."""
        if self.model.conditioning_key is None:
            return None
        with torch.set_grad_enabled(self.cond_stage_trainable and torch.is_grad_enabled()):
            encoded = self.get_learned_conditioning(self.raw_conditioning(batch))
        return self._with_maps(_in_float32(encoded), batch)

    def condition_on_captions(self, captions: Sequence[str], batch: Batch) -> Conditioning:
        """Return the conditioning of captions for `apply_model`, with the image sizes and the maps of `batch`."""
        encoded = self._of_stored({**batch, **self.encode_captions(captions)})
        return self._with_maps(_in_float32(encoded), batch)

    def _with_maps(self, encoded: Conditioning, batch: Batch) -> Conditioning:
        """Return what a cond stage gives in the form of `apply_model`, with the maps of `batch` if there are any."""
        if not self.model.takes_maps or self.model.conditioning_key == "concat":
            return _placed(encoded) if isinstance(encoded, Mapping) else encoded
        cond = _placed(encoded) if isinstance(encoded, Mapping) else {"c_crossattn": [encoded]}
        maps, labels = self.maps_and_labels(batch)
        return {"c_concat": maps, **cond, **labels}

    def concatenated(self, batch: Batch) -> list[Tensor]:
        """Return the maps (B, C', h, w) that join the input's channels.

        Raises:
            UserError: the config names no batch entries for them.
        """
        if not self.concat_keys:
            raise UserError(
                f"conditioning_key {self.model.conditioning_key!r} needs concat_keys, the batch entries that join the "
                "input"
            )
        return [batch_entry(batch, key).float() for key in self.concat_keys]

    def maps_and_labels(self, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the maps, and the labels under `c_adm` if the model has labels."""
        return self.concatenated(batch), {}

    @property
    def reads_captions(self) -> bool:
        return hasattr(self.cond_stage_model, "tokenize")

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | Sequence[str] = "", cond: Conditioning = None
    ) -> Conditioning:
        """Return the conditioning of `batch_size` samples with the caption `null_label`, or one caption per sample.

        Other parts of `cond`, such as a mask, are kept.
        """
        captions = [null_label] * batch_size if isinstance(null_label, str) else list(null_label)
        encoded = self.get_learned_conditioning(captions)
        if isinstance(encoded, Mapping):
            encoded = _placed(encoded)
        if not isinstance(cond, Mapping):
            return encoded
        return {**cond, **(encoded if isinstance(encoded, Mapping) else {"c_crossattn": [encoded]})}

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """Return the UNet's prediction for the noisy `x` (B, C, h, w).

        `cond` is a tensor, a list of tensors, or a dict with lists `c_concat` and `c_crossattn` and a tensor `c_adm`.
        """
        if cond is None:
            return self.model(x, t)
        if not isinstance(cond, Mapping):
            cond = cond if isinstance(cond, (list, tuple)) else [cond]
            cond = {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": cond}
        return self.model(x, t, **cond)

    def conditioning_at(self, c: Conditioning, t: Tensor, streams: RandomStreams = GLOBAL_STREAM) -> Conditioning:
        """Return `c`, with noise for the timesteps `t` if `num_timesteps_cond` is above 1. Labels get no noise."""
        return c if self.num_timesteps_cond == 1 else self._noised_conditioning(c, self.cond_ids[t], streams)

    def _noised_conditioning(
        self, c: Conditioning, t: Tensor, streams: RandomStreams, what: str = "conditioning"
    ) -> Conditioning:
        if isinstance(c, Mapping):
            return {key: entries if isinstance(entries, Tensor) else
                    [self._noised_conditioning(entry, t, streams, f"{key}/{i}") for i, entry in enumerate(entries)]
                    for key, entries in c.items()}  # fmt: skip
        return self.q_sample(c, t, streams.normal(what, c)) if isinstance(c, Tensor) and c.is_floating_point() else c


def _placed(encoded: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the outputs of a `GeneralConditioner` as conditioning for `apply_model`."""
    unknown = encoded.keys() - _PARTS.keys()
    if unknown:
        raise UserError(f"the cond stage returns {', '.join(sorted(unknown))}; the UNet takes {', '.join(_PARTS)}")
    return {_PARTS[key]: part if key == "vector" else [part] for key, part in encoded.items()}


def _in_float32(encoded: Conditioning) -> Conditioning:
    """Return encodings in float32. Stored ones are float16, which CPU autocast does not mix with bfloat16."""
    if isinstance(encoded, Mapping):
        return {key: _in_float32(part) for key, part in encoded.items()}
    return encoded.float() if isinstance(encoded, Tensor) and encoded.is_floating_point() else encoded
