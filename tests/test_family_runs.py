"""A tiny model of each family, from a folder of images through the real command lines to a resumed training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.load import build_model, load_config
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.images.decode import decode_image
from ldm.images.transforms import fit, to_range
from ldm.models.diffusion.concat import for_depth_network
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.families import FAMILIES
from ldm.release.load import load_release
from ldm.shards.index import read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import SIZES
from ldm.util import UserError
from tests.conftest import ROOT
from tests.tiny_families import write_tiny
from tests.tiny_training import ENCODED, finetune_config, write_config, write_images
from tests.training_runs import assert_same_training, fixture_one_thread, logged, run_main, the_run  # noqa: F401

PREENCODE, MAKE_PRIOR, EVALUATE = (ROOT / f"tools/{name}.py" for name in ("preencode", "make_prior", "evaluate"))
Encoded = Callable[[str], SimpleNamespace]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """Return the releases, configs, images and shards that `encoded` has made, by family."""
    return {"": SimpleNamespace(folder=tmp_path_factory.mktemp("families"))}


@pytest.fixture
def encoded(made: dict[str, SimpleNamespace], run_tool: Callable) -> Encoded:
    """Return a function that encodes images for a family, once."""

    def call(key: str) -> SimpleNamespace:
        if key not in made:
            folder = made[""].folder / key
            folder.mkdir()
            release, config = write_tiny(key, folder)
            images, shards = write_images(folder / "images", key), folder / "shards"
            arguments = "--ckpt", release, "--config", config, "--images", images, "--out", shards / "%06d.tar"
            assert run_tool(PREENCODE, *arguments, "--num-workers", 0) is None
            made[key] = SimpleNamespace(release=release, config=config, images=images, shards=shards)
        return made[key]

    return call


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[[str], int]:
    """Return a function that trains in this process, and returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> int:
        try:
            run_main(monkeypatch, f"-t --no-test {line}")
        except SystemExit as stop:
            return stop.code
        return 0

    return call


# Each set of members that samples have, and both predictions; sd1 is resumed in test_main_resume.py.
RESUMED = ("instruct_pix2pix", "sd2_768_v", "sdxl_inpainting")


@pytest.mark.parametrize("key", ENCODED)
def test_a_family_trains_on_its_shards_and_resumes_exactly(
    key: str, encoded: Encoded, train: Callable, tmp_path: Path
) -> None:
    made = encoded(key)
    index = read_index(made.shards)
    assert index["family"] == key and index["samples"] == 4 and index["without_caption"] == 1
    write_config(finetune_config(key, f"{made.shards}/*.tar", made.release), tmp_path / "f.yaml")
    assert train("-b f.yaml -l straight --max_steps 3") == 0
    if key in RESUMED:
        assert train("-b f.yaml -l resumed --max_steps 1") == 0
        assert train(f"--resume {the_run(tmp_path / 'resumed')} --max_steps 3") == 0
        assert_same_training(the_run(tmp_path / "straight"), the_run(tmp_path / "resumed"))
    losses = [float(value) for value in logged(the_run(tmp_path / "straight"), "train/loss").values()]
    assert len(losses) == 3 and all(np.isfinite(losses))


def test_previews_of_sdxl_have_its_vector(encoded: Encoded, train: Callable, tmp_path: Path) -> None:
    made = encoded("sdxl")
    write_config(finetune_config("sdxl", f"{made.shards}/*.tar", made.release), tmp_path / "f.yaml")
    (tmp_path / "prompts.txt").write_text("a cat --n a dog --s 1\n")
    options = f"lightning.previews.release={made.release} lightning.previews.config={made.config}"
    assert train(f"-b f.yaml --max_steps 1 --previews prompts.txt {options}") == 0
    assert len([*the_run(tmp_path / "logs").glob("previews/01-a-cat_gs-000000_*.png")]) == 1


def model_for(config: dict[str, Any]) -> LatentDiffusion:
    config["model"]["params"]["ckpt_path"] = None
    return build_model(OmegaConf.create(config))


def data_for(config: dict[str, Any], model: LatentDiffusion) -> WebDataNpyModuleFromConfig:
    """Return the data module of `config`, as the trainer of `model` has it."""
    data = WebDataNpyModuleFromConfig(**config["data"]["params"])
    facts = {"local_rank": 0, "global_rank": 0, "world_size": 1, "current_epoch": 0, "overfit_batches": 0}
    data.trainer = SimpleNamespace(lightning_module=model, **facts)
    return data


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ("sd1", "sdxl", "the family sd1: .*pooled"),
        ("sd1", "sd2_base", "t5 has shape .* family sd1"),
        ("sd1", "sd1_inpainting", "the family sd1: .*mask"),
        ("sd1", "instruct_pix2pix", "the family sd1: .*edit"),
        ("sd2_768_v", "sd1", "t5 has shape .* family sd2_768_v"),
        ("sd2_base", "sd2_inpainting", "the family sd2_base: .*mask"),
        ("sdxl", "sd1", "the family sdxl: .*pooled"),
        ("sdxl", "sdxl_inpainting", "the family sdxl: .*mask"),
        ("sdxl_inpainting", "sdxl", "the family sdxl_inpainting: .*mask"),
        ("sd1_inpainting", "sd1", "the family sd1_inpainting: .*mask"),
        ("sd1_inpainting", "instruct_pix2pix", "the family sd1_inpainting: .*edit"),
        ("sd1_inpainting", "sd2_inpainting", "t5 has shape .* family sd1_inpainting"),
        ("instruct_pix2pix", "sd1", "the family instruct_pix2pix: .*edit"),
        ("sd2_base", "sd2_depth", "the family sd2_base: .*depth"),
        ("sd2_depth", "sd2_base", "the family sd2_depth: .*depth"),
    ],
)
def test_a_set_of_another_family_is_refused(own: str, other: str, message: str, encoded: Encoded) -> None:
    config = finetune_config(other, f"{encoded(own).shards}/*.tar")
    with pytest.raises(UserError, match=message) as caught:
        data_for(config, model_for(config)).setup("fit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "part", "changes", "message"),
    [
        ("sdxl", "model", {"conditioning_key": "crossattn"}, "num_classes 'sequential': conditioning_key 'crossattn'"),
        ("sd1", "model", {"conditioning_key": "crossattn-adm"}, "'crossattn-adm' needs labels, .* no num_classes"),
        ("sdxl", "unet", {"num_classes": "timestep"}, "num_classes 'timestep': .*sequential"),
        ("sdxl", "unet", {"in_channels": 9}, "in_channels of the UNet is 9, but its input of latent has 4 channels"),
        ("sd1_inpainting", "unet", {"in_channels": 4}, "is 4, but its input of latent and mask and masked_image has 9"),
        ("instruct_pix2pix", "unet", {"in_channels": 9}, "is 9, but its input of latent and edit has 8"),
        ("sd2_depth", "unet", {"in_channels": 4}, "is 4, but its input of latent and depth has 5"),
        ("instruct_pix2pix", "model", {"dropout": 0.5}, r"dropout 0\.5: give a number from 0 to 0\.33"),
        ("sd1", "data", {"full_mask_share": 0.5}, r"full_mask_share 0\.5: the training samples have no masks"),
    ],
)
def test_a_config_that_contradicts_itself_or_its_set_is_refused(
    key: str, part: str, changes: dict, message: str, encoded: Encoded
) -> None:
    config = finetune_config(key, f"{encoded(key).shards}/*.tar")
    params = config["model"]["params"]
    {"model": params, "unet": params["unet_config"]["params"], "data": config["data"]["params"]}[part].update(changes)
    with pytest.raises(UserError, match=message) as caught:
        data = data_for(config, model_for(config))
        data.setup("fit")
        data.train_dataloader()
    assert "\n" not in str(caught.value)


def test_another_scale_of_the_latents_is_told(encoded: Encoded, caplog: pytest.LogCaptureFixture) -> None:
    config = finetune_config("sdxl", f"{encoded('sdxl').shards}/*.tar")
    for scale, said in ((0.13025, 0), (0.18215, 1)):
        config["model"]["params"]["scale_factor"] = scale
        data_for(config, model_for(config)).setup("fit")
        assert caplog.text.count("family sdxl with scale_factor 0.13025, but the model has 0.18215") == said


def test_both_models_of_SD_2_take_one_set(encoded: Encoded) -> None:
    for key in ("sd2_base", "sd2_768_v"):
        config = finetune_config(key, f"{encoded('sd2_base').shards}/*.tar")
        data_for(config, model_for(config)).setup("fit")


def test_a_set_of_another_family_ends_a_run_in_one_line(encoded: Encoded, command: Callable, tmp_path: Path) -> None:
    write_config(
        finetune_config("sdxl", f"{encoded('sd1').shards}/*.tar", encoded("sdxl").release), tmp_path / "f.yaml"
    )
    done = command("main.py", "-b", "f.yaml", "-t", "--no-test", "--max_steps", 1)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and "index.json: the set is for the family sd1" in line
    assert "Traceback" not in done.stderr and not list((tmp_path / "logs").rglob("*.ckpt"))


@torch.no_grad()
@pytest.mark.parametrize("key", ["sdxl", "sdxl_inpainting"])
def test_stored_conditioning_is_that_of_the_release(key: str, encoded: Encoded) -> None:
    """What training makes of stored encodings and sizes is what the released conditioner makes of the captions."""
    made = encoded(key)
    config = finetune_config(key, f"{made.shards}/*.tar")
    config["data"]["params"] |= {"null_cond_dropout": 0.0, "batch_size": 4, "shuffle": False}
    model, released = model_for(config), load_release(made.release, made.config)
    data = data_for(config, model)
    data.setup("fit")
    [batch] = data.train_dataloader()
    sizes = torch.tensor([[80.0, 100.0], [0.0, 8.0], [64.0, 64.0]])  # 10 of 100 columns go at each side, of 80 rows
    assert torch.equal(torch.stack([batch[name][0] for name in SIZES]), sizes)
    cond = model.eval().encode_conditioning(batch)
    names = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    raw = {name: size.expand(4, 2) for name, size in zip(names, sizes, strict=True)}
    expected = released.cond_stage_model({"txt": batch["txt"], **raw})
    assert batch["txt"][3] == ""
    for found, part in ((cond["c_crossattn"][0], "crossattn"), (cond["c_adm"], "vector")):
        torch.testing.assert_close(found[:3], expected[part][:3], rtol=2e-3, atol=2e-3)
    pooled = batch["pooled"].shape[1]
    assert not cond["c_crossattn"][0][3].any() and not cond["c_adm"][3, :pooled].any()
    torch.testing.assert_close(cond["c_adm"][3, pooled:], expected["vector"][3, pooled:])


def test_null_cond_dropout_of_SDXL_drops_all_of_a_caption(encoded: Encoded) -> None:
    config = finetune_config("sdxl", f"{encoded('sdxl').shards}/*.tar")
    config["data"]["params"] |= {"null_cond_dropout": 0.5, "batch_size": 3, "seed": 0}
    data, seen = data_for(config, model_for(config)), []
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(20):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            for t5, pooled, txt in zip(batch["t5"], batch["pooled"], batch["txt"], strict=True):
                assert bool(t5.any()) == bool(pooled.any()) == bool(txt)
                seen.append(bool(txt))
    assert 20 < sum(seen) < 45  # half of the 60 that have a caption
    assert ShardDataset(sorted(encoded("sdxl").shards.glob("*.tar")))[0]["t5"].shape == (77, 40)


@pytest.mark.parametrize("source", ["sampled", "encoded"])
def test_a_prior_of_SDXL_with_a_teacher(
    source: str, encoded: Encoded, run_tool: Callable, train: Callable, tmp_path: Path
) -> None:
    made, out = encoded("sdxl"), tmp_path / "prior"
    what = ("--prompt", "a cat", "a dog", "--n", 2, "--steps", 2) if source == "sampled" else ()
    what = what or ("--shards", f"{made.shards}/*.tar")
    release = ("--ckpt", made.release, "--config", made.config)
    assert run_tool(MAKE_PRIOR, *release, *what, "--teacher", 2, "--out", out / "%06d.tar", "--null-share", 0.5) is None
    index = read_index(out)
    assert (index["family"], index["members"], index["samples"]) == ("sdxl", ["f8", "t5", "pooled"], 4)
    assert index["empty_caption"] == "zeros"
    prior = ShardDataset(sorted(out.glob("*.tar")), extra=["pooled", *SIZES, "t", "noise", "prediction"])
    expected = [[64, 64], [0, 0], [64, 64]] if source == "sampled" else [[80, 100], [0, 8], [64, 64]]
    assert [prior[0][name].tolist() for name in SIZES] == expected
    check_predictions(load_release(made.release, made.config), prior)
    if source == "encoded":  # the same members, which the other case trains on
        return
    config = finetune_config("sdxl", f"{made.shards}/*.tar", made.release)
    config["model"]["params"]["prior_target"] = "teacher"
    config["data"]["params"]["prior_urls"] = f"{out}/*.tar"
    write_config(config, tmp_path / "f.yaml")
    assert train("-b f.yaml -l straight --max_steps 2") == 0
    assert train("-b f.yaml -l resumed --max_steps 1") == 0
    assert train(f"--resume {the_run(tmp_path / 'resumed')} --max_steps 2") == 0
    assert_same_training(the_run(tmp_path / "straight"), the_run(tmp_path / "resumed"))
    assert all(float(value) > 0 for value in logged(the_run(tmp_path / "straight"), "train/loss_prior").values())


@torch.no_grad()
def check_predictions(released: LatentDiffusion, prior: ShardDataset) -> None:
    """Assert that the teacher's predictions are those of the release for the sample's caption and sizes."""
    sample = prior[1]
    names = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    sizes = {name: torch.from_numpy(sample[own])[None] for name, own in zip(names, SIZES, strict=True)}
    captions = {key: torch.from_numpy(sample[key])[None].float() for key in ("t5", "pooled")}
    if sample["txt"]:
        encoded = released.cond_stage_model({"txt": [sample["txt"]], **sizes})
        torch.testing.assert_close(captions["t5"], encoded["crossattn"], rtol=2e-3, atol=2e-3)
    cond = released.stored_conditioning({**captions, **sizes})
    x = released.scale_factor * torch.from_numpy(sample["f8"])[None].float()
    t, noise = torch.tensor([int(sample["t"][0])]), torch.from_numpy(sample["noise"][:1]).float()
    predicted = released.apply_model(released.q_sample(x, t, noise), t, cond)
    torch.testing.assert_close(predicted, torch.from_numpy(sample["prediction"][:1]).float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("key", ["sd1_inpainting", "instruct_pix2pix"])
def test_a_prior_for_a_model_of_images_is_a_set_of_images(
    key: str, encoded: Encoded, run_tool: Callable, train: Callable, tmp_path: Path
) -> None:
    made = encoded(key)
    for what in (("--prompt", "a cat"), ("--shards", f"{made.shards}/*.tar", "--teacher", 2)):
        release = ("--ckpt", made.release, "--config", made.config)
        said = run_tool(MAKE_PRIOR, *release, *what, "--out", tmp_path / "prior/%06d.tar")
        assert "conditioned on" in said and "prior_urls" in said and "\n" not in said
    config = finetune_config(key, f"{made.shards}/*.tar", made.release)
    config["data"]["params"]["prior_urls"] = f"{made.shards}/*.tar"
    write_config(config, tmp_path / "f.yaml")
    assert train("-b f.yaml --max_steps 1") == 0


@pytest.mark.parametrize("key", ENCODED)
def test_evaluate_takes_the_set_of_a_family(key: str, encoded: Encoded, run_tool: Callable, tmp_path: Path) -> None:
    """From captions by the release, and from stored encodings by the config to fine-tune it: the same loss."""
    made = encoded(key)
    stored = write_config(finetune_config(key, f"{made.shards}/*.tar"), tmp_path / "f.yaml")
    losses = []
    for config in (made.config, stored):
        out = tmp_path / config.stem
        releases = ("--base", made.release, "--ckpt", made.release, "--config", config)
        given = ("--set", f"all={made.shards}/*.tar", "--timesteps", 2, "--out", out)
        assert run_tool(EVALUATE, *releases, *given) is None
        [row] = json.loads((out / "evaluation.json").read_text())["sets"].values()
        assert row["overall"]["drift"]["value"] == 0
        losses.append(row["overall"]["loss_tuned"]["value"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] > 0


def test_evaluate_samples_from_captions_alone(encoded: Encoded, run_tool: Callable, tmp_path: Path) -> None:
    sample = ("--timesteps", 1, "--sample", 1, "--steps", 2, "--out", tmp_path / "out")
    for key in ("sdxl", "sd1_inpainting"):
        made = encoded(key)
        releases = ("--base", made.release, "--ckpt", made.release, "--config", made.config)
        said = run_tool(EVALUATE, *releases, "--set", f"all={made.shards}/*.tar", *sample)
        assert (said is None) == (key == "sdxl")
    assert "conditioning_key 'hybrid': this model samples from images too; set --sample 0" in said


def test_pairs_refuse_the_dropping_of_captions_alone(encoded: Encoded) -> None:
    config = finetune_config("instruct_pix2pix", f"{encoded('instruct_pix2pix').shards}/*.tar")
    config["data"]["params"]["null_cond_dropout"] = 0.1
    data = data_for(config, model_for(config))
    data.setup("fit")
    with pytest.raises(UserError, match=r"null_cond_dropout 0\.1: .*model\.params\.dropout"):
        data.train_dataloader()


@torch.no_grad()
def test_stored_depth_is_that_of_the_release(encoded: Encoded) -> None:
    """What training makes of a stored depth map is what the release makes of the image."""
    made = encoded("sd2_depth")
    config = finetune_config("sd2_depth", f"{made.shards}/*.tar")
    config["data"]["params"] |= {"batch_size": 4, "shuffle": False}
    model, released = model_for(config), load_release(made.release, made.config)
    data = data_for(config, model)
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert model.depth_model is None and batch["depth"].shape == (4, 1, 8, 8)
    [found] = model.eval().concatenated(batch)
    paths = sorted(made.images.glob("*.png"))
    pixels = torch.stack([fit(torch.from_numpy(decode_image(path.read_bytes(), "")), 64, 64) for path in paths])
    images = to_range(pixels)
    [expected] = released.concatenated({"image": images.movedim(1, -1), "depth": for_depth_network(images)})
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    assert found.std() > 0.1
    with pytest.raises(UserError, match=r"depth has shape .*; the model takes 1 channels"):
        model.check_batch_shapes({"f8": (8, 8, 8), "depth": (3, 8, 8)})


def test_every_family_is_told_by_the_parts_of_its_model() -> None:
    from ldm.release.model_family import family_of_model
    from tests.tiny_families import tiny_config

    for key in FAMILIES:
        with torch.device("meta"):
            model = build_model(OmegaConf.create(tiny_config(key)))
        assert family_of_model(model).key == key
    assert family_of_model(build_model(load_config(["demo_tiny.yaml"]))) is None
