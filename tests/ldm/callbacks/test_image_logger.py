"""Tests of the images logged during training."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from ldm.callbacks.image_logger import ImageLogger, remove_old_images
from ldm.util import UserError


class Model(nn.Module):
    """Model with two parts, one frozen in evaluation mode, whose images are noise of a given size."""

    def __init__(self, entries):
        super().__init__()
        self.trained, self.frozen = nn.Dropout(), nn.Dropout().eval()
        self.entries = entries
        self.calls = []

    def log_images(self, batch, N, split, **kwargs):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append((N, split, kwargs))
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return {key: torch.linspace(-1, 1, count * 3 * 4 * 4).reshape(count, 3, 4, 4) for key, count in self.entries}


def trainer(folder, step=1, loggers=()):
    return SimpleNamespace(
        default_root_dir=str(folder),
        global_step=step,
        current_epoch=0,
        is_global_zero=True,
        sanity_checking=False,
        loggers=list(loggers),
    )


def shown_steps(logger, steps, folder):
    model = Model([("samples", 1)])
    shown = []
    for step in steps:
        before = len(model.calls)
        logger.on_train_batch_end(trainer(folder, step), model, None, {}, 0)
        shown += [step] * (len(model.calls) - before)
    return shown


def test_steps(tmp_path):
    assert shown_steps(ImageLogger(10), range(1, 41), tmp_path) == [1, 2, 4, 8, 10, 20, 30, 40]
    assert shown_steps(ImageLogger(10, increase_log_steps=False), range(1, 41), tmp_path) == [10, 20, 30, 40]
    assert shown_steps(ImageLogger(10, disabled=True), range(1, 41), tmp_path) == []
    assert shown_steps(ImageLogger(4), [4, 4, 4, 5], tmp_path) == [4], "micro-batches of one step"


def test_counting_batches(tmp_path):
    model = Model([("samples", 1)])
    for first in (False, True):
        logger = ImageLogger(4, log_on_batch_idx=True, log_first_step=first)
        before = len(model.calls)
        for batch_idx in range(6):
            logger.on_train_batch_end(trainer(tmp_path, 1), model, None, {}, batch_idx)
        assert len(model.calls) - before == 3 + first  # batches 1, 2, 4, and 0 if asked


def test_validation_logs_its_first_batch_at_the_batch_frequency(tmp_path):
    model, logger = Model([("samples", 1)]), ImageLogger(10)
    for step in (0, 3, 6, 13):
        for batch_idx in range(2):
            logger.on_validation_batch_end(trainer(tmp_path, step), model, None, {}, batch_idx)
    assert [split for _, split, _ in model.calls] == ["val", "val"]
    names = sorted(path.name for path in (tmp_path / "images" / "val").iterdir())
    assert names == ["samples_gs-000003_e-000000_b-000000.png", "samples_gs-000013_e-000000_b-000000.png"]


def test_grids(tmp_path):
    """Samples stand side by side; the steps of a denoising row fill one row of the grid."""
    model = Model([("inputs", 3), ("denoise_row", 15)])
    logger = ImageLogger(1, max_images=3, log_images_kwargs={"ddim_steps": 7})
    logger.on_train_batch_end(trainer(tmp_path), model, None, {}, 0)
    assert model.calls == [(3, "train", {"ddim_steps": 7})]
    sizes = {path.name.split("_gs")[0]: Image.open(path).size for path in (tmp_path / "images" / "train").iterdir()}
    assert sizes == {"inputs": (2 + 3 * 6, 8), "denoise_row": (2 + 5 * 6, 2 + 3 * 6)}


def test_random_state_and_module_modes_do_not_change(tmp_path):
    model = Model([("samples", 1)])
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    ImageLogger(1).on_train_batch_end(trainer(tmp_path), model, None, {}, 0)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert model.trained.training and not model.frozen.training and model.training


@pytest.mark.parametrize(("rescale", "clamp", "value", "pixel"), [(True, True, 3.0, 255), (False, True, 0.5, 128)])
def test_ranges(tmp_path, rescale, clamp, value, pixel):
    model = Model([("samples", 1)])
    model.log_images = lambda *_, **__: {"samples": torch.full((1, 3, 2, 2), value)}
    ImageLogger(1, rescale=rescale, clamp=clamp).on_train_batch_end(trainer(tmp_path), model, None, {}, 0)
    (path,) = (tmp_path / "images" / "train").iterdir()
    assert np.asarray(Image.open(path))[3, 3].tolist() == [pixel] * 3


def test_loggers_that_take_images_get_them(tmp_path):
    class Recorder:
        def __init__(self):
            self.images = []

        def log_image(self, key, images, step):
            self.images.append((key, images[0].size, step))

    recorder = Recorder()
    logger = ImageLogger(1)
    logger.on_train_batch_end(trainer(tmp_path, 2, [recorder, object()]), Model([("samples", 1)]), None, {}, 0)
    assert recorder.images == [("train/samples", (8, 8), 2)]


def test_training_continues_if_the_gpu_is_too_small_for_images(tmp_path, caplog):
    model = Model([("samples", 1)])
    enough = model.log_images

    def log_images(*args, **kwargs):
        if not model.calls:
            model.calls.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return enough(*args, **kwargs)

    model.log_images = log_images
    logger = ImageLogger(10)
    for step in (1, 2):
        logger.on_train_batch_end(trainer(tmp_path, step), model, None, {}, 0)
    assert "No images at step 1: CUDA out of memory; training continues" in caplog.text
    assert model.trained.training and len(list(tmp_path.rglob("*.png"))) == 1


def test_log_all_val_logs_every_batch_of_every_validation(tmp_path):
    model, logger = Model([("samples", 1)]), ImageLogger(10, log_all_val=True)
    for step in (0, 3, 6):
        for batch_idx in range(2):
            logger.on_validation_batch_end(trainer(tmp_path, step), model, None, {}, batch_idx)
    names = sorted(path.name for path in (tmp_path / "images" / "val").iterdir())
    shown = [(name.split("gs-")[1][:6], name[-8:-4]) for name in names]
    assert shown == [("000003", "0000"), ("000003", "0001"), ("000006", "0000"), ("000006", "0001")]


def test_log_images_kwargs_may_lower_the_number_of_images(tmp_path):
    model = Model([("samples", 1)])
    for most, expected in ((2, 2), (9, 3)):
        logger = ImageLogger(1, max_images=3, log_images_kwargs={"N": most, "ddim_steps": 5})
        logger.on_train_batch_end(trainer(tmp_path), model, None, {}, 0)
        assert model.calls[-1] == (expected, "train", {"ddim_steps": 5})
    with pytest.raises(UserError, match="N 0: give a whole number of at least 1"):
        ImageLogger(1, log_images_kwargs={"N": 0})
    with pytest.raises(UserError, match="N 'a'"):
        ImageLogger(1, log_images_kwargs={"N": "a"})


def test_log_before_first_step_logs_once(tmp_path):
    model = Model([("samples", 1)])
    for logger, shown in ((ImageLogger(5, log_before_first_step=True), 1), (ImageLogger(5), 0)):
        model.calls.clear()
        for step in (0, 0, 1):
            logger.on_train_batch_start(trainer(tmp_path, step), model, {}, 0)
        assert len(model.calls) == shown


@pytest.mark.parametrize("enabled", [True, False])
def test_enable_autocast_samples_in_the_precision_of_the_training(tmp_path, enabled):
    model = Model([("samples", 1)])
    seen = []
    model.log_images = lambda *_, **__: seen.append(torch.is_autocast_enabled("cpu")) or {"x": torch.zeros(1, 3, 2, 2)}
    at = trainer(tmp_path)
    at.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    ImageLogger(1, enable_autocast=enabled).on_train_batch_end(at, model, None, {}, 0)
    assert seen == [enabled]


def test_remove_old_images_keeps_the_first_the_newest_and_other_files(tmp_path):
    for step in range(8):
        for key in ("samples", "inputs"):
            (tmp_path / f"{key}_gs-{step:06}_e-000000_b-000000.png").touch()
    (tmp_path / "mine.png").touch()
    remove_old_images(tmp_path, first=2, newest=3)
    left = {path.name for path in tmp_path.iterdir()}
    assert {name.removeprefix("samples_gs-") for name in left if name.startswith("samples_gs-")} == {
        f"{step:06}_e-000000_b-000000.png" for step in (0, 1, 5, 6, 7)
    }
    assert "mine.png" in left and len(left) == 11
