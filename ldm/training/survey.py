"""Check of configs from other projects: models that build, data that resolve, and missing names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningDataModule

from ldm.config.interpolations import check_interpolations
from ldm.config.load import read_config
from ldm.config.trust import check_trust
from ldm.moved_targets import hint_for_key, without_unused_keys
from ldm.util import UserError, get_obj_from_str, instantiate_from_config, located, refuse_if, takes

_WEIGHTS = ("ckpt_path", "ckpt_dir")  # keys of checkpoint files, which are not read
_EXTENSIONS = (".yaml", ".yml")
_OVERLAY_KEYS = {"params", "base_learning_rate"}  # of a model whose target another file names


@dataclass
class Checked:
    """Row of the table. `model` and `data` are `builds`, `resolves`, `fails`, or `-` without such a section.

    `missing` also has the keys of forks that the model is built without.
    """

    name: str
    model: str = "-"
    data: str = "-"
    missing: list[str] = field(default_factory=list)


def find_configs(places: Sequence[str | Path]) -> list[Path]:
    """Return the files among `places`, and all YAML files below the folders among them, sorted per folder.

    Raises:
        UserError: a place does not exist, or a folder contains no YAML file.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.suffix in _EXTENSIONS and path.is_file())
            refuse_if(not files, f"{place}: no {' or '.join(_EXTENSIONS)} file in this folder")
            found += files
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    return list(dict.fromkeys(found))


def check_config(path: Path) -> Checked:
    """Check one config without downloading, reading weights, opening datasets or running foreign code."""
    checked = Checked(str(path))
    try:
        config = _plain(read_config(path))
    except UserError as error:
        checked.missing.append(_one_line(error))
        return checked
    if config.get("model"):
        checked.model = _check_section(config["model"], _build_model, checked, "builds")
    if config.get("data"):
        checked.data = _check_section(config["data"], _build_data, checked, "resolves")
    return checked


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        check_interpolations(OmegaConf.to_container(config), "config")  # no value of the environment in the table
        return OmegaConf.to_container(config, resolve=True)
    except UserError as error:
        raise UserError(str(error).partition(", or give --trust-config")[0]) from error
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(_one_line(error)) from error


def _check_section(section: Any, build: Callable[[dict], None], checked: Checked, good: str) -> str:
    """Return `good`, or add the problems to `checked` and return `fails`."""
    if not isinstance(section, dict):
        return "-"
    if "target" not in section:
        others = [str(key) for key in section if key not in _OVERLAY_KEYS]
        checked.missing += [f"no target, so a config of another program: {', '.join(others)}"] if others else []
        return "fails" if others else "-"  # an overlay, which holds only its changes
    section = _without_unused_keys(section, checked.missing)
    missing = [name for entry in iterate_targets(section) for name in missing_names(entry)]
    if not missing:
        try:
            build(section)
        except Exception as error:  # a config of unknown origin can make a class raise anything
            missing.append(_one_line(error))
    checked.missing += dict.fromkeys(missing)
    return "fails" if missing else good


def iterate_targets(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping with a `target` in `node`."""
    if isinstance(node, dict):
        if "target" in node:
            yield node
        for value in node.values():
            yield from iterate_targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from iterate_targets(value)


def missing_names(entry: dict[str, Any]) -> list[str]:
    """Return the names missing for a mapping with `target` and `params`.

    These are the class if it does not exist, else `class(argument)` per argument that the class does not take.
    """
    name = entry["target"]
    try:
        check_trust({"target": name}, "config")
        target = get_obj_from_str(name)
    except UserError as error:
        return [f"{name}{_advice(error)}"]
    params = entry.get("params") or {}
    if not isinstance(params, dict):
        return [f"{name}: params must be a mapping"]
    return [f"{name}({key}){_hint(key)}" for key in params if not takes(target, key)]


def _without_unused_keys(node: Any, notes: list[str]) -> Any:
    """Return `node` without the keys of forks that no class here uses, and add them to `notes`."""
    if isinstance(node, list):
        return [_without_unused_keys(value, notes) for value in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("params"), dict):
        params, keys = without_unused_keys(node.get("target"), node["params"])
        notes += [f"{node['target']}({key}) is ignored{_hint(key)}" for key in keys]
        node = {**node, "params": params}
    return {key: _without_unused_keys(value, notes) for key, value in node.items()}


def _hint(key: str) -> str:
    return hint_for_key(key).replace("; ", ": ", 1)


def _advice(error: UserError) -> str:
    """Return the replacement that a message suggests, as `: advice`, or an empty string."""
    _, semicolon, advice = str(error).partition("; ")
    advice = advice.partition("; give --trust-config")[0]
    useful = semicolon and not advice.startswith(("give --trust-config", "valid:", "did you mean"))
    return f": {advice}" if useful else ""


def _build_model(section: dict[str, Any]) -> None:
    with torch.device("meta"):
        instantiate_from_config(without_weights(section))


def _build_data(section: dict[str, Any]) -> None:
    for entry in iterate_targets(section):
        target, params = get_obj_from_str(entry["target"]), entry.get("params") or {}
        with located(entry["target"], TypeError):
            inspect.signature(target).bind(**params)
    if issubclass(get_obj_from_str(section["target"]), LightningDataModule):
        instantiate_from_config({key: section[key] for key in ("target", "params") if key in section})


def without_weights(node: Any) -> Any:
    """Return `node` without the keys of checkpoint files."""
    if isinstance(node, dict):
        return {key: without_weights(value) for key, value in node.items() if key not in _WEIGHTS}
    return [without_weights(value) for value in node] if isinstance(node, list) else node


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def format_table(rows: Sequence[Checked]) -> str:
    """Return a line of counts and a Markdown table of the rows."""
    models, data = ([getattr(row, part) for row in rows] for part in ("model", "data"))
    lines = [
        f"{len(rows)} configs. Models: {models.count('builds')} build, {models.count('fails')} fail. "
        f"Data: {data.count('resolves')} resolve, {data.count('fails')} fail.",
        "",
        "| config | model | data | missing |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        missing = "; ".join(row.missing).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row.name} | {row.model} | {row.data} | {missing or '-'} |")
    return "\n".join(lines) + "\n"
