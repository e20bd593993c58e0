"""Configs that others wrote: whether their model builds, whether their data resolve, what is missing."""

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

from ldm.config.load import read_config
from ldm.config.trust import check_trust
from ldm.translations import instead_of_key, without_left_out
from ldm.util import UserError, get_obj_from_str, instantiate_from_config, takes

_WEIGHTS = ("ckpt_path", "ckpt_dir")  # files that a survey does without
_EXTENSIONS = (".yaml", ".yml")
_OVERLAY_KEYS = {"params", "base_learning_rate"}  # of a model whose target another file names


@dataclass
class Checked:
    """A row of the table: `model` and `data` are `builds`, `resolves`, `fails`, or `-` without such a section.

    `missing` also names the keys of forks that a model is built without.
    """

    name: str
    model: str = "-"
    data: str = "-"
    missing: list[str] = field(default_factory=list)


def find_configs(places: Sequence[str | Path]) -> list[Path]:
    """The files that `places` name, and every YAML file below those that are folders, sorted.

    Raises:
        UserError: a place does not exist, or a folder holds no YAML file.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.suffix in _EXTENSIONS and path.is_file())
            if not files:
                raise UserError(f"{place}: no {' or '.join(_EXTENSIONS)} file in this folder")
            found += files
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    return list(dict.fromkeys(found))


def check_config(path: Path) -> Checked:
    """Look at one config. Nothing is downloaded, no weights are read, no dataset is opened, no foreign code is run."""
    checked = Checked(str(path))
    try:
        config = _plain(read_config(path))
    except UserError as error:
        checked.missing.append(_one_line(error))
        return checked
    if config.get("model"):
        checked.model = _judge(config["model"], _build_model, checked, "builds")
    if config.get("data"):
        checked.data = _judge(config["data"], _build_data, checked, "resolves")
    return checked


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(_one_line(error)) from error


def _judge(section: Any, build: Callable[[dict], None], checked: Checked, good: str) -> str:
    """`good`, or `fails` with what is missing added to `checked`."""
    if not isinstance(section, dict):
        return "-"
    if "target" not in section:
        others = [str(key) for key in section if key not in _OVERLAY_KEYS]
        checked.missing += [f"no target, so a config of another program: {', '.join(others)}"] if others else []
        return "fails" if others else "-"  # an overlay says only what it changes
    section = _without_left_out(section, checked.missing)
    missing = [lack for entry in described(section) for lack in lacks(entry)]
    if not missing:
        try:
            build(section)
        except Exception as error:  # whatever a config of unknown origin makes a class raise
            missing.append(_one_line(error))
    checked.missing += dict.fromkeys(missing)
    return "fails" if missing else good


def described(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `target` in `node`."""
    if isinstance(node, dict):
        if "target" in node:
            yield node
        for value in node.values():
            yield from described(value)
    elif isinstance(node, list):
        for value in node:
            yield from described(value)


def lacks(entry: dict[str, Any]) -> list[str]:
    """What is not there of a mapping with `target` and `params`: the class, or `class(argument)` for each argument."""
    name = entry["target"]
    try:
        check_trust({"target": name}, "config")
        target = get_obj_from_str(name)
    except UserError as error:
        return [f"{name}{_advice(error)}"]
    params = entry.get("params") or {}
    if not isinstance(params, dict):
        return [f"{name}: params are no mapping"]
    return [f"{name}({key}){_instead_of(key)}" for key in params if not takes(target, key)]


def _without_left_out(node: Any, notes: list[str]) -> Any:
    """`node` without the keys of forks that a class is built without, which are added to `notes`."""
    if isinstance(node, list):
        return [_without_left_out(value, notes) for value in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("params"), dict):
        params, keys = without_left_out(node.get("target"), node["params"])
        notes += [f"{node['target']}({key}) is left out{_instead_of(key)}" for key in keys]
        node = {**node, "params": params}
    return {key: _without_left_out(value, notes) for key, value in node.items()}


def _instead_of(key: str) -> str:
    return instead_of_key(key).replace("; ", ": ", 1)


def _advice(error: UserError) -> str:
    """What a message says to use instead, if it does."""
    _, semicolon, advice = str(error).partition("; ")
    advice = advice.partition("; give --trust-config")[0]
    useful = semicolon and not advice.startswith(("give --trust-config", "valid:", "did you mean"))
    return f": {advice}" if useful else ""


def _build_model(section: dict[str, Any]) -> None:
    with torch.device("meta"):
        instantiate_from_config(without_weights(section))


def _build_data(section: dict[str, Any]) -> None:
    for entry in described(section):
        target, params = get_obj_from_str(entry["target"]), entry.get("params") or {}
        try:
            inspect.signature(target).bind(**params)
        except TypeError as error:
            raise UserError(f"{entry['target']}: {error}") from error
    if issubclass(get_obj_from_str(section["target"]), LightningDataModule):
        instantiate_from_config({key: section[key] for key in ("target", "params") if key in section})


def without_weights(node: Any) -> Any:
    """`node` without the keys that name checkpoint files."""
    if isinstance(node, dict):
        return {key: without_weights(value) for key, value in node.items() if key not in _WEIGHTS}
    return [without_weights(value) for value in node] if isinstance(node, list) else node


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def table(rows: Sequence[Checked]) -> str:
    """The rows as a table in Markdown, below a line of counts."""
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
