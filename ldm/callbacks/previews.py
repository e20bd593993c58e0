"""Callback that samples the same prompts with the same seeds during training."""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.callbacks.image_logger import log_image
from ldm.callbacks.rng import undisturbed
from ldm.callbacks.tolerance import Tolerance
from ldm.checkpoint.keys import RELEASE
from ldm.config.preview_prompts import PreviewPrompt
from ldm.distributed.collectives import in_all_processes
from ldm.distributed.dtensor import is_partitioned
from ldm.files import check_within
from ldm.images.grid import save_png, to_images
from ldm.images.logged_names import PREVIEWS, logged_name
from ldm.images.logged_png import SETTINGS, read_settings
from ldm.images.strip import write_strip
from ldm.models.diffusion.conditioning import check_reads_captions, check_takes_encodings
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import NotFiniteError
from ldm.models.diffusion.stored_prompts import StoredPrompts
from ldm.models.diffusion.text_to_image import Request, image_size, latent_shape, text_to_image
from ldm.modules.encoders.caption_settings import CaptionSettings, caption_settings
from ldm.shards.open import check_encoders, common_caption_settings
from ldm.shards.reader import ShardDataset
from ldm.util import UserError, located, refuse_if

log = logging.getLogger(__name__)

WHERE = "lightning.previews"
_ENCODINGS = "prompts.safetensors"
_ADVICE = f"name the release that the images were encoded with: {WHERE}.release=FILE"
_SLUG = 40  # maximum length of the part of a file name that comes from the prompt

# Encodes texts with the text encoder of a release, whose path a checkpoint notes or not, with the settings of the
# training set, which may be unknown.
Encode = Callable[[Sequence[str], str | None, CaptionSettings | None], StoredPrompts]


class Previews(Callback):
    """Callback that samples `prompts` before the first step and then at intervals, and writes them to `previews/`.

    A preview is a PNG with its settings in the metadata. `strip.png` shows all prompts over time. The images go to the
    loggers too. Averaged weights are used, if there are any. Sampling does not change the training. If it fails, a
    warning replaces the images. A prompt whose settings differ from those of its images in the folder gets a new name,
    so that the images of a name always differ by the training alone.

    A model that reads captions encodes the prompts itself, with its present text encoder. For other models, the first
    process encodes them once, before training, and keeps the result in `previews/prompts.safetensors`. With partitioned
    weights all processes take part in sampling, otherwise the first alone.

    Args:
        encode: encodes the prompts of a model without a text encoder.
        release: release that `encode` uses in any case; None for the default.
        every_n_train_steps: optimizer steps between previews; None for no interval in steps.
        train_time_interval: minutes between previews; None for no interval in time.
        sampler: key of `SAMPLERS`.

    Raises:
        UserError: at the set-up of training or before its first step, if the model does not sample from prompts alone,
            a size does not fit it, or the encodings cannot be made or do not match.
    """

    def __init__(
        self,
        prompts: Sequence[PreviewPrompt],
        encode: Encode,
        release: str | None = None,
        every_n_train_steps: int | None = 500,
        train_time_interval: float | None = None,
        sampler: str = "ddim",
    ) -> None:
        refuse_if(not callable(encode), f"Previews: give {WHERE}.prompts in place of this callback")
        self.prompts = list(prompts)
        self.encode, self.release, self.sampler = encode, release, sampler
        self.every_n_train_steps, self.minutes = every_n_train_steps, train_time_interval
        self._noted: str | None = None  # release that the checkpoint notes
        self._stored: StoredPrompts | None = None
        self._chosen: list[str] | None = None  # names of the prompts
        self._step = -1
        self._sampled_at = time.monotonic()
        self._tolerance, self._strip_tolerance = Tolerance("Previews"), Tolerance("The strip of previews")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        try:
            self._check(pl_module)
        except UserError as error:
            raise UserError(f"{WHERE}: {error}; set {WHERE}=null") from error
        for number, prompt in enumerate(self.prompts, start=1):
            with located(f"{WHERE}: prompt {number}, {prompt.prompt!r:.60}"):
                latent_shape(pl_module, prompt.height, prompt.width, ("height", "width"))
        check_within(trainer.default_root_dir, self._folder(trainer), "previews in")

    @staticmethod
    def _check(model: LightningModule) -> None:
        """Raise `UserError` unless `model` samples images from prompts alone."""
        refuse_if(not isinstance(model, LatentDiffusion), f"a {type(model).__name__} samples no images from prompts")
        if model.model.takes_maps or model.model.conditioning_key is None:
            raise UserError(
                f"conditioning_key {model.model.conditioning_key!r}: this model does not sample from prompts alone"
            )
        refuse_if(model.scale_by_std, "the scale of the latents is not known before the first batch (scale_by_std)")
        if not hasattr(model.first_stage_model, "decode") or not hasattr(model.first_stage_model, "downsampling"):
            raise UserError(f"{type(model.first_stage_model).__name__} decodes no images")
        if not _reads_captions(model):
            check_takes_encodings(model)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        note = checkpoint.get(RELEASE)
        name = note.get("name") if isinstance(note, dict) else None
        self._noted = name if isinstance(name, str) else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make or read the encodings, after the checkpoint is loaded.

        Raises:
            UserError: they cannot be made, or another text encoder made them than the shards.
        """
        if _reads_captions(pl_module):
            return
        path = self._folder(trainer) / _ENCODINGS
        for _ in in_all_processes(self._prepared(trainer, pl_module, path)):
            pass
        if is_partitioned(pl_module) or trainer.is_global_zero:
            self._stored = StoredPrompts.load(path)

    def _prepared(self, trainer: Trainer, model: LatentDiffusion, path: Path) -> Iterator[None]:
        """Have the first process write the encodings to `path`, unless they are there. Yield once."""
        if trainer.is_global_zero:
            self._prepare(trainer, model, path)
        yield

    def _prepare(self, trainer: Trainer, model: LatentDiffusion, path: Path) -> None:
        texts = [text for prompt in self.prompts for text in prompt.texts]
        stored = StoredPrompts.load(path) if path.exists() else None
        datasets = getattr(trainer.datamodule, "datasets", {}).values()
        captions = common_caption_settings(datasets)
        is_usable = (
            stored is not None
            and self.release in (None, stored.release)
            and captions in (None, stored.captions)
            and {*texts} <= {*stored.encodings}
        )
        if not is_usable:
            stored = self.encode(texts, self._noted, captions)
        for dataset in datasets:
            if isinstance(dataset, ShardDataset):
                check_encoders(dataset, stored.digests, stored.release, _ADVICE)
        parts = next(iter(stored.encodings.values()))
        shapes = {member: tuple(part.shape) for member, part in parts.items()}
        with located(f"{WHERE}: {stored.release}"):
            model.check_batch_shapes(shapes)
            for dataset in datasets:
                stored.check_length(dataset.shapes, f"{WHERE}.config=CONFIG")
        if not is_usable:
            stored.save(path)
            log.info("Previews: %d prompts encoded with %s, kept as %s", len(self.prompts), stored.release, path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step >= 0:
            return
        self._step = trainer.global_step
        if not all(any(self._images(trainer, name)) for name in self._names(trainer, pl_module)):
            self._try_to_sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still accumulating
        self._step = trainer.global_step
        if self._is_due(trainer, pl_module):
            self._try_to_sample(trainer, pl_module)

    def _is_due(self, trainer: Trainer, model: LightningModule) -> bool:
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            return True
        if self.minutes is None:
            return False
        is_late = time.monotonic() - self._sampled_at >= 60 * self.minutes
        return trainer.strategy.reduce_boolean_decision(is_late, all=False) if is_partitioned(model) else is_late

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / PREVIEWS

    def _names(self, trainer: Trainer, model: LatentDiffusion) -> list[str]:
        """Return the name of each prompt in files and loggers."""
        if self._chosen is None:
            self._chosen = [self._name(trainer, model, number) for number in range(len(self.prompts))]
        return self._chosen

    def _name(self, trainer: Trainer, model: LatentDiffusion, number: int) -> str:
        """Return the first name of the prompt `number` that has no images of other settings, such as another seed."""
        about = self._about(model, self.prompts[number])
        for copy in itertools.count(1):
            name = f"{self._key(number)}-{copy}" if copy > 1 else self._key(number)
            found = (read_settings(path) for path in sorted(self._images(trainer, name), reverse=True))
            last = next((settings for settings in found if settings is not None), about)
            if {key: last.get(key) for key in about} == about:
                break
        return name

    def _key(self, number: int) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompts[number].prompt.lower()).strip("-")[:_SLUG].rstrip("-")
        return f"{number + 1:02}-{words}".rstrip("-")

    def _images(self, trainer: Trainer, name: str, step: str = "*") -> Iterator[Path]:
        return self._folder(trainer).glob(f"{name}_gs-{step}_e-*.png")

    def _try_to_sample(self, trainer: Trainer, model: LatentDiffusion) -> None:
        if trainer.is_global_zero or is_partitioned(model):
            try:
                self._sample_all(trainer, model)
            except Exception as error:
                if is_partitioned(model) and not isinstance(error, NotFiniteError):
                    raise  # the other processes wait for this one
                reason = (str(error) or type(error).__name__).splitlines()[0]
                log.warning("\nNo previews at step %d: %s; training continues", trainer.global_step, reason)
        self._sampled_at = time.monotonic()

    def _sample_all(self, trainer: Trainer, model: LatentDiffusion) -> None:
        captions = None if self._stored is None else self._stored.encodings
        step, folder = trainer.global_step, self._folder(trainer)
        for key, prompt in zip(self._names(trainer, model), self.prompts, strict=True):
            with undisturbed(model):
                image = self._sample(model, prompt, captions)
            if not trainer.is_global_zero:  # this process takes part in sampling only
                continue
            path = folder / logged_name(key, step, trainer.current_epoch, 0)
            with self._tolerance():
                save_png(image, path, metadata={SETTINGS: json.dumps({**self._about(model, prompt), "step": step})})
                for other in self._images(
                    trainer, key, f"{step:06}"
                ):  # sampled before a run resumed at an earlier step
                    if other != path:
                        other.unlink(missing_ok=True)
            for logger in trainer.loggers:
                log_image(logger, f"{PREVIEWS}/{key}", image, step)
        if trainer.is_global_zero:
            with self._strip_tolerance():
                write_strip(folder, folder / "strip.png")

    def _about(self, model: LatentDiffusion, prompt: PreviewPrompt) -> dict[str, Any]:
        """Return what an image of `prompt` depends on, except for the weights."""
        height, width = image_size(model, latent_shape(model, prompt.height, prompt.width))
        request = Request(prompt.prompt, prompt.seed, prompt.negative_prompt)
        settings = {"steps": prompt.steps, "scale": prompt.scale, "sampler": self.sampler}
        captions = caption_settings(model.cond_stage_model) if self._stored is None else self._stored.captions
        return {**request._asdict(), **settings, "H": height, "W": width, **captions.entries()}

    def _sample(
        self, model: LatentDiffusion, prompt: PreviewPrompt, captions: dict[str, dict[str, torch.Tensor]] | None
    ) -> Image.Image:
        shape = latent_shape(model, prompt.height, prompt.width)
        request = Request(prompt.prompt, prompt.seed, prompt.negative_prompt)
        settings = {"steps": prompt.steps, "scale": prompt.scale, "sampler": self.sampler}
        [image] = text_to_image(model, [request], shape, **settings, verbose=False, captions=captions)
        return to_images(image[None])[0]


def _reads_captions(model: LatentDiffusion) -> bool:
    try:
        check_reads_captions(model)
    except UserError:
        return False
    return True
