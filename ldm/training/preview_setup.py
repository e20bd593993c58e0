"""Previews of a run, from the section `lightning.previews` of its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from ldm.callbacks.previews import WHERE, Previews
from ldm.config.load import plain
from ldm.config.preview_prompts import parse_prompt, read_prompt_file
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.models.diffusion.stored_prompts import StoredPrompts
from ldm.modules.encoders.caption_length import warn_of_cut
from ldm.modules.encoders.caption_settings import CaptionSettings
from ldm.release import CONVENTIONAL_RELEASE
from ldm.release.configs import release_config
from ldm.release.text_encoder import load_text_encoder
from ldm.util import UserError, check_choice, check_keys, check_number, located, refuse_if

log = logging.getLogger(__name__)

_KEYS = ("prompts", "release", "config", "every_n_train_steps", "train_time_interval", "sampler")


def add_previews(section: DictConfig, file: str | None) -> None:
    """Put the lines of the text file of prompts into `section.previews`, so that a resumed run does not need the file.

    The file is `file`, from the command line, or the text `section.previews.prompts`.

    Raises:
        UserError: the file or a line of it is wrong.
    """
    previews = section.get("previews")
    if previews is not None and not isinstance(previews, Mapping):
        raise UserError(f"{WHERE} {plain(previews)!r:.100}: give a mapping with prompts, or null for no previews")
    if file is None:
        file = previews.get("prompts") if previews else None
    if isinstance(file, str):
        section["previews"] = {**(plain(previews) or {}), "prompts": read_prompt_file(file)}


def build_previews(config: DictConfig) -> list[Previews]:
    """Return the callback of `lightning.previews`, or nothing if there is no such section.

    Raises:
        UserError: a key or a value of the section is wrong.
    """
    section = plain(config.lightning.get("previews"))
    if section is None:
        return []
    check_keys(WHERE, section, _KEYS)
    given = {key: value for key, value in section.items() if value is not None}
    prompts = given.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise UserError(f"{WHERE}.prompts {prompts!r:.100}: give a text file or a list of prompts")
    parsed = [parse_prompt(entry, f"{WHERE}.prompts, entry {number}") for number, entry in enumerate(prompts, start=1)]
    for key in ("release", "config"):
        if not isinstance(given.get(key, ""), str):
            raise UserError(f"{WHERE}.{key} {given[key]!r:.100}: give a path")
    check_number(f"{WHERE}.every_n_train_steps", given.get("every_n_train_steps"), least=1, optional=True)
    check_number(
        f"{WHERE}.train_time_interval", given.get("train_time_interval"), above=0, whole=False, optional=True,
        unit="minutes",
    )  # fmt: skip
    check_choice(f"{WHERE}.sampler", given.get("sampler", "ddim"), tuple(SAMPLERS))
    intervals = {key: given.get(key) for key in ("every_n_train_steps", "train_time_interval")}
    if not any(intervals.values()):
        intervals = {}
    release = given.get("release")
    encode = _Encoder(release, given.get("config"))
    return [Previews(parsed, encode, release, **intervals, sampler=given.get("sampler", "ddim"))]


class _Encoder:
    """Function that encodes prompts with the text encoder of a release, which leaves memory again.

    Args:
        release: path of the release; None for the one that the checkpoint notes, or the conventional one.
        config: config of the release; None for that of its family.
    """

    def __init__(self, release: str | None, config: str | None) -> None:
        self.release, self.config = release, config

    def __call__(self, texts: Sequence[str], noted: str | None, captions: CaptionSettings | None) -> StoredPrompts:
        path = self._path(noted)
        with located(WHERE, OSError):
            name, config = release_config(path, self.config, option=f"{WHERE}.config=CONFIG")
            stage, digests = load_text_encoder(path, config, captions)
        log.info("Previews: text encoder of %s (%s)", path, name)
        warn_of_cut(stage, [text for text in texts if text])
        return StoredPrompts.encoded(stage, texts, str(path), digests)

    def _path(self, noted: str | None) -> Path:
        """Return the path of the release.

        Raises:
            UserError: there is no such file or folder.
        """
        if self.release is not None:
            refuse_if(
                not Path(self.release).exists(),
                f"{WHERE}.release {self.release}: no such file or folder; name a release",
            )
            return Path(self.release)
        candidates = [Path(noted)] if noted else []
        found = next((path for path in (*candidates, CONVENTIONAL_RELEASE) if path.exists()), None)
        if found is None:
            missing = f"{noted}, the start of the training, is" if noted else f"{CONVENTIONAL_RELEASE} is"
            raise UserError(
                f"{WHERE}: prompts are encoded with the text encoder of a release, but {missing} missing; name the "
                f"release that the images were encoded with: {WHERE}.release=FILE"
            )
        return found
