"""Loss masks and variants of images: pre-encoded through the real command, and used in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.encoding.shard_set import RESUMABLE
from ldm.evaluation.sets import open_shards
from ldm.inspection.data_report import format_inspection
from ldm.inspection.measure import inspect, open_to_inspect
from ldm.shards import npy
from ldm.shards.reader import ShardDataset
from ldm.util import UserError
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.ldm.shard_files import write_masked_set, write_tar
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    the_run,
)

MASKED = "model.params.loss_config.target=ldm.models.diffusion.masked_loss.Masked"
MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


def module(shards: str, rank: int = 0, world: int = 1, **options: Any) -> WebDataNpyModuleFromConfig:
    extra = ["loss_mask", "crop_top_left"]
    data = WebDataNpyModuleFromConfig(2, shards, seed=1, extra_keys=extra, **options)
    facts = {"local_rank": rank, "global_rank": rank, "world_size": world, "current_epoch": 0, "overfit_batches": 0}
    data.trainer = SimpleNamespace(lightning_module=None, **facts)
    data.setup("fit")
    return data


def chosen(data: WebDataNpyModuleFromConfig, epoch: int) -> dict[str, int]:
    """Return the variant of each sample in an epoch, by its crop, after a check of its latent and mask."""
    loader, found = data.train_dataloader(), {}
    everything = ShardDataset(data.datasets["training"].paths, extra=["loss_mask"])
    everything.keeps_variants = True
    loader.batch_sampler.set_epoch(epoch)
    loader.together = False  # this process plays both ranks
    for batch in loader:
        for key, latent, mask, crop in zip(
            *(batch[k] for k in ("__key__", "f8", "loss_mask", "crop_top_left")), strict=True
        ):
            variant, stored = int(crop[0]), everything[int(key)]
            np.testing.assert_array_equal(latent, stored["f8"][variant])
            np.testing.assert_array_equal(mask, stored["loss_mask"][variant])
            found[key] = variant
    return found


def test_training_chooses_a_variant_per_epoch_whatever_the_processes(tmp_path: Path) -> None:
    shards = write_masked_set(tmp_path)
    epochs = [chosen(module(shards), epoch) for epoch in range(20)]
    assert {epoch["003"] for epoch in epochs} == {0, 1, 2} and len({tuple(epoch.values()) for epoch in epochs}) > 10
    assert chosen(module(shards, 0, 2), 3) | chosen(module(shards, 1, 2), 3) == epochs[3]
    streamed = [chosen_of_stream(f"pipe:cat {shards}", epoch) for epoch in range(8)]
    assert {epoch["003"] for epoch in streamed} == {0, 1, 2}


def chosen_of_stream(url: str, epoch: int) -> dict[str, int]:
    data = module(url)
    data.datasets["training"].set_epoch(epoch)
    loader = data.train_dataloader()
    data.datasets["training"].set_epoch(epoch)
    return {
        key: int(crop[0])
        for batch in loader
        for key, crop in zip(batch["__key__"], batch["crop_top_left"], strict=True)
    }


def test_validation_evaluation_and_prior_have_the_plain_image(tmp_path: Path) -> None:
    shards = write_masked_set(tmp_path)
    data = module(shards, val_urls=shards, prior_urls=shards)
    plain = ShardDataset([tmp_path / "s.tar"])
    assert plain[2]["f8"].shape == (8, 4, 4) and plain[2]["f8"].tobytes() == open_shards(shards)[2]["f8"].tobytes()
    for batch in data.val_dataloader():
        for key, latent in zip(batch["__key__"], batch["f8"], strict=True):
            np.testing.assert_array_equal(latent, plain[int(key)]["f8"])
    for batch in data.train_dataloader():
        for key, latent, mask, prior in zip(
            *(batch[k] for k in ("__key__", "f8", "loss_mask", "is_prior")), strict=True
        ):
            if prior:  # trained as a whole
                np.testing.assert_array_equal(latent, plain[int(key)]["f8"])
                assert (mask == 1).all()
    for _ in module(f"pipe:cat {shards}", val_urls=f"pipe:cat {shards}").val_dataloader():
        pass


def test_wrong_variants_and_masks_are_refused(tmp_path: Path) -> None:
    write_masked_set(tmp_path, crops=2)
    with pytest.raises(UserError, match=r"s.tar: 000: has 3 variants, but its json lists the crops of 2; encode"):
        _ = ShardDataset([tmp_path / "s.tar"], extra=["crop_top_left"])[0]
    for latent, mask, said in (
        ((2, 8, 4, 4), (1, 4, 4), "variants must be equal"),
        ((8, 4, 4), (1, 2, 4), "height and width must be equal"),
        ((8, 4, 4), (3, 4, 4), "a loss mask has one channel"),
        ((8, 4, 4), None, "loss_mask.npy: has values outside of 0 to 1"),
    ):
        arrays = {
            "f8": np.zeros(latent),
            "t5": np.zeros((77, 8)),
            "loss_mask": np.zeros(mask or (1, 4, 4)) - (not mask),
        }
        members = [(f"1.{key}.npy", npy.encode(array.astype(np.float16))) for key, array in arrays.items()]
        write_tar(tmp_path / "s.tar", members)
        with pytest.raises(UserError, match=said):
            _ = ShardDataset([tmp_path / "s.tar"], extra=["loss_mask"])[0]


def test_inspection_shows_masks(tmp_path: Path) -> None:
    shards = write_masked_set(tmp_path, variants=1)
    (tmp_path / "index.json").write_text(json.dumps(
        {"shards": [{"name": "s.tar"}], "members": ["f8", "t5", "loss_mask"], "format": 1, "variants": 1}
    ))  # fmt: skip
    found = inspect(open_to_inspect(shards), 4, None)
    assert found["loss_masks"] == {
        "mean": 0.5, "white": 0, "black": 0, "areas": {"0-25 %": 0, "25-50 %": 0, "50-75 %": 6, "75-100 %": 0},
    }  # fmt: skip
    assert "loss masks by their white share; mean 50%; 0 white" in format_inspection(found, {})


@pytest.mark.parametrize(
    "options",
    ["-b lean.yaml data.params.batch_size=2 data.params.prior_urls=shards/s-000001.tar", MINIMAL],
    ids=["lean with a prior", "minimal"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable, tmp_path: Path, options: str) -> None:
    write_masked_set(tmp_path / "inputs")
    line = f"data.params.training_urls=inputs/s.tar {MASKED} {options}"
    train(f"-l straight --max_steps 5 {line}")
    train(f"-l resumed --max_steps 4 {line}")  # within the second epoch of three steps
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 5")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    assert len(logged(resumed, "train/loss")) == 5


def test_white_masks_train_as_without_masks(train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_masked_set(tmp_path / "inputs", variants=1, white=True)
    line = "--max_steps 3 data.params.training_urls=inputs/s.tar data.params.val_urls=inputs/s.tar"
    train(f"-l plain {line}")
    train(f"-l masked {line} {MASKED}")
    assert_same_training(the_run(tmp_path / "plain"), the_run(tmp_path / "masked"))
    caplog.clear()
    with pytest.raises(UserError, match=r"has no member 'loss_mask.npy'; the masked loss needs it; encode the images"):
        train(f"-l no {line} {MASKED} data.params.training_urls=shards/s-000000.tar")
    index = {"shards": [{"name": "s.tar"}], "members": ["f8", "t5", "loss_mask"], "format": 1}
    (tmp_path / "inputs/index.json").write_text(json.dumps(index))
    with caplog.at_level("INFO", logger="ldm.shards.open"):
        train(f"-l said {line}")
    assert caplog.text.count("the loss masks are not used") == 1
    (tmp_path / "inputs/index.json").write_text(json.dumps({**index, "members": ["f8", "t5"]}))
    with pytest.raises(UserError, match=r"index.json: the samples have no loss_mask; the masked loss needs it"):
        train(f"-l no {line} {MASKED}")


def test_preencode_stores_masks_and_variants(run_tool: Callable, tmp_path: Path, tiny_release: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    half = Image.fromarray(np.repeat(np.uint8([0, 255]), 32)[None].repeat(64, 0))
    for number in range(2):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("a cat\na red cat")
    tool, out = ROOT / "tools/preencode.py", tmp_path / "out/%06d.tar"
    release = ("--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--images", images, "--out", out)
    options = (*release, "--size", 64, "--num-workers", 0, "--flip", "--shard-size", 2, "--several-captions")
    assert "--loss-masks: no image has a mask" in run_tool(tool, *options, "--loss-masks")
    half.save(images / "1.mask.png")
    for lone in (("--variant-area", 0.5), ("--variant-jitter", 0.1)):
        said = run_tool(tool, *options, *lone)
        assert f"{lone[0]} {lone[1]}: changes variants of images only; give --variants too, 2 or more" in said
    wanted = (*options, "--loss-masks", "--variants", 3, "--variant-jitter", 0.1)
    assert run_tool(tool, *wanted) is None
    written = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.tar"))]
    dataset = open_shards(str(tmp_path / "out"), extra=["loss_mask"])
    dataset.keeps_captions = dataset.keeps_variants = True
    samples = [dataset[number] for number in range(4)]
    assert {sample["f8"].shape for sample in samples} == {(3, 32, 8, 8)}
    assert {sample["t5"].shape for sample in samples} == {(2, 77, 48)}
    assert (samples[0]["loss_mask"] == 1).all() and samples[2]["loss_mask"][0, 0, 0].tolist() == [0] * 4 + [1] * 4
    assert samples[3]["loss_mask"][0, 0, 0].tolist() == [1] * 4 + [0] * 4
    unfinished = json.loads((tmp_path / "out/index.json").read_text())
    del unfinished[RESUMABLE]["images"]  # digest of all images, which a set that is streamed has at its end
    (tmp_path / "out/000001.tar").unlink()
    (tmp_path / "out/index.json").write_text(json.dumps({**unfinished, "complete": False, "shards": []}))
    said = run_tool(tool, *options, "--loss-masks", "--variants", 2, "--variant-jitter", 0.1)
    assert "was begun with variants 3, this command has 2" in said
    assert run_tool(tool, *wanted) is None
    assert [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.tar"))] == written
