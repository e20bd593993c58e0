"""The config of a released checkpoint, given or found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.checkpoint.keys import UNET, V_PREDICTION, ZERO_SNR
from ldm.release.configs import family_of, release_config, training_config
from ldm.release.families import FAMILIES, Family
from ldm.util import UserError
from tests.conftest import ROOT
from tests.sparse_files import write_sparse


def written(family: Family, folder: Path, *markers: str) -> Path:
    """A file with the tensors of the UNet that tell the family, and `markers`; the tensors take no room on the disk."""
    shapes = {key: shape for key, shape in family.shapes.items() if key.startswith(UNET)}
    path = folder / f"{family.key}.safetensors"
    write_sparse(path, {**shapes, **dict.fromkeys(markers, (0,))})
    return path


@pytest.mark.parametrize("key", ["sd1", "instruct_pix2pix", "sd2_depth"])
def test_release_config_is_that_of_the_family(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(FAMILIES[key], tmp_path)
    with caplog.at_level(logging.INFO):
        name, config = release_config(path)
    assert family_of(path) is FAMILIES[key] and name == FAMILIES[key].config
    assert config.model.params.unet_config.params.in_channels == FAMILIES[key].in_channels
    assert FAMILIES[key].described() in caplog.text


def test_release_config_goes_by_parameterization_and_size(tmp_path: Path) -> None:
    path = written(FAMILIES["sd2_base"], tmp_path)
    assert release_config(path)[0] == "stable_diffusion_v2_768_v.yaml"
    assert release_config(path, size=512)[0] == "stable_diffusion_v2_base.yaml"
    assert release_config(path, parameterization="eps", size=768)[0] == "stable_diffusion_v2_base.yaml"
    name, config = release_config(path, FAMILIES["sd2_base"].config, "v", 512)
    assert name == "stable_diffusion_v2_base.yaml" and config.model.params.parameterization == "v"
    assert "parameterization" not in release_config(path, FAMILIES["sd2_base"].config)[1].model.params


def test_release_config_that_is_given_is_read_before_the_file(tiny_release: Path) -> None:
    assert release_config(tiny_release, "demo_tiny_release.yaml")[0] == "demo_tiny_release.yaml"
    with pytest.raises(UserError, match=r"no\.yaml"):
        release_config("missing.ckpt", "no.yaml")
    for given in (None, "demo_tiny_release.yaml"):
        with pytest.raises(UserError, match=r"missing\.ckpt"):
            release_config("missing.ckpt", given)


@pytest.fixture
def marked(tiny_release: Path, tmp_path: Path) -> Path:
    """A release of no family with the marker of v-prediction."""
    save_state_dict({**load_state_dict(tiny_release), V_PREDICTION: torch.zeros(0)}, tmp_path / "marked.ckpt")
    return tmp_path / "marked.ckpt"


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A config that says that its UNet predicts the noise."""
    OmegaConf.save(OmegaConf.create({"model": {"params": {"parameterization": "eps"}}}), tmp_path / "eps.yaml")
    return tmp_path / "eps.yaml"


@pytest.mark.parametrize("given", [None, "stable_diffusion_xl.yaml"])
def test_release_config_follows_the_markers(given: str | None, tmp_path: Path) -> None:
    path = written(FAMILIES["sdxl"], tmp_path, V_PREDICTION, ZERO_SNR)
    params = release_config(path, given)[1].model.params
    assert (params.parameterization, params.rescale_betas_zero_snr) == ("v", True)
    params = release_config(path, given, "eps")[1].model.params
    assert params.get("parameterization", "eps") == "eps" and "rescale_betas_zero_snr" not in params


def test_release_config_leaves_what_a_config_says(marked: Path, noise: Path) -> None:
    assert release_config(marked, noise)[1].model.params.parameterization == "eps"


@pytest.mark.parametrize("key", ["sd1", "sd2_768_v", "sd2_depth"])
def test_training_config_is_that_of_the_family(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(FAMILIES[key], tmp_path)
    with caplog.at_level(logging.INFO):
        chosen = training_config(path)
    assert chosen.names == [FAMILIES[key].finetune_config] and chosen.overrides == []
    assert chosen.prediction == FAMILIES[key].parameterization
    assert FAMILIES[key].described() in caplog.text
    if key == "sd2_768_v":
        assert training_config(path, parameterization="eps").names == [FAMILIES["sd2_base"].finetune_config]


def test_training_config_follows_the_markers_and_says_what_to_type(tmp_path: Path) -> None:
    path = written(FAMILIES["sdxl"], tmp_path, V_PREDICTION, ZERO_SNR)
    values = "model.params.parameterization=v model.params.rescale_betas_zero_snr=true"
    for given in ((), ("finetune_stable_diffusion_xl.yaml",)):
        chosen = training_config(path, given)
        assert chosen.prediction == "v" and chosen.config.model.params.rescale_betas_zero_snr is True
        assert chosen.as_typed() == f"finetune_stable_diffusion_xl.yaml {values}"
    assert training_config(path, parameterization="eps").prediction == "eps"


def test_training_config_refuses_a_config_that_says_otherwise(marked: Path, noise: Path) -> None:
    with pytest.raises(UserError, match="predicts v, but the training's parameterization is eps; train") as caught:
        training_config(marked, [str(noise)])
    assert "\n" not in str(caught.value)
    assert training_config(marked, [str(noise)], "eps").prediction == "eps"


def test_training_config_refuses_what_has_none(tiny_release: Path) -> None:
    with pytest.raises(UserError, match="no family matches these weights; the nearest is ") as caught:
        training_config(tiny_release)
    assert str(caught.value).endswith("name a matching config with --base")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("txt2img", ("--prompt", "x")),
        ("make_prior", ("--prompt", "x", "--out", "prior/%06d.tar")),
        ("preencode", ("--images", "image.png", "--caption", "x", "--out", "shards/%06d.tar")),
        ("evaluate", ("--base", "tiny", "--set", "a=a.tar")),
    ],
)
def test_release_config_is_asked_for_where_no_family_matches(
    tool: str, arguments: tuple, tiny_release: Path, run_tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    given = [tiny_release if argument == "tiny" else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    line = run_tool(ROOT / f"tools/{tool}.py", "--ckpt", tiny_release, *given)
    assert line.startswith("error: ") and "no family" in line and "\n" not in line
    assert str(tiny_release) in line and "Stable Diffusion 1" in line and "--config" in line
