"""Tests that configs published by other projects train without changes."""

import json
import logging

import pytest

from ldm.util import UserError
from tests.conftest import ROOT
from tests.ldm.image_files import write_images
from tests.training_runs import fixture_one_thread, logged, run_main, state, the_run  # noqa: F401

CONFIG = ROOT / "tests/public_configs/captioned_folder.yaml"
EDITS = ROOT / "tests/public_configs/edits.yaml"
OPTIONS = "-t --no-test --max_steps 3 --accelerator cpu --enable_progress_bar False --log_every_n_steps 1"


@pytest.fixture
def in_folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "captioned/train", [f"{number}.jpg" for number in range(6)])
    lines = [json.dumps({"file_name": f"{number}.jpg", "text": "a cat"}) for number in range(6)]
    (tmp_path / "captioned/train/metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_a_public_config_trains_without_changes(in_folder, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        run_main(monkeypatch, f"--base {CONFIG} {OPTIONS}")
    run = the_run(in_folder / "logs")
    assert len(logged(run, "train/loss")) == 3
    assert (run / "checkpoints/last.ckpt").is_file()
    assert sorted((run / "images/val").glob("*.png"))  # log_all_val
    said = [record.getMessage() for record in caplog.records]
    assert sum("sections ignored: sampling; known sections: model, data, lightning" in line for line in said) == 1
    assert sum("metrics_over_trainsteps_checkpoint" in line for line in said) == 1


@pytest.mark.slow
def test_instruct_pix2pix_trains_from_its_own_data_section(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    seeds = [[f"{number:07}", ["3", "5"]] for number in range(20)]
    for name, shots in seeds:
        write_images(tmp_path / "data/pairs" / name, [f"{shot}_{which}.jpg" for shot in shots for which in (0, 1)])
        (tmp_path / "data/pairs" / name / "prompt.json").write_text(json.dumps({"edit": "make it blue"}))
    (tmp_path / "data/pairs/seeds.json").write_text(json.dumps(seeds))
    run_main(monkeypatch, f"--base {EDITS} {OPTIONS} --max_steps 2 --check_val_every_n_epoch 1")
    run = the_run(tmp_path / "logs")
    losses = [float(loss) for loss in logged(run, "train/loss").values()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert sorted((run / "images/train").glob("*.png"))
    weights = state(run / "checkpoints/last.ckpt")["state_dict"]
    first = weights["model.diffusion_model.input_blocks.0.0.weight"]
    assert first.shape == (32, 8, 3, 3)
    average = weights["model_ema.diffusion_modelinput_blocks00weight"]
    assert all((first[:, part] != average[:, part]).any() for part in (slice(4), slice(4, 8)))  # both train


def test_sizes_that_do_not_halve_evenly_stop_a_run_before_it_begins(in_folder, monkeypatch):
    resize = "[{target: torchvision.transforms.Resize, params: {size: [30, 31]}}]"
    (in_folder / "size.yaml").write_text(f"data: {{params: {{train: {{params: {{image_transforms: {resize}}}}}}}}}\n")
    with pytest.raises(UserError) as stop:
        run_main(monkeypatch, f"--base {CONFIG} size.yaml {OPTIONS}")
    assert "'image' of the first sample has 30x31 pixels, which do not halve evenly" in str(stop.value)
    assert "multiples of 4" in str(stop.value)
    assert not list((in_folder / "logs").rglob("*.ckpt"))


def test_a_missing_folder_is_refused_in_one_line_with_its_path(in_folder, monkeypatch):
    with pytest.raises(UserError) as stop:
        run_main(monkeypatch, f"--base {CONFIG} {OPTIONS} data.params.train.params.name=someone/captions")
    assert f"no folder '{in_folder}/someone/captions', and nothing is downloaded" in str(stop.value)
