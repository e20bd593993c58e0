"""Configs to objects: what is built, and what each mistake is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.moved_targets import HINTS_FOR_KEYS
from ldm.util import (
    UserError,
    check_number,
    check_params,
    get_obj_from_str,
    instantiate_from_config,
    located,
    takes,
)

ROOT = Path(__file__).resolve().parents[2]


class Base:
    def __init__(self, width: int, depth: int = 1) -> None:
        self.width, self.depth = width, depth


class Derived(Base):
    def __init__(self, colour: str = "red", **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.colour = colour


def test_builds_with_params_and_overrides() -> None:
    layer = instantiate_from_config(
        {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}}, bias=False
    )
    assert isinstance(layer, torch.nn.Linear)
    assert layer.bias is None


@pytest.mark.parametrize("marker", ["__is_first_stage__", "__is_unconditional__"])
def test_markers_build_nothing(marker: str) -> None:
    assert instantiate_from_config(marker) is None


def test_params_may_be_left_out() -> None:
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity", "params": None}), torch.nn.Identity)


def test_keywords_passed_on_are_those_of_the_parents() -> None:
    check_params("Derived", Derived, {"colour": "red", "width": 1, "depth": 1})
    check_params("anything", lambda **anything: None, {"colour": 1})
    with pytest.raises(UserError, match="'colour'"):
        check_params("Base", Base, {"colour": 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target": "torch.nn.Linear", "params": {"in_feature": 2}}, "'in_feature'.*torch.nn.Linear.*'in_features'"),
        ({"target": f"{__name__}.Derived", "params": {"dept": 2}}, "'dept'.*Derived.*'depth'"),
        ({"target": "torch.nn.Linaer"}, "torch.nn.Linaer.*'Linear'"),
        ({"target": "no_such_package.Thing"}, "no module named 'no_such_package'"),
        ({"target": "Thing"}, "not a dotted path"),
        ({"params": {}}, "'target'"),
        ("torch.nn.Linear", "'target'"),
        (None, "'target'"),
        ({"target": "torch.nn.Identity", "parms": {}}, "'parms'.*'params'"),
    ],
)
def test_mistakes_are_named(config: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        instantiate_from_config(config)


def test_a_model_section_as_it_stands_in_a_file() -> None:
    config = {"base_learning_rate": 1e-5, "target": "torch.nn.Identity"}
    assert isinstance(instantiate_from_config(config), torch.nn.Identity)


def test_found_object() -> None:
    assert get_obj_from_str("torch.nn.Linear") is torch.nn.Linear


class Strict:
    def __init__(
        self,
        flag: bool = False,
        size: int = 1,
        cap: int | None = None,
        share: float = 0.5,
        most: float | None = None,
        part: Mapping[str, Any] | None = None,
        sizes: Sequence[int] = (1,),
        levels: Sequence[int] | None = None,
        name: str = "a",
        path: str | None = None,
        keys: Sequence[str] = (),
        rates: Sequence[float] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size {size}\nis too small")
        self.first = sizes[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"flag": "False"}, "^flag='False' in params of .*: give true or false$"),
        ({"flag": None}, "flag=None"),
        ({"size": 1.5}, "size=1.5 in params of .*: give a whole number"),
        ({"cap": "a"}, "cap='a' in params of .*: give a whole number or null"),
        ({"share": "0,5"}, "share='0,5' in params of .*: give a number$"),
        ({"share": None}, "share=None in params of .*: give a number$"),
        ({"most": "a"}, "most='a' in params of .*: give a number or null"),
        ({"size": 0}, "Strict: size 0$"),
        ({"part": "a"}, "part='a' in params of .*: give a mapping or null$"),
        ({"part": []}, r"part=\[\] in params of .*: give a mapping or null$"),
        ({"sizes": 3}, "sizes=3 in params of .*: give a list of whole numbers$"),
        ({"sizes": ["a"]}, r"sizes=\['a'\] in params of .*: give a list of whole numbers$"),
        ({"sizes": None}, "sizes=None in params of .*: give a list of whole numbers$"),
        ({"levels": [1.5]}, r"levels=\[1.5\] in params of .*: give a list of whole numbers$"),
        ({"size": 1 << 70}, r"size in params of .*: the number is too large; give one below 2\^63$"),
        ({"share": -(10**400)}, "share in params of .*: the number is too large"),
        ({"name": 1}, "name=1 in params of .*: give a text$"),
        ({"name": None}, "name=None in params of .*: give a text$"),
        ({"path": {}}, "path={} in params of .*: give a text or null$"),
        ({"keys": "loss"}, "keys='loss' in params of .*: give a list of texts$"),
        ({"keys": [1]}, r"keys=\[1\] in params of .*: give a list of texts$"),
        ({"rates": {0: 1.0}}, r"rates={0: 1.0} in params of .*: give a list of numbers$"),
        ({"rates": ["a"]}, r"rates=\['a'\] in params of .*: give a list of numbers$"),
        ({"sizes": []}, "Strict: tuple index out of range|Strict: list index out of range"),
    ],
)
def test_values_that_do_not_fit_are_one_line(params: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        instantiate_from_config({"target": f"{__name__}.Strict", "params": params})


def test_values_that_fit_are_taken() -> None:
    params = {
        "flag": True,
        "size": 2,
        "cap": None,
        "share": 1,
        "most": None,
        "name": "b",
        "path": None,
        "keys": ["loss"],
        "rates": [1, 0.5],
        "part": {},
        "sizes": (1, 2),
        "levels": [3],
    }
    assert isinstance(instantiate_from_config({"target": f"{__name__}.Strict", "params": params}), Strict)


@pytest.mark.parametrize(
    ("value", "limits", "said"),
    [
        (0, {"least": 1}, "x 0: give a whole number of at least 1"),
        (1.0, {"least": 1}, "x 1.0: give a whole number of at least 1"),
        (True, {"least": 1}, "x True: give a whole number of at least 1"),
        ("3", {"least": 1}, "x '3': give a whole number of at least 1"),
        (None, {"least": 1}, "x None: give a whole number of at least 1"),
        (0, {"least": 1, "optional": True}, "x 0: give a whole number of at least 1, or null"),
        (0, {"above": 0, "whole": False}, "x 0: give a number above 0"),
        (float("inf"), {"above": 0, "whole": False}, "x inf: give a number above 0"),
        (9, {"above": 0, "most": 1, "whole": False}, "x 9: give a number above 0, up to 1"),
        (float("nan"), {"whole": False}, "x nan: give a finite number"),
        (1.5, {"least": 0, "most": 1, "whole": False}, "x 1.5: give a number from 0 to 1"),
        (-1, {"least": 0, "whole": False, "unit": "minutes"}, "x -1: give a number of minutes of at least 0"),
        ([], {"whole": False}, "x []: give a finite number"),
    ],
)
def test_check_number_says_what_to_give(value: object, limits: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_number("x", value, **limits)
    assert str(caught.value) == said


def test_check_number_takes_what_is_in_the_range() -> None:
    for value, limits in (
        (1, {"least": 1}),
        (10**400, {"least": 1}),
        (0.5, {"least": 0, "most": 1, "whole": False}),
        (1, {"above": 0, "whole": False}),
        (None, {"least": 1, "optional": True}),
        (-5, {}),
    ):
        check_number("x", value, **limits)
    with pytest.raises(UserError, match=r"--x 0: .*, or leave it out"):
        check_number("--x", 0, least=1, optional=True)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("freeze_model", "unet_trainable: false"),
        ("train_text_encoder", "cond_stage_trainable: true"),
        ("with_prior_preservation", "prior_images.yaml"),
    ],
)
def test_hint_for_key_names_the_key_and_what_to_use(key: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key '{key}' in params of .*LatentDiffusion; .*{said}"):
        instantiate_from_config({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {key: 1}})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("personalization_config", "textual_inversion.yaml"),
        ("embedding_reg_weight", "textual_inversion.yaml"),
        ("unfreeze_model", "unet_trainable.*cond_stage_trainable is true"),
        ("reg_weight", "prior_loss_weight.*prior_images.yaml"),
        ("model_lr", "model.base_learning_rate"),
        ("u_cond_percent", "ucg_training"),
    ],
)
def test_keys_of_forks_are_ignored_with_one_line(key: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    described = {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {"unet_config": {}, key: {"target": "no.such"}}}
    with pytest.raises(UserError, match="expected a mapping with the key 'target'"):  # of the empty unet_config
        instantiate_from_config(described)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(rf".*DDPM: {key} is ignored, because nothing here uses it; .*{said}.*", line)


def test_hint_for_key_names_what_exists() -> None:
    """Keys of models that the hints name are arguments, and the overlays are shipped."""
    from ldm.models.diffusion.ddpm import LatentDiffusion

    hints = " ".join(HINTS_FOR_KEYS.values())
    overlays = set(re.findall(r"\w+\.yaml", hints))
    assert overlays and all((ROOT / "configs/latent-diffusion" / name).is_file() for name in overlays)
    for key in ("unet_trainable", "cond_stage_trainable", "prior_loss_weight", "ucg_training"):
        assert key in hints and takes(LatentDiffusion, key)
    assert not any(takes(LatentDiffusion, key) for key in HINTS_FOR_KEYS)


class Loads:
    def __init__(self, ckpt_path: str | None = None) -> None:
        self.ckpt_path = ckpt_path


@pytest.mark.parametrize("params", [{}, {"ckpt_path": "other.ckpt"}])
def test_ckpt_path_beside_target_is_one_in_params(tmp_path: Path, params: dict) -> None:
    (tmp_path / "model.ckpt").touch()
    path = str(tmp_path / "model.ckpt")
    built = instantiate_from_config({"target": f"{__name__}.Loads", "ckpt_path": path, "params": params})
    assert built.ckpt_path == params.get("ckpt_path", path)


@pytest.mark.parametrize(
    ("target", "said"), [("Loads", "the file does not exist"), ("Strict", "this class takes no ckpt_path")]
)
def test_ckpt_path_beside_target_that_is_not_loaded(target: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    built = instantiate_from_config({"target": f"{__name__}.{target}", "ckpt_path": "missing.ckpt"})
    assert getattr(built, "ckpt_path", None) is None
    assert f"ckpt_path missing.ckpt beside target is not loaded, because {said}" in caplog.text


def test_keys_that_are_not_text_are_named() -> None:
    """YAML reads a bare `1` or `on` as a number or a boolean."""
    with pytest.raises(UserError, match=r"unknown key 1 in params of torch\.nn\.Linear; valid: "):
        instantiate_from_config({"target": "torch.nn.Linear", "params": {1: 2}})
    with pytest.raises(UserError, match=r"params 'text' of torch\.nn\.Linear: give a mapping"):
        instantiate_from_config({"target": "torch.nn.Linear", "params": "text"})


def test_located_adds_the_place_to_an_error_of_the_user_alone():
    with pytest.raises(UserError, match=r"^set 'a': shards are missing$"), located("set 'a'"):
        raise UserError("shards are missing")
    with pytest.raises(ValueError, match="other"), located("set 'a'"):
        raise ValueError("other")
