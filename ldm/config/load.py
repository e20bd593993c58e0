"""Loading of YAML configs, merging with `a.b.c=value` overrides, and building of model and data. Imports no torch."""

from __future__ import annotations

import difflib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.command_line_values import parse_value
from ldm.config.interpolations import check_interpolations, resolve_references, typed_paths
from ldm.config.merge import update_config
from ldm.config.trust import check_trust
from ldm.files import check_file, read_at_most
from ldm.text_files import decode_text
from ldm.util import UserError, instantiate_from_config, nearest, refuse_if

log = logging.getLogger(__name__)

SECTIONS = ("model", "data", "lightning")
_OF_LIGHTNING = ("trainer", "callbacks", "modelcheckpoint", "logger")  # often written a level too high
_MOST_BYTES = 1 << 20  # size limit of a config file
# Further folders for a bare file name: in the working directory, then in this repository.
_REPOSITORY = Path(__file__).resolve().parents[2]
_CONFIG_FOLDERS = (Path("configs/latent-diffusion"), _REPOSITORY / "configs/latent-diffusion")


def load_config(names: Sequence[str | Path], overrides: Sequence[str] = (), trusted: bool = False) -> DictConfig:
    """Merge the YAML files `names` from left to right, then the `a.b.c=value` `overrides`; see `update_config`.

    A section without content is ignored. Unless `trusted` is true, the files must satisfy the policy of
    `ldm.config.trust`. Overrides are not checked, because the user typed them. No other function applies the trust
    setting.

    References such as `${model.x}` are replaced. Values that depend on the environment are kept as text, and OmegaConf
    replaces them on access. Sections other than `SECTIONS` are dropped with a warning.

    Raises:
        UserError: a file is missing or not a YAML mapping, an override is invalid, a reference cannot be resolved, a
            section is misspelt or not a mapping, or the config needs trust.
    """
    files = [(str(path), read_config(path)) for path in map(find_config, names)]
    typed = [(repr(override), _parse_override(override)) for override in overrides]
    # Names without folders, because a resumed run has many configs.
    source = str(names[0]) if len(names) == 1 else ", ".join(Path(name).name for name in names) or "the command line"
    config = OmegaConf.create()
    for number, (name, part) in enumerate(files + typed):
        is_typed = number >= len(files)
        _check_sections(part, name, is_typed)
        try:
            update_config(config, part if is_typed else _without_empty(part), trusted)
        except TypeError as error:  # raised by OmegaConf for a list over a mapping
            raise UserError(f"{name}: replaces a mapping by a list, or a list by a mapping ({error})") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{name}: {_first_line(error)}") from error
    try:
        if not trusted:
            own = typed_paths([OmegaConf.to_container(part) for _, part in typed])
            check_interpolations(OmegaConf.to_container(config), source, own)
        config = resolve_references(_without_empty(config))
        _drop_other_sections(config, source)
        values = plain(config)
        if not trusted:
            check_trust(values, source, own)
        _check_params(values)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{source}: {_first_line(error)}") from error
    for section, value in config.items():
        if not isinstance(value, DictConfig):
            raise UserError(f"section {section!r} must be a mapping, not {value!r}")
    return config


def needs_trust(config: DictConfig) -> bool:
    """Return True if `config` would need trust when read from a file."""
    try:
        check_interpolations(OmegaConf.to_container(config), "config")
        check_trust(plain(config), "config")
    except (UserError, OmegaConfBaseException):
        return True
    return False


def _check_sections(part: DictConfig, name: str, typed: bool) -> None:
    """Raise `UserError` for a section of `part` outside `SECTIONS` that is misspelt or comes from the command line."""
    for section in part:
        slip = difflib.get_close_matches(str(section), SECTIONS, n=1, cutoff=0.65)
        if section not in SECTIONS and (typed or slip):
            raise UserError(f"{name}: unknown section {section!r}{nearest(str(section), list(SECTIONS))}")


def _check_params(value: Any, where: str = "") -> None:
    """Raise `UserError` for an entry `params` in `value`, at the path `where`, that is not a mapping or null."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        path = f"{where}.{key}" if where else str(key)
        if key == "params" and part is not None and not isinstance(part, dict):
            raise UserError(f"{path} {part!r:.100}: give a mapping of parameters, or leave it out")
        _check_params(part, path)


def _without_empty(config: DictConfig) -> DictConfig:
    """Return `config` without sections that are null, as `lightning:` is with all lines below it commented out."""
    parts = OmegaConf.to_container(config)
    sections = [section for section, part in parts.items() if part is not None]
    return config if len(sections) == len(parts) else OmegaConf.masked_copy(config, sections)


def _drop_other_sections(config: DictConfig, source: str) -> None:
    """Remove the sections of other programs. Interpolations must be resolved first."""
    others = [section for section in config if section not in SECTIONS]
    refuse_if("previews" in others, f"{source}: previews is a part of lightning; write it as lightning.previews")
    for section in others:
        del config[section]
    if others:
        log.warning(
            "%s: sections ignored: %s; known sections: %s", source, ", ".join(map(str, others)), ", ".join(SECTIONS)
        )
    for section in _OF_LIGHTNING:
        if section in others:
            log.warning("%s: %s has an effect inside the section lightning only", source, section)


def find_config(name: str | Path) -> Path:
    """Return the path `name` if it exists, else the file `name` in configs/latent-diffusion/.

    Raises:
        UserError: the file does not exist.
    """
    refuse_if(not str(name).strip(), f"--base {str(name)!r}: names no file; give a YAML config")
    for path in (Path(name), *(folder / name for folder in _CONFIG_FOLDERS)):
        if path.is_file():
            return path
    check_file(name)
    known = sorted({path.name for folder in _CONFIG_FOLDERS for path in folder.glob("*.yaml")})
    raise UserError(f"config {str(name)!r} not found{nearest(Path(name).name, known)}")


def plain(config: Any) -> Any:
    """Return `config` as plain dicts, lists and scalars, so that models and checkpoints hold no OmegaConf objects."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def build_model(config: DictConfig, with_files: bool = True) -> Any:
    """Return the model of `config.model`; without `with_files`, the weights that `ckpt_path` names are not loaded.

    Raises:
        UserError: the section `model` is missing, or its target or a key is unknown.
    """
    if not with_files:
        config = OmegaConf.create({"model": _without_files(plain(config.get("model") or {}))})
    return _build(config, "model")


def _without_files(described: Any) -> Any:
    """Return `described` without its paths of weight files."""
    if isinstance(described, dict):
        return {key: _without_files(value) for key, value in described.items() if key != "ckpt_path"}
    return described


def build_data(config: DictConfig) -> Any:
    """Return the data module of `config.data`.

    Raises:
        UserError: the section `data` is missing, or its target or a key is unknown.
    """
    return _build(config, "data")


def _build(config: DictConfig, section: str) -> Any:
    refuse_if(not config.get(section), f"the config has no {section!r} section; give one with --base")
    return instantiate_from_config(plain(config[section]))


def read_config(path: Path) -> DictConfig:
    """Return the content of the YAML file `path`.

    Raises:
        UserError: the file is too large, or not a YAML mapping.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, which is too large for a config; name a YAML file")
    try:
        part = OmegaConf.load(io.StringIO(decode_text(read_at_most(path, _MOST_BYTES))))
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or _first_line(error)
        if path.suffix == ".toml":
            raise UserError(f"{path}: is TOML, which other programs read; give a YAML config") from error
        raise UserError(f"{path}{where}: not valid YAML ({reason})") from error
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error.reason})"
        raise UserError(f"{path}: not a config, because {reason}; save it as UTF-8") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: not a YAML mapping with the sections {', '.join(SECTIONS)}") from error
    except Exception as error:  # invalid values, such as `!!int x`, raise various exceptions in PyYAML
        raise UserError(f"{path}: not a readable config ({_first_line(error)})") from error
    refuse_if(
        not isinstance(part, DictConfig),
        f"{path}: expected a mapping with the sections {', '.join(SECTIONS)}, found a list",
    )
    sections = OmegaConf.to_container(part)
    if sections and all(value is None and key not in SECTIONS for key, value in sections.items()):  # a text
        raise UserError(f"{path}: not a YAML mapping with the sections {', '.join(SECTIONS)}")
    return part


def _parse_override(override: str) -> DictConfig:
    key, equals, text = override.partition("=")
    refuse_if(not equals or not all(key.split(".")), f"{override!r} is not an override of the form a.b.c=value")
    try:
        part = OmegaConf.create()
        OmegaConf.update(part, key, parse_value(text))
        return part
    except UserError as error:
        raise UserError(f"{override!r}: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{override!r}: the value is not valid YAML ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    """Return the first line of the message, with the key that OmegaConf names below it."""
    line = next(iter(str(error).splitlines()), type(error).__name__)[:300]
    key = getattr(error, "full_key", None)
    return f"{key}: {line}" if key and str(key) not in line else line
