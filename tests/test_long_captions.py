"""Long captions and clip skip, from pre-encoding over training to sampling; captions encoded in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import open_checkpoint, save_state_dict
from ldm.config.load import build_model
from ldm.models.diffusion.stored_prompts import StoredPrompts
from ldm.modules.encoders.caption_settings import CaptionSettings
from ldm.shards.index import INDEX, read_index, write_index
from ldm.shards.open import open_shards
from ldm.util import UserError
from tests.conftest import ROOT
from tests.golden_data import fill_seeded
from tests.tiny_families import write_tiny
from tests.tiny_training import finetune_config, write_config, write_images
from tests.training_runs import (  # noqa: F401
    CONFIG,
    TEXT_TOWER,
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    run_main,
    state,
    the_run,
)

SETTINGS = CaptionSettings(150, 2)
OPTIONS = ("--max-tokens", 150, "--clip-skip", 2)
PREVIEWS = (
    "--previews prompts.txt lightning.previews.release=release.safetensors lightning.previews.config=release.yaml "
    "lightning.previews.every_n_train_steps=2"
)
FIRST, SECOND = "cat " * 75, "dog " * 20
MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"
LEAN = "-b lean.yaml data.params.batch_size=2"


@pytest.fixture(name="release")
def fixture_release(train: Callable, tmp_path: Path) -> Path:
    """Write a release of the tiny model whose text tower has two blocks, images with captions, and a prompt."""
    tower = {"text_config": {**TEXT_TOWER["params"]["text_config"], "num_hidden_layers": 2}}
    config = OmegaConf.create({"model": CONFIG["model"]})
    config.model.params.cond_stage_config = {**TEXT_TOWER, "params": tower}
    config.model.params |= {"first_stage_key": "image", "cond_stage_key": "txt"}
    OmegaConf.save(config, tmp_path / "release.yaml")
    save_state_dict(fill_seeded(build_model(config)).state_dict(), tmp_path / "release.safetensors")
    images = tmp_path / "images"
    images.mkdir()
    captions = [f"{FIRST}{SECOND}", "a cat\na red dog", "red " * 200, "a dog"]
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(caption)
    (tmp_path / "prompts.txt").write_text("a cat --s 1\n")
    return tmp_path / "release.safetensors"


@pytest.fixture(name="encode")
def fixture_encode(release: Path, run_tool: Callable) -> Callable[..., Any]:
    """Return a function that pre-encodes the images to a folder with options."""

    def call(out: str, *options: object) -> Any:
        source = ("--ckpt", release, "--config", "release.yaml", "--images", "images", "--out", f"{out}/%06d.tar")
        return run_tool(ROOT / "tools/preencode.py", *source, "--size", 8, "--num-workers", 0, *options)

    return call


def encoded(release: Path, text: str, **params: Any) -> torch.Tensor:
    """The encoding of one chunk by the release's text encoder with further `params`."""
    config = OmegaConf.load(release.with_name("release.yaml"))
    config.model.params.cond_stage_config.params |= params
    stage = fill_seeded(build_model(config)).cond_stage_model.eval()
    with torch.no_grad():
        return stage([text])[0]


def test_preencode_stores_chunks_of_the_layer(encode: Callable, release: Path, tmp_path: Path) -> None:
    assert encode("long", *OPTIONS) is None
    index = read_index(tmp_path / "long")
    assert (index["max_tokens"], index["clip_skip"], index["t5"], index["captions_cut"]) == (150, 2, [154, 8], 1)
    assert index["cut"] == [{"name": "2.png", "tokens": 200}]
    first, _, _, last = open_shards("long/*.tar")
    chunks = [encoded(release, text, clip_skip=2) for text in (FIRST, SECOND, "a dog", "")]
    for sample, parts in ((first, chunks[:2]), (last, chunks[2:])):
        np.testing.assert_allclose(sample["t5"], torch.cat(parts).half(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.load("long/null.t5.npy"), torch.cat([chunks[3]] * 2).half(), rtol=2e-3, atol=2e-3)
    assert encode("several", *OPTIONS, "--several-captions") is None
    assert open_shards("several/*.tar").shapes["t5"] == {(154, 8): "float16"}
    assert encode("short") is None
    index = read_index(tmp_path / "short")
    assert "max_tokens" not in index and "clip_skip" not in index and index["captions_cut"] == 2


def test_an_unfinished_set_of_other_settings_is_not_resumed(encode: Callable, tmp_path: Path) -> None:
    encode("long", *OPTIONS)
    write_index(tmp_path / "long", {**read_index(tmp_path / "long"), "complete": False})
    said = "the unfinished set was begun with max_tokens 150, this command has it unset; give the same command"
    assert said in encode("long", "--clip-skip", 2)
    assert "--max-tokens 100: must be a multiple of 75" in encode("other", "--max-tokens", 100)
    assert "--clip-skip 3: the text encoder has no more layers than 2; leave it out" in encode(
        "other", "--clip-skip", 3
    )
    assert not (tmp_path / "other").exists()


def test_training_previews_and_a_resumed_run_follow_the_shards(
    train: Callable, encode: Callable, tmp_path: Path
) -> None:
    encode("long", *OPTIONS, "--several-captions")
    line = f"data.params.training_urls=long/*.tar data.params.prior_urls=long/000000.tar {LEAN}"
    train(f"-l straight --max_steps 4 {line}")
    train(f"-l resumed --max_steps 3 {line} {PREVIEWS}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    stored = StoredPrompts.load(resumed / "previews/prompts.safetensors")
    assert stored.captions == SETTINGS and stored.encodings["a cat"]["t5"].shape == (154, 8)
    image = next((resumed / "previews").glob("01-*.png"))
    with Image.open(image) as shown:
        about = json.loads(shown.text["parameters"])
    assert (about["max_tokens"], about["clip_skip"]) == SETTINGS


def test_a_release_records_the_settings_for_sampling(
    train: Callable, encode: Callable, release: Path, run_tool: Callable, tmp_path: Path, caplog: Any
) -> None:
    encode("long", *OPTIONS)
    train("-l logs --max_steps 2 data.params.training_urls=long/*.tar model.params.ckpt_path=release.safetensors")
    last = the_run(tmp_path / "logs") / "checkpoints/last.ckpt"
    assert CaptionSettings.from_entries(state(last)["callbacks"]["SameEncoders"]) == SETTINGS
    for out in ("mine.safetensors", "mine.ckpt"):
        merge = ("--train-ckpt", last, "--release", release, "--out", out)
        assert run_tool(ROOT / "tools/merge_release.py", *merge) is None
        metadata = open_checkpoint(out).metadata
        assert (metadata["ldm.max_tokens"], metadata["ldm.clip_skip"]) == ("150", "2")

    def sampled(ckpt: str, *options: object) -> tuple[bytes, dict[str, Any]]:
        line = ("--ckpt", ckpt, "--config", "release.yaml", "--prompt", f"{FIRST}{SECOND}", "--steps", 2)
        assert run_tool(ROOT / "tools/txt2img.py", *line, "--H", 8, "--W", 8, *options) is None
        path = max(Path("outputs/txt2img").glob("0*.png"))
        with Image.open(path) as image:
            return image.tobytes(), json.loads(image.text["parameters"])

    own, about = sampled("mine.safetensors")
    assert (about["max_tokens"], about["clip_skip"]) == SETTINGS
    assert own == sampled("mine.ckpt")[0]
    other, about = sampled("mine.safetensors", "--max-tokens", 75, "--clip-skip", 1)
    assert other != own and "max_tokens" not in about
    assert "with max_tokens 75 and clip_skip 1, in place of max_tokens 150 and clip_skip 2 of the" in caplog.text
    # A later training with the text encoder's defaults takes the record away.
    train("-l later --max_steps 1")
    last = the_run(tmp_path / "later") / "checkpoints/last.ckpt"
    merge = ("--train-ckpt", last, "--release", "mine.safetensors", "--out", "next.safetensors")
    assert run_tool(ROOT / "tools/merge_release.py", *merge) is None
    assert "ldm.clip_skip" not in open_checkpoint("next.safetensors").metadata
    # Settings that the model cannot have are ignored, with a warning.
    wrong = {"ldm.max_tokens": "150", "ldm.clip_skip": "3"}
    for number, metadata in enumerate([wrong, {**wrong, "ldm.clip_skip": "two"}]):
        save_state_dict(open_checkpoint(release).content["state_dict"], f"wrong{number}.safetensors", metadata=metadata)
        assert "max_tokens" not in sampled(f"wrong{number}.safetensors")[1]
    assert "wrong0.safetensors: max_tokens 150 and clip_skip 3 in its metadata is ignored: --clip-skip 3" in caplog.text
    assert "wrong1.safetensors: ldm.clip_skip in its metadata is ignored: 'two' is no such number" in caplog.text
    # A set for such a release is encoded with its settings.
    said = run_tool(
        ROOT / "tools/preencode.py", "--ckpt", "mine.ckpt", "--config", "release.yaml", "--images", "images",
        "--out", "more/%06d.tar", "--size", 8, "--num-workers", 0,
    )  # fmt: skip
    assert said is None and read_index(tmp_path / "more")["max_tokens"] == 150


def test_a_prior_is_encoded_with_the_settings(
    train: Callable, encode: Callable, release: Path, run_tool: Callable, tmp_path: Path
) -> None:
    prior = ("--ckpt", release, "--config", "release.yaml", "--steps", 2)
    made = ("--prompt", FIRST + SECOND, "--n", 2, "--H", 8, "--W", 8, "--out", "prior/%06d.tar")
    assert run_tool(ROOT / "tools/make_prior.py", *prior, *made, *OPTIONS) is None
    assert CaptionSettings.from_entries(read_index(tmp_path / "prior")) == SETTINGS
    encode("long", *OPTIONS)
    taught = ("--shards", "long/*.tar", "--teacher", 2, "--null-share", 1, "--out", "taught/%06d.tar")
    said = run_tool(ROOT / "tools/make_prior.py", *prior[:4], *taught, *OPTIONS)
    assert "its own caption settings apply; leave out --max-tokens and --clip-skip" in said
    assert run_tool(ROOT / "tools/make_prior.py", *prior[:4], *taught) is None
    assert CaptionSettings.from_entries(read_index(tmp_path / "taught")) == SETTINGS
    assert open_shards("taught/*.tar")[0]["t5"].shape == (154, 8)
    train("--max_steps 1 data.params.training_urls=long/*.tar data.params.prior_urls=prior/*.tar")


DIFFERS = r"index.json: the captions were encoded with max_tokens 75 and clip_skip \d, but with max_tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("data.params.val_urls=short/*.tar", DIFFERS),
        ("data.params.prior_urls=skip/*.tar", DIFFERS),
        ("data.params.training_urls=[long/000000.tar,skip/000000.tar]", "t5.npy: shape|" + DIFFERS),
        (
            "lightning.callbacks.watch.target=ldm.callbacks.forgetting.Forgetting "
            "lightning.callbacks.watch.params.every_n_train_steps=1 "
            "lightning.callbacks.watch.params.sets.rest=short/*.tar",
            DIFFERS,
        ),
        (f"{PREVIEWS} lightning.previews.config=other.yaml", "captions have max_tokens 150, but .* the config has 225"),
    ],
    ids=["validation", "prior", "training", "watched", "previews"],
)
def test_sets_of_other_settings_are_refused(
    train: Callable, encode: Callable, tmp_path: Path, options: str, message: str
) -> None:
    encode("long", *OPTIONS)
    encode("short")
    encode("skip", "--clip-skip", 2)
    config = OmegaConf.load(tmp_path / "release.yaml")
    config.model.params.cond_stage_config.params.max_chunks = 3
    OmegaConf.save(config, tmp_path / "other.yaml")
    with pytest.raises(UserError, match=message) as caught:
        train(f"--max_steps 1 data.params.training_urls=long/*.tar {options}")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("logs/*"))


def test_clip_skip_alone_differs_in_the_index_only(train: Callable, encode: Callable) -> None:
    encode("short")
    encode("skip", "--clip-skip", 2)
    message = (
        "skip/index.json: the captions were encoded with max_tokens 75 and clip_skip 2, but with .* clip_skip 1 in"
    )
    with pytest.raises(UserError, match=message):
        train("--max_steps 1 data.params.training_urls=short/*.tar data.params.val_urls=skip/*.tar")


def test_an_index_that_does_not_fit_its_samples_is_refused(train: Callable, tmp_path: Path) -> None:
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    content = {"shards": [{"name": path.name} for path in shards], "complete": True}
    write_index(tmp_path / "shards", {**content, "max_tokens": 150})
    with pytest.raises(UserError, match=r"max_tokens is 150, but the samples have t5 of the shape \(77, 8\)"):
        train("--max_steps 1")
    for entry, fault in (
        ("max_tokens", "not a multiple of 75 up to 750"),
        ("clip_skip", "not a whole number of at least 1"),
    ):
        write_index(tmp_path / "shards", {**content, entry: 0})
        with pytest.raises(UserError, match=f"{INDEX}: {entry} is 0, {fault}; restore the value"):
            train("--max_steps 1")


TOWER = "model.params.cond_stage_config.params"


@pytest.fixture(name="train_captions")
def fixture_train_captions(encode: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that trains the release, and encodes captions at each step unless it resumes."""
    base = "-b release.yaml encode_captions.yaml model.params.ckpt_path=release.safetensors data.params.num_workers=0"
    fast = "data.params.batch_size=2 lightning.callbacks.image_logger.params.disabled=True lightning.report=False"
    fast += " lightning.trainer.log_every_n_steps=1"

    def call(line: str) -> None:
        run_main(monkeypatch, f"-t --no-test {'' if '--resume' in line else f'{base} {fast}'} {line}")

    return call


def test_captions_are_encoded_in_training(encode: Callable, train_captions: Callable, tmp_path: Path) -> None:
    encode("long", "--several-captions")  # whose encodings are not read
    line = f"data.params.training_urls=long/*.tar data.params.prior_urls=long/000000.tar {MINIMAL} "
    line += f"{TOWER}.max_chunks=2 {TOWER}.clip_skip=2 model.base_learning_rate=1e-3"
    train_captions(f"{line} -l straight --max_steps 5")
    previews = "--previews prompts.txt lightning.previews.every_n_train_steps=2"
    train_captions(f"{line} -l resumed --max_steps 3 {previews}")
    resumed = the_run(tmp_path / "resumed")
    train_captions(f"--resume {resumed} --max_steps 5")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    content = state(resumed / "checkpoints/last.ckpt")
    assert CaptionSettings.from_entries(content["callbacks"]["SameEncoders"]) == SETTINGS
    for key, value in open_checkpoint("release.safetensors").content["state_dict"].items():
        if key.startswith(("cond_stage_model.", "first_stage_model.")):
            assert value.equal(content["state_dict"][key]), key


def test_captions_encoded_in_training_give_the_losses_of_stored_ones(
    encode: Callable, train_captions: Callable, train: Callable, tmp_path: Path
) -> None:
    encode("long", *OPTIONS)
    options = "data.params.training_urls=long/*.tar data.params.null_cond_dropout=0.5 --max_steps 4"
    train_captions(f"-l encoded {options} {TOWER}.max_chunks=2 {TOWER}.clip_skip=2 model.base_learning_rate=1e-3")
    train(f"-l stored {options} model.params.ckpt_path=release.safetensors")
    stored, fresh = (logged(the_run(tmp_path / logs), "train/loss") for logs in ("stored", "encoded"))
    assert [float(value) for value in fresh.values()] == pytest.approx([float(v) for v in stored.values()], rel=1e-3)
    train_captions(f"-l other {options} model.base_learning_rate=1e-3")  # one chunk of the last layer
    other = logged(the_run(tmp_path / "other"), "train/loss")
    assert [float(value) for value in other.values()] != pytest.approx([float(v) for v in stored.values()], rel=1e-4)


def test_a_config_without_a_text_encoder_encodes_no_captions(train: Callable) -> None:
    message = "cond_stage_key txt: the cond stage, DummyEncoder, reads t5 and encodes no captions; name the config of"
    with pytest.raises(UserError, match=message):
        train("--max_steps 1 -b encode_captions.yaml data.params.training_urls=shards/*.tar")


@pytest.mark.parametrize(("key", "width"), [("sd2_base", 24), ("sdxl", 40)])
def test_other_families_read_long_captions_and_skip_nothing(
    key: str, width: int, run_tool: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    release, config = write_tiny(key, tmp_path)
    images = write_images(tmp_path / "images", key)
    line = ("--ckpt", release, "--config", config, "--images", images, "--out", "long/%06d.tar", "--num-workers", 0)
    said = run_tool(ROOT / "tools/preencode.py", *line, "--clip-skip", 2)
    assert "--clip-skip 2: is for Stable Diffusion 1, not for the config's" in said and not Path("long").exists()
    assert run_tool(ROOT / "tools/preencode.py", *line, "--max-tokens", 150) is None
    null = np.load("long/null.t5.npy")
    assert null.shape == (154, width) and null.any() == (key != "sdxl")
    if key == "sdxl":
        write_config(finetune_config(key, "long/*.tar", release), tmp_path / "f.yaml")
        (tmp_path / "prompts.txt").write_text("a cat --s 1 --w 32 --h 32\n")
        previews = f"--previews prompts.txt lightning.previews.release={release} lightning.previews.config={config}"
        run_main(monkeypatch, f"-t --no-test -b f.yaml -l stored --max_steps 1 {previews}")
        [stored] = the_run(tmp_path / "stored").glob("previews/prompts.safetensors")
        assert StoredPrompts.load(stored).encodings["a cat"]["t5"].shape == (154, width)
    fast = "data.params.num_workers=0 data.params.batch_size=2 lightning.callbacks.image_logger.params.disabled=True"
    fresh = f"-t --no-test -b {config} encode_captions.yaml -l fresh --max_steps 1 {fast} lightning.report=False "
    fresh += f"model.params.ckpt_path={release} data.params.training_urls=long/*.tar"
    if key == "sdxl":
        with pytest.raises(UserError, match="null_cond_dropout: this model has zeros for the encodings of empty cap"):
            run_main(monkeypatch, fresh)
    run_main(monkeypatch, f"{fresh} data.params.null_cond_dropout={0 if key == 'sdxl' else 0.5}")
