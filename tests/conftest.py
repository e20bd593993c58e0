"""Fixtures shared by many tests: commands of the repository, and a tiny release of the demo's model."""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from benchmarks import fork_server

ROOT = Path(__file__).resolve().parents[1]
# Files of tests that train, start processes, run whole tools or build many models: a few seconds to minutes each.
# `make check` leaves them out, and single tests of other files that bear the marker themselves.
SLOW = (
    "test_family_runs", "test_fast", "test_kills", "test_lean", "test_main", "test_main_faults", "test_main_mistakes",
    "test_main_resume", "test_main_signals", "test_minimal", "test_packaging", "test_preservation", "test_recipe",
    "test_several_processes", "test_textual_inversion", "tools/*", "hostile/*", "oracle/*", "device/*", "benchmarks/*",
    "ldm/training/test_strategies", "ldm/training/test_host_state", "ldm/encoding/test_set_writer",
    "ldm/images/test_large_images", "ldm/optim/test_host_step", "ldm/optim/test_low_bit", "ldm/planning/test_families",
    "ldm/planning/test_forecast", "ldm/planning/test_step", "ldm/models/diffusion/test_samplers",
    "ldm/release/test_merge", "ldm/release/test_lora_extraction", "ldm/release/test_destination", "test_craft",
    "test_previews", "test_data_weights", "test_captions", "test_smallest", "test_mutated_checkpoints",
    "test_main_trust", "ldm/models/diffusion/test_stored_prompts", "ldm/data/test_parsed", "test_published_optimizers",
    "test_lora_training", "test_masks_and_variants", "test_long_captions", "test_trained_parts",
    "ldm/studio/test_job_store", "browser/*", "test_families_round_trip", "test_background_copies",
    "test_text_encoder_training", "test_main_remote", "ldm/release/test_opening", "ldm/callbacks/test_forgetting",
    "ldm/callbacks/test_validation", "ldm/callbacks/test_decay_to_start", "ldm/data/test_remote_set",
    "ldm/modules/diffusionmodules/test_streamed", "ldm/models/test_autoencoder", "ldm/models/diffusion/test_log_images",
    "ldm/test_host_memory", "ldm/encoding/test_image_stream", "test_configs", "ldm/models/diffusion/test_loss",
    "ldm/models/diffusion/test_latent", "ldm/modules/diffusionmodules/test_openaimodel",
    "ldm/models/diffusion/test_pixel", "ldm/models/diffusion/test_text_to_image", "test_published_config",
    "ldm/evaluation/test_releases", "ldm/data/test_datamodule", "ldm/release/test_foreign_files",
    "ldm/models/diffusion/test_families", "data/test_base", "ldm/optim/test_in_backward",
    "ldm/checkpoint/test_diffusers_folder", "ldm/models/diffusion/test_concat",
    "ldm/models/diffusion/test_preservation", "ldm/training/test_compatibility", "ldm/planning/test_fake_batch",
    "ldm/models/diffusion/test_inputs", "ldm/models/diffusion/test_initial_weights", "ldm/planning/test_warning",
    "ldm/studio/test_tabs", "ldm/models/diffusion/test_ddpm", "ldm/models/diffusion/test_released_keys",
    "ldm/release/test_diffusers_config", "ldm/modules/encoders/test_clip_image", "ldm/data/test_config_module",
    "ldm/data/test_loader", "ldm/evaluation/test_denoising", "ldm/optim/test_published", "ldm/reporting/test_page",
    "ldm/training/test_resume", "ldm/data/test_prior", "ldm/models/diffusion/test_masked_loss",
    "ldm/encoding/test_preencode", "ldm/evaluation/test_report", "ldm/test_printable", "test_decoder_training",
)  # fmt: skip
RELEASE_CONFIG = "demo_tiny_release.yaml"


def pytest_configure() -> None:
    os.environ.pop("LDM_RUN_FOLDER", None)  # of a run that started these tests
    import tests.no_sync  # noqa: F401 - in this process, and in those that are forked

    fork_server.PRELOADED.append("tests.no_sync")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of the garbage collector's searches, which took 7 % of the processor time."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the `SLOW` files out of `make check` before they are imported, which alone takes a quarter of its time."""
    return True if config.option.markexpr == "not slow" and _is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the `SLOW` files."""
    for item in items:
        if _is_slow(item.path):
            item.add_marker(pytest.mark.slow)


def _is_slow(path: Path) -> bool:
    name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
    return any(fnmatch(name, pattern) for pattern in SLOW)


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """Restore the environment variables after each test. A run, for example, leaves its folder in `LDM_RUN_FOLDER`."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a release checkpoint of the demo's tiny model, with seeded weights."""
    from ldm.checkpoint import save_state_dict
    from ldm.config.load import build_model, load_config
    from tests.golden_data import fill_seeded

    path = tmp_path_factory.mktemp("tiny_release") / "release.safetensors"
    save_state_dict(fill_seeded(build_model(load_config([RELEASE_CONFIG]))).state_dict(), path)
    return path


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a command of this repository in a forked process, in the test's own folder."""

    def call(script: str, *arguments: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        return fork_server.run_script([str(ROOT / script), *map(str, arguments)], cwd)

    return call


@pytest.fixture
def fresh_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a command in a new Python, as a user does. That costs 5 s more than `command`."""

    def call(script: str, *arguments: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        line: Sequence[str] = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=cwd)

    return call


@pytest.fixture
def help_of() -> Callable[[Path], tuple[str, set[str]]]:
    """Return a function that runs a script with `--help`, and returns its output and the packages that it imports."""

    def call(script: Path) -> tuple[str, set[str]]:
        line = [sys.executable, "-X", "importtime", str(script), "--help"]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        modules = (said.rpartition("|")[2].strip() for said in done.stderr.splitlines() if said.startswith("import"))
        return done.stdout, {name.partition(".")[0] for name in modules}

    return call


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | int | None]:
    """Return a function that runs a tool in this process, and returns None or the error line."""

    def call(tool: Path, *arguments: object) -> str | int | None:
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        try:
            runpy.run_path(str(tool), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return call
