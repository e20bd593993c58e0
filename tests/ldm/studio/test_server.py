"""Tests of the server: what it refuses, and what it sends."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from PIL import Image

from ldm.images.find import ImageItem
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.fields import default_fields
from ldm.studio.server import Guard, file_response, listen_at
from ldm.studio.start import detect_card, is_loopback, start_studio
from ldm.studio.studio import Studio
from ldm.util import UserError

HERE = {"host": "127.0.0.1:7860"}


def status(headers: dict[str, str], path: str = "/", password: str | None = None) -> int:
    refusal = Guard(None, password).refusal(headers, path)  # type: ignore[arg-type]
    return 200 if refusal is None else refusal.status_code


@pytest.mark.parametrize(("headers", "code"), [
    (HERE, 200),
    ({"host": "localhost"}, 200),
    ({"host": "[::1]:80"}, 200),
    ({**HERE, "origin": "http://127.0.0.1:7860"}, 200),
    ({**HERE, "origin": "http://evil.example"}, 403),  # a page of another site
    ({**HERE, "origin": "http://127.0.0.1:8000"}, 403),
    ({**HERE, "origin": "null"}, 403),
    ({"host": "evil.example:7860"}, 403),  # a name that leads to this machine
    ({}, 403),
])  # fmt: skip
def test_guard_serves_this_machine_and_page_alone(headers: dict[str, str], code: int) -> None:
    assert status(headers) == code


def test_guard_refuses_uploads() -> None:
    assert status(HERE, "/gradio_api/upload") == 403


def test_guard_asks_for_the_password() -> None:
    def given(text: str) -> dict[str, str]:
        return {"host": "my-machine:1", "authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    assert status(given("me:correct horse"), password="correct horse") == 200
    assert status(given("me:wrong"), password="correct horse") == 401
    assert status({"host": "my-machine:1"}, password="correct horse") == 401
    for header in ("Basic", "Basic ???", "Bearer x", "Basic w6k="):
        assert status({"host": "x", "authorization": header}, password="correct horse") == 401
    assert status({**given("me:correct horse"), "origin": "http://evil.example"}, password="correct horse") == 403


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "in").mkdir()
    return Studio(AllowedFolders([tmp_path / "in"]), tmp_path / "work", default_fields(demo=True))


def test_file_response_sends_files_of_allowed_folders_alone(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in/link").symlink_to(tmp_path / "secret.txt")
    for name in ("report.html", "quote\"'.safetensors"):
        (tmp_path / "in" / name).write_text("x")
    report = file_response(studio, str(tmp_path / "in/report.html"))
    assert report.headers["content-security-policy"] == "sandbox allow-scripts"
    assert report.headers["content-disposition"].startswith("inline")
    weights = file_response(studio, str(tmp_path / "in/quote\"'.safetensors"))
    assert (weights.status_code, weights.headers["content-disposition"][:10]) == (200, "attachment")
    for path in ("secret.txt", "in/link", "in/../secret.txt", "in/missing", "in\0x"):
        assert file_response(studio, str(tmp_path / path)).status_code == 403
    assert file_response(studio, str(tmp_path / "in")).status_code == 404


def test_settings_of_another_time_keep_their_types(studio: Studio) -> None:
    studio.save({"name": "mine", "size": 512})
    assert (studio.saved()["name"], studio.saved()["size"]) == ("mine", 512)
    (studio.work / "settings.json").write_text('{"name": ["x"], "rate": 0.5, "flip": 1, "unknown": 1}')
    assert (studio.saved()["name"], studio.saved()["rate"], studio.saved()["flip"]) == ("cats", 0.5, False)
    assert "unknown" not in studio.saved()


def test_thumbnails_are_of_allowed_images(studio: Studio, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "in"):
        Image.new("RGB", (1000, 500), "red").save(folder / "a.png")
    found = studio.thumbnails.of_item(ImageItem("a.png", tmp_path / "in/a.png"))
    assert (found.parent, Image.open(found).size) == (tmp_path / "work/thumbnails", (384, 192))
    assert Image.open(studio.thumbnails.of_png(tmp_path / "in/a.png")).size == (1000, 500)
    with pytest.raises(UserError, match="lies outside"):
        studio.thumbnails.of_png(tmp_path / "a.png")


def test_listen_at_refuses_a_port_in_use() -> None:
    first = listen_at("127.0.0.1", 0)
    port = first.getsockname()[1]
    first.listen()
    with pytest.raises(UserError, match=f"--port {port}: not available"):
        listen_at("127.0.0.1", port)
    first.close()


def test_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "my-machine", "")))


@pytest.mark.parametrize(("host", "work", "environment", "reason"), [
    ("0.0.0.0", "work", {}, "set a password in the environment variable LDM_STUDIO_PASSWORD"),
    ("0.0.0.0", "work", {"LDM_STUDIO_PASSWORD": "short"}, "fewer than 8 letters"),
    ("127.0.0.1", "wo*rk", {}, "a letter with a meaning in names of shards"),
])  # fmt: skip
def test_start_studio_refuses(tmp_path: Path, host: str, work: str, environment: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        start_studio([], host, 0, tmp_path / work, False, environment, print)
    assert not (tmp_path / work).exists()


def test_detect_card_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_card() == ("", 0.0)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA A, B, 24576'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert detect_card() == ("NVIDIA A, B", 24.0)
