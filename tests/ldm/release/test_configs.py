"""The config of a released checkpoint, given or found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import save_state_dict
from ldm.checkpoint.keys import UNET
from ldm.release.configs import family_of, release_config
from ldm.release.families import FAMILIES, Family
from ldm.util import UserError


def written(family: Family, folder: Path) -> Path:
    """A file with the tensors of the UNet that tell the family."""
    shapes = {key: shape for key, shape in family.shapes.items() if key.startswith(UNET)}
    path = folder / f"{family.key}.safetensors"
    save_state_dict({key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}, path)
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
    tool: str, arguments: tuple, tiny_release: Path, command: Callable, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    given = [tiny_release if argument == "tiny" else argument for argument in arguments]
    done = command(f"tools/{tool}.py", "--ckpt", tiny_release, *given)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "no family" in line]
    assert str(tiny_release) in line and "Stable Diffusion 1" in line and "--config" in line
    assert "Traceback" not in done.stderr
