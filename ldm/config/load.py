"""Reading YAML configs, merging them with `a.b.c=value` overrides, and building the model. Imports no torch."""

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

from ldm.config.interpolations import check_interpolations, resolve_references, typed_paths
from ldm.config.merge import laid_over
from ldm.config.trust import check_trust
from ldm.config.typed import read_typed
from ldm.files import check_file, decode_text, read_at_most
from ldm.util import UserError, instantiate_from_config, nearest

log = logging.getLogger(__name__)

SECTIONS = ("model", "data", "lightning")
_MOST_BYTES = 1 << 20  # of a config file; real ones have a few thousand
# Where a bare file name is also looked for: under the working directory, then in this repository.
_REPOSITORY = Path(__file__).resolve().parents[2]
_CONFIG_FOLDERS = (Path("configs/latent-diffusion"), _REPOSITORY / "configs/latent-diffusion")


def load_config(names: Sequence[str | Path], overrides: Sequence[str] = (), trusted: bool = False) -> DictConfig:
    """Merge the YAML files `names` left to right, then the `a.b.c=value` `overrides`, whose values are read as YAML.

    They merge as `laid_over` says. A section with nothing in it says nothing. Sections of other names are left out with
    a warning. This is the one place where the
    trust in configs is applied: unless they are `trusted`, the files are held against `ldm.config.trust`. Overrides are
    not, since a person typed them.

    References such as `${model.x}` are replaced. What depends on the environment stays as it is written, and OmegaConf
    replaces it where it is read.

    Raises:
        UserError: a file is missing or is not a YAML mapping, an override cannot be read, an interpolation does not
            resolve, a top-level section is a slip of one of `SECTIONS` or no mapping, or the config needs trust.
    """
    files = [(str(path), read_config(path)) for path in map(find_config, names)]
    typed = [(repr(override), _parse_override(override)) for override in overrides]
    # A resumed run has many, whose folders would make the line long.
    source = str(names[0]) if len(names) == 1 else ", ".join(Path(name).name for name in names) or "the command line"
    config = OmegaConf.create()
    for number, (name, part) in enumerate(files + typed):
        is_typed = number >= len(files)
        _check_sections(part, name, is_typed)
        try:
            config = laid_over(config, part if is_typed else _without_empty(part), trusted)
        except TypeError as error:  # OmegaConf's, of a list over a mapping
            raise UserError(f"{name}: a list over a mapping, or the other way round ({error})") from error
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
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{source}: {_first_line(error)}") from error
    for section, value in config.items():
        if not isinstance(value, DictConfig):
            raise UserError(f"section {section!r} must be a mapping, got {value!r}")
    return config


def needs_trust(config: DictConfig) -> bool:
    """Whether `config`, read from a file as it stands, would need trust, though a person may have typed it now."""
    try:
        check_interpolations(OmegaConf.to_container(config), "config")
        check_trust(plain(config), "config")
    except (UserError, OmegaConfBaseException):
        return True
    return False


def _check_sections(part: DictConfig, name: str, typed: bool) -> None:
    """Raise `UserError` for a section of `part` that is none of `SECTIONS`, and typed or named almost like one."""
    for section in part:
        slip = difflib.get_close_matches(str(section), SECTIONS, n=1, cutoff=0.65)
        if section not in SECTIONS and (typed or slip):
            raise UserError(f"{name}: unknown section {section!r}{nearest(str(section), list(SECTIONS))}")


def _without_empty(config: DictConfig) -> DictConfig:
    """Return `config` without sections that are null, as `lightning:` is with all lines below it commented out."""
    sections = [section for section, part in OmegaConf.to_container(config).items() if part is not None]
    return OmegaConf.masked_copy(config, sections)


def _drop_other_sections(config: DictConfig, source: str) -> None:
    """Remove sections that other programs read, once interpolations have had their values from them."""
    others = [section for section in config if section not in SECTIONS]
    for section in others:
        del config[section]
    if others:
        log.warning("%s: ignored, being none of %s: %s", source, ", ".join(SECTIONS), ", ".join(map(str, others)))


def find_config(name: str | Path) -> Path:
    """`name` itself if it exists, else the file of that name in configs/latent-diffusion/.

    Raises:
        UserError: it is in none of these places.
    """
    for path in (Path(name), *(folder / name for folder in _CONFIG_FOLDERS)):
        if path.is_file():
            return path
    check_file(name)
    known = sorted({path.name for folder in _CONFIG_FOLDERS for path in folder.glob("*.yaml")})
    raise UserError(f"config {str(name)!r} not found{nearest(Path(name).name, known)}")


def plain(config: Any) -> Any:
    """`config` as plain dicts, lists and scalars, so that nothing of OmegaConf reaches models and checkpoints."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def build_model(config: DictConfig) -> Any:
    """The module that `config.model` describes.

    Raises:
        UserError: there is no `model` section, or it names a target or a key that does not exist.
    """
    return _build(config, "model")


def build_data(config: DictConfig) -> Any:
    """The data module that `config.data` describes.

    Raises:
        UserError: there is no `data` section, or it names a target or a key that does not exist.
    """
    return _build(config, "data")


def _build(config: DictConfig, section: str) -> Any:
    if not config.get(section):
        raise UserError(f"the config has no {section!r} section; give one with --base")
    return instantiate_from_config(plain(config[section]))


def read_config(path: Path) -> DictConfig:
    """The YAML file `path` as it stands.

    Raises:
        UserError: it is too large, or not a YAML mapping.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, too many for a config; name the right file")
    try:
        part = OmegaConf.load(io.StringIO(decode_text(read_at_most(path, _MOST_BYTES))))
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"{path}{where}: not valid YAML ({reason})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: not a YAML mapping with the sections {', '.join(SECTIONS)}") from error
    except Exception as error:  # values that PyYAML cannot make, such as `!!int x`, raise whatever they trip over
        raise UserError(f"{path}: not a config that can be read ({_first_line(error)})") from error
    if not isinstance(part, DictConfig):
        raise UserError(f"{path}: expected a mapping with the sections {', '.join(SECTIONS)}, found a list")
    return part


def _parse_override(override: str) -> DictConfig:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override!r} is not an override of the form a.b.c=value")
    try:
        part = OmegaConf.create()
        OmegaConf.update(part, key, read_typed(text))
        return part
    except UserError as error:
        raise UserError(f"{override!r}: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{override!r}: the value is not valid YAML ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
