"""Several captions per image: pre-encoded through the real command, and one chosen per epoch of training."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.image_sources import find_images
from ldm.data.stream import ShardStream
from ldm.shards import npy
from ldm.shards.open import open_shards
from ldm.shards.reader import ShardDataset
from ldm.util import UserError
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.ldm.shard_files import sample_members, write_tar
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    the_run,
)

MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


def write_several(shards: Path, counts: tuple[int, ...] = (3, 1, 2, 3, 2, 4), lines: int = 0) -> None:
    """Write a shard with these numbers of captions; the encoding of caption k is filled with k."""
    shards.mkdir(exist_ok=True)
    np.save(shards / "null.t5.npy", np.full((77, 8), -1, np.float16))
    random = np.random.default_rng(1)
    with tarfile.open(shards / "several.tar", "w") as tar:
        for number, count in enumerate(counts):
            numbers = np.arange(count, dtype=np.float16)
            members = {
                "f8.npy": npy.encode(random.standard_normal((8, 4, 4)).astype(np.float16)),
                "t5.npy": npy.encode(np.broadcast_to(numbers[:, None, None], (count, 77, 8))),
                "txt": "\n".join(f"caption {k}" for k in range(count + lines)).encode(),
            }
            for name, data in members.items():
                member = tarfile.TarInfo(f"{number:03}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def module(shards: Path, rank: int = 0, world: int = 1, **options: Any) -> WebDataNpyModuleFromConfig:
    data = WebDataNpyModuleFromConfig(2, str(shards / "several.tar"), seed=1, **options)
    facts = {"local_rank": rank, "global_rank": rank, "world_size": world, "current_epoch": 0, "overfit_batches": 0}
    data.trainer = SimpleNamespace(lightning_module=None, **facts)
    data.setup("fit")
    return data


def chosen(data: WebDataNpyModuleFromConfig, epoch: int) -> dict[str, str]:
    loader, found = data.train_dataloader(), {}
    loader.batch_sampler.set_epoch(epoch)
    loader.together = False  # this process plays both ranks
    for batch in loader:
        for key, text, context in zip(batch["__key__"], batch["txt"], batch["t5"], strict=True):
            assert context.shape == (77, 8) and (context == (int(text.split()[1]) if text else -1)).all()
            found[key] = text
    return found


def test_training_chooses_a_caption_per_epoch_whatever_the_processes(tmp_path: Path) -> None:
    write_several(tmp_path)
    epochs = [chosen(module(tmp_path), epoch) for epoch in range(30)]
    assert {epoch["000"] for epoch in epochs} == {"caption 0", "caption 1", "caption 2"}
    assert {epoch["001"] for epoch in epochs} == {"caption 0"}
    assert chosen(module(tmp_path, 0, 2), 3) | chosen(module(tmp_path, 1, 2), 3) == epochs[3]
    dropped = chosen(module(tmp_path, null_cond_dropout=0.5), 3)
    assert "" in dropped.values() and all(text in ("", epochs[3][key]) for key, text in dropped.items())


def test_evaluation_has_the_first_caption(tmp_path: Path) -> None:
    write_several(tmp_path)
    data = module(tmp_path, val_urls=str(tmp_path / "several.tar"))
    for batch in data.val_dataloader():
        assert set(batch["txt"]) == {"caption 0"} and not batch["t5"].any()
    dataset = ShardDataset([tmp_path / "several.tar"])
    assert dataset.shapes["t5"] == {(77, 8): "float16"} and dataset[3]["txt"] == "caption 0"


def test_captions_that_do_not_match_their_encodings_are_refused(tmp_path: Path) -> None:
    write_several(tmp_path, lines=1)
    with pytest.raises(UserError, match=r"several.tar: 000: has 4 captions, but 3 of t5; encode the images again"):
        _ = ShardDataset([tmp_path / "several.tar"])[0]


@pytest.mark.parametrize(
    "options",
    ["data.params.prior_urls=shards/s-000001.tar", "-b lean.yaml data.params.batch_size=2", MINIMAL],
    ids=["prior", "lean", "minimal"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable, tmp_path: Path, options: str) -> None:
    write_several(tmp_path / "shards")
    line = f"data.params.training_urls=shards/several.tar {options}"
    train(f"-l straight --max_steps 5 {line}")
    train(f"-l resumed --max_steps 4 {line}")  # within the second epoch of three steps
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 5")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    assert len(logged(resumed, "train/loss")) == 5


def test_preencode_stores_all_captions(run_tool: Callable, tmp_path: Path, tiny_release: Path) -> None:
    images, shards = tmp_path / "images", tmp_path / "shards"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(images / f"{number}.png")
    (images / "0.txt").write_text("a red  apple\n\na dog\r\n")
    several = {"file_name": "1.png", "text": ["a dog", "a red apple", "a cat"]}
    entries = [{"file_name": "0.png"}, several, {"file_name": "2.png", "text": "a cat"}]
    release = ("--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--images", images, "--out", shards / "%06d.tar")
    options = ("--size", 64, "--num-workers", 0)
    (images / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    said = run_tool(ROOT / "tools/preencode.py", *release, *options)
    assert [item.caption for item in find_images(str(images / "0.png"), "a\n cat")] == ["a cat"]
    assert "text is not a string" in said and "takes a list with --several-captions" in said
    assert run_tool(ROOT / "tools/preencode.py", *release, *options, "--several-captions") is None
    dataset = open_shards(str(shards))
    dataset.keeps_captions = True
    first, second, third = (dataset[number] for number in range(3))
    assert [sample["txt"] for sample in (first, second)] == ["a red apple\na dog", "a dog\na red apple\na cat"]
    assert [sample["t5"].shape for sample in (first, second, third)] == [(2, 77, 48), (3, 77, 48), (1, 77, 48)]
    np.testing.assert_array_equal(first["t5"], second["t5"][[1, 0]])
    np.testing.assert_array_equal(second["t5"][2:], third["t5"])
    texts = open_shards(str(shards), cond_stage_key="txt")
    assert texts.has_several_captions and texts[1]["txt"] == "a dog"
    (shards / "index.json").unlink()
    assert open_shards(str(shards), cond_stage_key="txt")[1]["txt"] == "a dog"
    streamed = ShardStream([f"pipe:cat {shards}/000000.tar"], cond_stage_key="txt")
    assert [sample["txt"] for sample in streamed] == ["a red apple", "a dog", "a cat"]


@pytest.mark.parametrize("encoded", [True, False])
def test_lines_of_one_caption_are_not_several(tmp_path: Path, encoded: bool) -> None:
    latent, encoding, (name, _), _ = sample_members(0)
    write_tar(tmp_path / "0.tar", [latent, *([encoding] if encoded else []), (name, b"a\nb")])
    local = open_shards(str(tmp_path / "0.tar"), cond_stage_key="txt")
    assert not local.has_several_captions and local[0]["txt"] == "a\nb"
    (streamed,) = ShardStream([f"pipe:cat {tmp_path}/0.tar"], cond_stage_key="txt")
    assert streamed["txt"] == "a b"


def test_preencode_stores_variants_of_tags(run_tool: Callable, tmp_path: Path, tiny_release: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("tom, cat, red, sofa")
    release = ("--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--images", tmp_path / "a.png")
    options = ("--out", tmp_path / "shards/%06d.tar", "--size", 64, "--num-workers", 0)
    for lone in (("--tag-dropout", 0.1), ("--keep-tags", 2)):
        said = run_tool(ROOT / "tools/preencode.py", *release, *options, *lone)
        assert f"{lone[0]} {lone[1]}: changes variants of tags only; give --tag-variants too, 2 or more" in said
    options = (*options, "--tag-variants", 3)
    said = run_tool(ROOT / "tools/preencode.py", *release, *options, "--several-captions")
    assert "--tag-variants and --several-captions: give one of them" in said
    assert run_tool(ROOT / "tools/preencode.py", *release, *options) is None
    dataset = open_shards(str(tmp_path / "shards"))
    dataset.keeps_captions = True
    captions = dataset[0]["txt"].split("\n")
    assert captions[0] == "tom, cat, red, sofa" and dataset[0]["t5"].shape == (len(captions), 77, 48)
    assert len(captions) > 1 and all(caption.startswith("tom, ") for caption in captions)
