"""Previews and measurements in runs of main.py, which change neither the training nor a resumed run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.reporting.strips import read_strips
from ldm.util import UserError
from tests.test_several_processes import Runs
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    the_run,
    write_index,
    write_release,
)

WHERE = "lightning.previews"
OPTIONS = f"{WHERE}.release=release.safetensors {WHERE}.config=release.yaml {WHERE}.every_n_train_steps=2"
NORMS = " ".join(
    f"lightning.callbacks.norms.{setting}"
    for setting in ("target=ldm.callbacks.block_norms.BlockNorms", "params.every_n_train_steps=1")
)
PROMPTS = "# two prompts\na red apple --n a dog --w 16 --h 8 --d 7 --s 2 --l 3\n\nBlue, blue --s 2\n"
MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


@pytest.fixture(autouse=True)
def release(train: Callable, tmp_path: Path) -> Path:
    """Write a release with its config, and a file of prompts."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return write_release(tmp_path)


def drawn(run: Path) -> list[str]:
    return sorted(path.name.partition("_e-")[0] for path in (run / "previews").glob("*_gs-*.png"))


@pytest.mark.parametrize(
    "options",
    ["data.params.prior_urls=shards/s-000001.tar", "-b lean.yaml", f"{MINIMAL} --accumulate_grad_batches 2"],
    ids=["prior", "lean", "minimal"],
)
def test_what_watches_a_training_changes_neither_it_nor_a_resumed_one(
    train: Callable, tmp_path: Path, release: Path, options: str
) -> None:
    train(f"-l plain --max_steps 4 {options}")
    train(f"-l shown --max_steps 2 --previews prompts.txt {OPTIONS} {NORMS} {options}")
    run = the_run(tmp_path / "shown")
    for file in (release, tmp_path / "prompts.txt"):
        file.unlink()  # a resumed run has the prompts in its config and their encodings in its folder
    start = (run / "previews/02-blue-blue_gs-000000_e-000000_b-000000.png").stat().st_mtime_ns
    train(f"--resume {run} --max_steps 4")
    assert_same_training(the_run(tmp_path / "plain"), run)
    assert [*logged(run, "update_ratio/output_blocks")] == [0, 1, 2, 3]
    assert len(logged(run, "gradient_norm/output_blocks")) == (0 if "lean" in options else 4)
    steps = [f"{name}_gs-00000{step}" for name in ("01-a-red-apple", "02-blue-blue") for step in (0, 2, 4)]
    assert drawn(run) == steps
    assert (run / "previews/02-blue-blue_gs-000000_e-000000_b-000000.png").stat().st_mtime_ns == start
    [image] = (run / "previews").glob("01-*_gs-000002_*.png")
    with Image.open(image) as shown:
        about = json.loads(shown.text["parameters"])
        assert shown.size == (16, 8)
    expected = {"prompt": "a red apple", "negative_prompt": "a dog", "seed": 7, "steps": 2, "scale": 3.0, "step": 2}
    assert about == {**expected, "sampler": "ddim", "H": 8, "W": 16}
    first, last = (next((run / "previews").glob(f"01-*_gs-00000{step}_*.png")).read_bytes() for step in (0, 4))
    assert first != last
    with Image.open(run / "previews/strip.png") as strip:
        assert strip.size == (2 + 3 * 18, 14 + 10 + 10)
    [shown] = [strip for strip in read_strips(run, 1 << 20, []) if strip.name == "previews"]
    assert [frame.step for frame in shown.frames] == [0, 2, 4] and len(shown.frames[0].images) == 2


@pytest.mark.parametrize("options", ["", "--strategy fsdp model.params.use_ema=False"], ids=["ddp", "fsdp"])
def test_two_processes_show_what_one_shows(tmp_path: Path, options: str) -> None:
    (tmp_path / "runs").mkdir()
    runs = Runs(tmp_path / "runs")
    write_release(runs.folder)
    (runs.folder / "prompts.txt").write_text(PROMPTS)
    for name, ranks in (("one", 1), ("two", 2)):
        line = f"--max_steps 2 data.params.batch_size={4 // ranks} --previews prompts.txt {OPTIONS}"
        runs(name, f"{line} {options if ranks > 1 else ''}", ranks=ranks)
    one, two = (the_run(runs.folder / name) for name in ("one", "two"))
    assert drawn(two) == drawn(one) and len(drawn(two)) == 4
    for path in (two / "previews").glob("*_gs-*.png"):
        with Image.open(path) as shown, Image.open(one / "previews" / path.name) as expected:
            assert np.abs(np.asarray(shown, int) - np.asarray(expected, int)).max() <= 1, path.name


def test_other_prompts_are_encoded_and_shown_at_once(train: Callable, tmp_path: Path) -> None:
    train(f"--max_steps 1 --previews prompts.txt {OPTIONS}")
    run = the_run(tmp_path / "logs")
    train(shlex.split(f"--resume {run} --max_steps 2 '{WHERE}.prompts=[\"a cup --s 1\"]'"))
    assert drawn(run)[:2] == ["01-a-cup_gs-000001", "01-a-cup_gs-000002"]
    train(f"--resume {run} --max_steps 3 {WHERE}=null")
    train(f"--resume {run} --max_steps 4 {WHERE}=null")
    assert len(drawn(run)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--previews none.txt", "none.txt: no such file of prompts; give a text file with a prompt per line"),
        (f"{WHERE}.release=none.ckpt", "lightning.previews.release none.ckpt: no such file or folder; name a release"),
        (f"{WHERE}.release=null", "models/ldm/stable-diffusion-v1/model.ckpt is missing; name the release .*release=F"),
        (f"{WHERE}.config=tiny.yaml", "lightning.previews: .*DummyEncoder reads no captions; give the config of the"),
        (f"{WHERE}.samplr=ddim", "unknown key 'samplr' in lightning.previews; did you mean 'sampler'"),
        (f"{WHERE}.prompts=[a --h 9]", "previews: prompt 1, 'a': height 9: must be a multiple of 2 pixels"),
        ("model.params.scale_by_std=True", "not known before the first batch .*; set lightning.previews=null"),
        (
            "model.params.conditioning_key=hybrid",
            "conditioning_key 'hybrid': this model does not sample from prompts alone; set lightning.previews=null",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_before_training(
    train: Callable, tmp_path: Path, options: str, message: str
) -> None:
    file = "" if "prompts=" in options else "--previews prompts.txt"
    words = [options] if "=" in options else options.split()
    with pytest.raises(UserError, match=message) as caught:
        train([*f"--max_steps 1 {file} {OPTIONS}".split(), *words])
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("logs/*"))


def test_shards_of_another_text_encoder_are_refused(train: Callable, tmp_path: Path) -> None:
    write_index(tmp_path / "shards", text_tower="0" * 64)
    with pytest.raises(UserError, match=r"made by another text tower .*release.safetensors.*; name the release"):
        train(f"--max_steps 1 --previews prompts.txt {OPTIONS}")
