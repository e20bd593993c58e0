"""Tests of the paths that the page may read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.commands import ROOT
from ldm.util import UserError


@pytest.fixture
def allowed(tmp_path: Path) -> AllowedFolders:
    (tmp_path / "in").mkdir()
    (tmp_path / "in-not").mkdir()
    (tmp_path / "secret.txt").write_text("x")
    return AllowedFolders([tmp_path / "in"])


@pytest.mark.parametrize("name", ["a.png", "-dash.png", "quo'te\".png", "new\nline", "é/x", "a/../b"])
def test_check_passes_names_of_all_kinds(allowed: AllowedFolders, tmp_path: Path, name: str) -> None:
    assert allowed.check(tmp_path / "in" / name) == tmp_path / "in" / name


@pytest.mark.parametrize(
    "name", ["../secret.txt", "../in-not", "x/../../secret.txt", "/etc/passwd", "..", "link", "way/x"]
)
def test_check_refuses_paths_that_lead_out(allowed: AllowedFolders, tmp_path: Path, name: str) -> None:
    (tmp_path / "in/link").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "in/way").symlink_to("/etc")
    with pytest.raises(UserError, match=r"lies outside of the folders.*--folder"):
        allowed.check(tmp_path / "in" / name)


@pytest.mark.parametrize("text", ["", "  ", None])
def test_check_refuses_no_path(allowed: AllowedFolders, text: str | None) -> None:
    with pytest.raises(UserError, match="release: is empty"):
        allowed.check(text, "release")


def test_check_refuses_what_is_no_path(allowed: AllowedFolders, tmp_path: Path) -> None:
    (tmp_path / "in/round").symlink_to(tmp_path / "in/round")
    for text in (f"{tmp_path}/in/a\0b", tmp_path / "in/round"):
        with pytest.raises(UserError):
            allowed.check_existing(text)


def test_a_link_to_an_allowed_place_passes(allowed: AllowedFolders, tmp_path: Path) -> None:
    (tmp_path / "away").symlink_to(tmp_path / "in")
    assert allowed.check_folder(tmp_path / "away") == tmp_path / "away"


def test_further_files_are_allowed_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("model.ckpt", "other.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / "in/link.ckpt").symlink_to(tmp_path / "model.ckpt")
    allowed = AllowedFolders([tmp_path / "in"], [tmp_path / "in/link.ckpt"])
    assert allowed.has(tmp_path / "in/link.ckpt") and allowed.has(tmp_path / "model.ckpt")
    assert not allowed.has(tmp_path / "other.ckpt")


def test_check_config_follows_a_name_without_a_folder(
    allowed: AllowedFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "secret.yaml").write_text("a: b")
    Path("own.yaml").write_text("a: b")
    for place in ("link.yaml", "configs/latent-diffusion/lean.yaml"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).symlink_to(tmp_path / "secret.yaml")
    for name in ("", "own.yaml", "./own.yaml", "demo_tiny.yaml", str(ROOT / "configs/latent-diffusion/lean.yaml")):
        allowed.check_config(name, "config")
    for name in ("link.yaml", "lean.yaml", "../secret.yaml", "/etc/none.yaml"):
        with pytest.raises(UserError, match=r"config '.*': lies outside"):
            allowed.check_config(name, "config")
    with pytest.raises(UserError, match=r"config 'demo_tin.yaml' not found"):
        allowed.check_config("demo_tin.yaml", "config")


def test_missing_folders_are_refused(allowed: AllowedFolders, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        AllowedFolders([tmp_path / "missing"])
    with pytest.raises(UserError, match="no such file or folder"):
        allowed.check_existing(tmp_path / "in/missing")
    (tmp_path / "in/file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        allowed.check_folder(tmp_path / "in/file")
